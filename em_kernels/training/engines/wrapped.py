"""Engines of libraries: FSDP2 and DeepSpeed hold the model, through accelerate."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional import fused_entropy_loss, gradient_report
from ...hf import Head, head_reads, require_gradients
from ..rollouts.padding import PADS
from ..rollouts.sampling import Rollout
from ..runs.checkpoint import Writer, write_model
from ..settings import UserError
from .base import Engine
from .optimizer import KINDS
from .step import StepLoss, padded, part_of, recomputation

MASTER, *MOMENTS = KINDS[:3]


class Wrapped(Engine):
    """A library holds the model and torch's AdamW; a forward of its root module is the loss."""

    root: Any  # what is called
    optimizer: Any
    updates = 0

    def prepare(self) -> None:
        pads = self.ranks.from_main(self.check_model)  # where weights are, whatever loads
        require_gradients(self.model)
        frozen = next((n for n, p in self.model.named_parameters() if not p.requires_grad), None)
        if frozen is not None:
            self.ranks.refuse(
                UserError(
                    f"model: {frozen} is no part of the language model and stays as it is; this "
                    "engine trains all of a model: use one process, or torchrun without FSDP"
                )
            )
        self.wrap()
        PADS[self.model] = pads

    @abstractmethod
    def wrap(self) -> None:
        """Make root and optimizer."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch; gradients are averaged over the ranks."""

    @abstractmethod
    def full(self, kind: str, parameter: Tensor) -> Tensor:
        """The full fp32 master, or a full moment, of a parameter."""

    def adamw(self) -> torch.optim.AdamW:
        config = self.config
        assert config.lr is not None
        return torch.optim.AdamW(
            self.model.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def forward_backward(
        self, rollouts: Sequence[Rollout], micro_batch: int, check: Callable[[], None]
    ) -> StepLoss:
        config, ranks = self.config, self.ranks
        part = part_of(rollouts, config, micro_batch, ranks.index, ranks.count)
        batches = [batch for _, group in part.work for batch in group]
        seen: list[tuple[int, Tensor, Tensor]] = []  # tokens, loss, report

        def read(hidden: Tensor, head: Head) -> Tensor:
            states = hidden.flatten(0, 1)[index]
            tokens = len(states) if len(seen) < len(batches) else 0
            # made here: FSDP would round what a module is given to bf16
            weights = states.new_zeros(len(states), dtype=torch.float64)
            weights[:tokens] = 1 / max(1, part.divisor(tokens, config.official_loss))
            loss = fused_entropy_loss(
                states,
                head.weight,
                reduction="sum",
                mask=weights,
                temperature=config.temperature,
                grad_tolerance=config.grad_tolerance,
                chunk_bytes=config.chunk_bytes,
                **head.arguments(),
            )
            seen.append((tokens, loss.detach(), torch.stack(gradient_report(loss))))
            return loss

        with (
            recomputation(self.model, config.gradient_checkpointing is True),
            head_reads(self.root, read),
        ):
            for i in range(part.rounds):  # as many on every rank; beyond its own, of weight 0
                ranks.together(check)
                batch = batches[i] if i < len(batches) else rollouts[:1]
                ids, index = padded(batch, 0, config.official_loss, ranks.device)
                loss = self.root(input_ids=ids, use_cache=False)
                self.backward(loss * ranks.count, i + 1 == part.rounds)
        mean = sum(loss.item() for _, loss, _ in seen)
        scored = max(1, part.tokens)
        reports = sum(tokens / scored * report.cpu() for tokens, _, report in seen)
        assert isinstance(reports, Tensor)
        return StepLoss(mean, *reports.tolist())

    def state(self) -> Mapping[str, Tensor]:
        found = {f"{MASTER}.{name}": tensor for name, tensor in self._all(MASTER).items()}
        for kind in MOMENTS:
            found |= {f"{kind}.{name}": tensor for name, tensor in self._all(kind).items()}
        for name, _ in self.model.named_parameters():
            found[f"step.{name}"] = torch.tensor(self.updates)
        return found

    def writer(self) -> Writer:
        weights = self._all(MASTER)
        if self.config.dtype == "bfloat16":  # as it computes
            weights = {name: weight.bfloat16() for name, weight in weights.items()}
        return write_model(self.model, self.tokenizer, weights)

    @torch.no_grad()
    def _all(self, kind: str) -> dict[str, Tensor]:
        """By parameter, in host memory of rank 0; nothing on the others."""
        found = {}
        for name, parameter in self.model.named_parameters():
            whole = self.full(kind, parameter)
            if self.ranks.is_main:
                found[name] = whole.cpu()
        return found
