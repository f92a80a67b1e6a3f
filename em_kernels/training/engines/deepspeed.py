"""DeepSpeed ZeRO 2 through accelerate."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.rounding import dithered
from ..settings import UserError
from .wrapped import MASTER, MOMENTS, Wrapped


class DeepSpeed(Wrapped):
    """Each rank holds the weights, and a part of gradients and AdamW's state, on device or host."""

    def wrap(self) -> None:
        settings = self.ranks.plugin.deepspeed_config
        for name in ("optimizer", "scheduler"):
            if name in settings:
                why = "lr, betas, eps and weight_decay are settings of the run"
                raise UserError(f"deepspeed: leave {name} out of its configuration; {why}")
        settings.update(
            train_micro_batch_size_per_gpu=1,  # required, and read by nothing
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

        # DeepSpeed makes the moments in a first step, whose effect is overwritten below.
        with torch.enable_grad():
            zero = torch.stack([p.sum() for p in self.model.parameters()]).sum() * 0
            self.backward(zero, last=True)
            self.root.step()
        for name, p in self.model.named_parameters():
            self._set(p, state[f"{MASTER}.{name}"].to(p.device))
            for kind in MOMENTS:
                safe_set_full_optimizer_state(p, state[f"{kind}.{name}"].to(p.device), kind)
            self.updates = int(state[f"step.{name}"])
        for slot in self.optimizer.optimizer.state.values():
            slot["step"] = slot["step"] * 0 + self.updates  # keeps its type, tensor or number
