"""Engines of libraries: FSDP2 and DeepSpeed hold the model, through accelerate."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from ..functional import fused_entropy_loss, gradient_report
from ..hf import Head, head_reads, require_gradients
from .checkpoint import Writer, write_model
from .config import UserError
from .engines import Engine
from .optimizer import KINDS, square_sum
from .padding import PADS
from .rollout import Rollout
from .rounding import dithered
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
        """Of a micro-batch; the ranks' gradients are averaged."""

    @abstractmethod
    def full(self, kind: str, parameter: Tensor) -> Tensor:
        """Of a parameter the master, or a moment."""

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

    def learn(
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


class Fsdp2(Wrapped):
    """Each rank has a part of every weight, gradient and moment."""

    def wrap(self) -> None:
        plugin = self.ranks.plugin
        # else the launcher's default, none, which gathers the layers all at once
        plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
        half = self.config.dtype == "bfloat16"
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
        )
        self.model.float()  # its parts are the masters
        with torch.no_grad():
            for p in self.model.parameters() if half else ():
                p.copy_(dithered(p.flatten()).view(p.shape))  # or ten updates would be rounded off
        self.root = fsdp2_prepare_model(self.ranks.accelerator, self.model)
        self.model = self.root
        self.reshards = plugin.reshard_after_forward
        self.optimizer = self.adamw()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every weight is on every rank, which so need not wait for the others' completions."""
        parts: list[Any] = [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                again = self.reshards and isinstance(part, GradientCheckpointingLayer)
                part.set_reshard_after_forward(again, recurse=False)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def norm(self) -> float:
        grads = [p.grad for p in self.model.parameters() if isinstance(p.grad, DTensor)]
        parts = [grad.to_local().flatten() for grad in grads]
        squares = [square_sum(part) for part in parts if part.numel()]
        return self.ranks.total([torch.stack(squares).sum().item() if squares else 0])[0] ** 0.5

    def step(self, norm: float) -> None:
        coefficient = min(1.0, self.config.clip / (norm + 1e-6))
        if coefficient < 1:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, coefficient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1

    def full(self, kind: str, parameter: Any) -> Tensor:
        part = parameter if kind == MASTER else self.optimizer.state[parameter][kind]
        return part.to(self.ranks.device).full_tensor()  # from the host, where FSDP offloads

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        def part_like(parameter: Any, whole: Tensor) -> Tensor:
            mesh, placements = parameter.device_mesh, parameter.placements
            whole = whole.to(parameter.dtype)
            part = distribute_tensor(whole, mesh, placements, src_data_rank=None)  # on the device
            return part.to(parameter.to_local().device)

        for name, p in self.model.named_parameters():
            p.copy_(part_like(p, state[f"{MASTER}.{name}"]))
            self.updates = int(state[f"step.{name}"])
            self.optimizer.state[p] = {
                "step": torch.tensor(float(self.updates)),
                **{kind: part_like(p, state[f"{kind}.{name}"]) for kind in MOMENTS},
            }


class DeepSpeed(Wrapped):
    """Each rank has the weights, and of gradients and AdamW's state a part, on the device or the
    host (ZeRO 2).
    """

    def wrap(self) -> None:
        settings = self.ranks.plugin.deepspeed_config
        for name in ("optimizer", "scheduler"):
            if name in settings:
                raise UserError(
                    f"deepspeed: leave {name} out of its configuration; lr, betas, eps and "
                    "weight_decay are settings of the run"
                )
        settings.update(
            train_micro_batch_size_per_gpu=1,  # which nothing reads
            gradient_accumulation_steps=1,
            gradient_clipping=self.config.clip,
            bf16={"enabled": self.config.dtype == "bfloat16"},
            fp16={"enabled": False},
        )
        if self.config.dtype == "bfloat16":
            settings.setdefault("data_types", {})["grad_accum_dtype"] = "fp32"
        settings.pop("train_batch_size", None)
        self.root, _ = self.ranks.accelerator.prepare(self.model, self.adamw())
        self.optimizer = self.root.optimizer
        if self.config.dtype == "bfloat16":
            for p in self.model.parameters():
                self._set(p, dithered(self.full(MASTER, p).flatten()).view(p.shape))

    @torch.no_grad()
    def _set(self, parameter: Tensor, master: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        parameter.copy_(master)
        safe_set_full_fp32_param(parameter, master)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.root.set_gradient_accumulation_boundary(last)
        self.root.backward(loss)

    def norm(self) -> float:
        return float(self.optimizer.scaled_global_norm())

    def step(self, norm: float) -> None:
        self.root.step()
        self.updates += 1

    def full(self, kind: str, parameter: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == MASTER:
            return safe_get_full_fp32_param(parameter).detach().view(parameter.shape)
        return safe_get_full_optimizer_state(parameter, kind).detach().view(parameter.shape)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        with torch.enable_grad():  # the moments are there after a first step; what it does goes
            nothing = torch.stack([p.sum() for p in self.model.parameters()]).sum() * 0
            self.backward(nothing, last=True)
            self.root.step()
        for name, p in self.model.named_parameters():
            self._set(p, state[f"{MASTER}.{name}"].to(p.device))
            for kind in MOMENTS:
                safe_set_full_optimizer_state(p, state[f"{kind}.{name}"].to(p.device), kind)
            self.updates = int(state[f"step.{name}"])
        for slot in self.optimizer.optimizer.state.values():  # a tensor of torch's, or a number
            slot["step"] = slot["step"] * 0 + self.updates
