"""A penalty on the KL divergence from the base model: the model with its LoRA adapters off."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...divergence import fused_divergence
from ...hf import Head
from ..config import TrainConfig
from .shared_prefix import SharedPrefix


@contextmanager
def base_model(model: PreTrainedModel) -> Iterator[None]:
    """Turn the adapters off, and autograd; the adapters are trained again afterwards."""
    from peft.tuners.lora import LoraLayer  # peft takes seconds

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class BasePenalty:
    """The base model's hidden states behind a prompt, and the divergence from it."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[int] | None, weight: float) -> None:
        """Compute a shared prompt, if there are ids; `weight` multiplies the divergence."""
        self.model, self.weight = model, weight
        self.prompt: SharedPrefix | None = None
        if weight and ids is not None:
            with base_model(model):
                self.prompt = SharedPrefix(model, ids)

    def states(self, compute: Callable[[SharedPrefix | None], Tensor]) -> Tensor | None:
        """Return what `compute` returns for the base model; None where there is no penalty."""
        if not self.weight:
            return None
        with base_model(self.model):
            return compute(self.prompt)

    def add_gradient(
        self,
        dstates: Tensor,
        states: Tensor,
        base_states: Tensor,
        mask: Tensor,
        head: Head,
        config: TrainConfig,
    ) -> float:
        """Add the penalty's gradient to dstates (n, D); return the divergence, weighted by mask.

        The head itself is frozen, and the same for both.
        """
        leaf, weight = states.detach().requires_grad_(), head.weight.detach()
        given = {f"ref_{name}": value for name, value in head.arguments().items()}
        with torch.enable_grad():
            divergence = fused_divergence(
                leaf,
                weight,
                base_states,
                weight,
                mask=mask,
                reduction="sum",
                temperature=config.temperature,
                chunk_bytes=config.chunk_bytes,
                **head.arguments(),
                **given,
            )
            (gradient,) = torch.autograd.grad(self.weight * divergence, leaf)
        dstates += gradient
        return divergence.item()
