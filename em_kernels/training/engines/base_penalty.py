"""A penalty on the KL divergence from the base model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...hf import Head, head_of
from ...ops.weight_gradient import WeightGradCallback
from ...streamed_loss import divergence_into
from ..config import TrainConfig
from .shared_prefix import SharedPrefix


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Turn the LoRA adapters off; they are trained again afterwards."""
    from peft.tuners.lora import LoraLayer  # peft takes seconds

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class BasePenalty:
    """The base model's hidden states behind a prompt, and the divergence from it.

    The base is a model of its own, or with LoRA the trained one with its adapters off.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: PreTrainedModel | None,
        ids: Sequence[int] | None,
        weight: float,
    ) -> None:
        """Compute a shared prompt, if there are ids; `weight` multiplies the divergence."""
        self.model, self.base, self.weight = model, base, weight
        self.prompt: SharedPrefix | None = None
        if weight and ids is not None:
            with self._base_model() as frozen:
                self.prompt = SharedPrefix(frozen, ids)

    @contextmanager
    def _base_model(self) -> Iterator[PreTrainedModel]:
        with torch.no_grad():
            if self.base is not None:
                yield self.base
                return
            with without_adapters(self.model):
                yield self.model

    def states(
        self, compute: Callable[[PreTrainedModel, SharedPrefix | None], Tensor]
    ) -> Tensor | None:
        """Return what `compute` returns for the base model; None where there is no penalty."""
        if not self.weight:
            return None
        with self._base_model() as frozen:
            return compute(frozen, self.prompt)

    def divergence(
        self,
        on_weight_grad: WeightGradCallback | None,
        states: Tensor,
        base_states: Tensor,
        mask: Tensor,
        head: Head,
        config: TrainConfig,
    ) -> tuple[float, Tensor, Tensor | None]:
        """Return the divergence, weighted by mask, and the penalty's gradients of states and bias.

        on_weight_grad, and what is returned: as in :func:`divergence_into`.
        """
        base_head = head if self.base is None else head_of(self.base)
        penalty, dstates, dbias = divergence_into(
            on_weight_grad,
            states,
            head.weight,
            base_states,
            base_head.weight,
            mask=self.weight * mask,
            temperature=config.temperature,
            chunk_bytes=config.chunk_bytes,
            **head.arguments(),
            **{f"ref_{name}": value for name, value in base_head.arguments().items()},
        )
        return penalty.item() / self.weight, dstates, dbias
