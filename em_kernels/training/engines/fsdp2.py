"""FSDP2 through accelerate."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.rounding import dithered
from .optimizer import square_sum
from .wrapped import MASTER, MOMENTS, Wrapped


class Fsdp2(Wrapped):
    """Each rank holds a part of every weight, gradient and moment."""

    def wrap(self) -> None:
        plugin = self.ranks.plugin
        # The launcher's default, no policy, would gather all layers at once.
        plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
        half = self.config.dtype == "bfloat16"
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
        )
        self.model.float()  # the sharded weights are the masters
        with torch.no_grad():
            # FSDP2 rounds masters to the nearest bf16; without dither it would undo small updates.
            for p in self.model.parameters() if half else ():
                p.copy_(dithered(p.flatten()).view(p.shape))
        self.root = fsdp2_prepare_model(self.ranks.accelerator, self.model)
        self.model = self.root
        self.reshards = plugin.reshard_after_forward
        self.optimizer = self.adamw()

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """Gather the weights, so that ranks sample without waiting for each other."""
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
