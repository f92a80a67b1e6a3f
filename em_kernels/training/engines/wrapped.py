"""Engines in which a library, FSDP2 or DeepSpeed through accelerate, holds the model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...functional import fused_entropy_loss
from ...hf import Head, head_reads, require_gradients
from ...tolerance import gradient_report
from ..rollouts.padding import PADS
from ..rollouts.sampling import Rollout
from ..runs.checkpoint import Writer, write_model
from ..settings import UserError
from .base import Engine
from .optimizer import KINDS, adamw_options
from .step import StepLoss, loss_options, rank_share, recomputation, token_batch

MASTER, *MOMENTS = KINDS[:3]


class Wrapped(Engine, ABC):
    """A library holds the model and torch's AdamW; calling its root module returns the loss."""

    retries = False
    root: Any  # the module to call
    optimizer: Any
    updates = 0

    def prepare(self) -> None:
        pads = self.ranks.from_main(self.check_model)  # other ranks may not have the weights yet
        require_gradients(self.model)
        for name in (n for n, p in self.model.named_parameters() if not p.requires_grad):
            why = f"model: {name} is no part of the language model and stays as it is"
            remedy = "use one process, or torchrun without FSDP"
            self.ranks.refuse(UserError(f"{why}; this engine trains all of a model: {remedy}"))
        self.wrap()
        PADS[self.model] = pads

    @abstractmethod
    def wrap(self) -> None:
        """Make root and optimizer."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add one micro-batch's gradients, averaged over the ranks."""

    @abstractmethod
    def full(self, kind: str, parameter: Tensor) -> Tensor:
        """Gather the fp32 master, or a moment, of a parameter."""

    def adamw(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.model.parameters(), **adamw_options(self.config))

    def forward_backward(
        self, rollouts: Sequence[Rollout], micro_batch: int, check: Callable[[], None]
    ) -> StepLoss:
        config, ranks = self.config, self.ranks
        rank, scoring = (ranks.index, ranks.count), self.scoring
        share = rank_share(rollouts, config, micro_batch, *rank, scoring)
        batches = [batch for _, group in share.work for batch in group]
        losses, reports = list[Tensor](), list[Tensor]()

        def loss_of(hidden: Tensor, head: Head) -> Tensor:
            states = hidden.flatten(0, 1)[index]
            tokens = len(states) if len(losses) < len(batches) else 0
            # The mask is made here, as FSDP would round a module's argument to bf16.
            mask = states.new_zeros(len(states), dtype=torch.float64)
            mask[:tokens] = config.sign / max(1, share.divisor(tokens, scoring))
            options = loss_options(config, head)
            loss = fused_entropy_loss(states, head.weight, mask=mask, **options)
            losses.append(config.sign * loss.detach())
            reports.append(tokens / max(1, share.tokens) * torch.stack(gradient_report(loss)[:2]))
            return loss

        with (
            recomputation(self.model, config.gradient_checkpointing is True),
            head_reads(self.root, loss_of),
        ):
            # All ranks must make the same number of calls; the surplus ones have a mask of zeros.
            for i in range(share.rounds):
                ranks.together(check)
                batch = batches[i] if i < len(batches) else rollouts[:1]
                ids, index, _ = token_batch(batch, 0, scoring, ranks.device)
                loss = self.root(input_ids=ids, use_cache=False)
                self.backward(loss * ranks.count, i + 1 == share.rounds)
        report = sum((report.cpu() for report in reports), torch.zeros(2))
        return StepLoss(sum(loss.item() for loss in losses), *report.tolist())

    def halve_scale(self) -> bool:
        return False  # the planner refuses float16

    def state(self) -> Mapping[str, Tensor]:
        steps = {f"step.{n}": torch.tensor(self.updates) for n, _ in self.model.named_parameters()}
        kinds = {kind: self._gather(kind) for kind in (MASTER, *MOMENTS)}
        return steps | {f"{kind}.{n}": x for kind, found in kinds.items() for n, x in found.items()}

    def writer(self) -> Writer:
        weights = self._gather(MASTER)
        if self.config.dtype == "bfloat16":  # the weights that it computes with
            weights = {name: weight.bfloat16() for name, weight in weights.items()}
        return write_model(self.model, self.tokenizer, weights)

    def close(self) -> None:
        pass

    @torch.no_grad()
    def _gather(self, kind: str) -> dict[str, Tensor]:
        """Gather a kind of state into rank 0's host memory; the other ranks get nothing."""
        whole = ((name, self.full(kind, p)) for name, p in self.model.named_parameters())
        return {name: tensor.cpu() for name, tensor in whole if self.ranks.is_main}
