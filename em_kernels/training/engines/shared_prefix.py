"""A prompt that is computed once for all rows that continue it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ...hf import hidden_states
from ..rollouts.kv_cache import grouped_attention
from .packing import behind_prefix, packed_inputs


class _PromptLayer(DynamicLayer):
    """Keeps the prompt's keys and values of one layer, with their autograd graph."""

    length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:  # recomputation calls this a second time
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            self.length = key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length


class _ContinuedLayer(DynamicLayer):
    """Prepends the prompt's keys and values to those of each row, which it does not keep.

    lengths: of rows that lie side by side.
    """

    def __init__(self, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.lengths = lengths

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        lengths = self.lengths or [key_states.shape[-2]]
        keys = behind_prefix(self.keys, key_states, lengths)
        return keys, behind_prefix(self.values, value_states, lengths)


class SharedPrefix:
    """A prompt's last hidden state, keys and values, computed once for all rows that continue it.

    The rows' backwards end at `leaves`, which add up their gradients in fp32; backward() then takes
    those through the prompt, once. A single backward through rows and prompt would hold the rows'
    gradients of all weights until the prompt's arrive.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        self.model, self.length = model, len(ids)
        cache = DynamicCache(config=model.config)
        kept: list[Any] = [_PromptLayer() for _ in cache.layers]
        cache.layers = kept
        states = hidden_states(model, torch.tensor([ids], device=model.device), cache)
        if any(layer.keys is None for layer in kept):
            why = f"{type(model).__name__} does not fill the cache it is given"
            raise TypeError(f"model: {why}; this architecture is not supported")
        self.outputs: list[Any] = [states[:, -1]]
        for layer in kept:
            self.outputs += [layer.keys, layer.values]
            layer.keys = layer.values = None  # checkpoint's frames would keep the graph alive
        self.leaves = [x.detach() for x in self.outputs]
        for i, x in enumerate(self.outputs):
            if x.requires_grad:  # not so below the first layer that has an adapter
                wide = torch.promote_types(x.dtype, torch.float32)
                self.leaves[i] = x.detach().to(wide).requires_grad_()

    @property
    def last(self) -> Tensor:
        """Return the hidden state (1, D) that scores the first token of a response."""
        return self.leaves[0].to(self.outputs[0].dtype)

    def continued(self, ids: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """Return hidden states (B, T, D) of rows (B, T) that continue the prompt; lengths: of rows
        that lie side by side in (1, T).
        """
        pairs = zip(self.leaves[1:], self.outputs[1:], strict=True)
        kv = [leaf.to(x.dtype).expand(len(ids), -1, -1, -1) for leaf, x in pairs]
        cache = DynamicCache(config=self.model.config)
        pairs = zip(kv[::2], kv[1::2], strict=True)
        cache.layers = [_ContinuedLayer(k, v, lengths) for k, v in pairs]
        inputs = packed_inputs(lengths, self.length, ids.device) if lengths else {}
        with grouped_attention():
            return hidden_states(self.model, ids, cache, **inputs)

    def backward(self) -> None:
        """Backpropagate the accumulated gradients through the prompt."""
        pairs = zip(self.outputs, self.leaves, strict=True)
        reached = [(x, leaf.grad.to(x.dtype)) for x, leaf in pairs if leaf.grad is not None]
        if reached:
            outputs, gradients = zip(*reached, strict=True)
            torch.autograd.backward(outputs, gradients)


@torch.no_grad()
def can_share_prefix(model: PreTrainedModel) -> bool:
    """Return True if continuing a SharedPrefix gives the model's own hidden states."""
    if {type(layer) for layer in DynamicCache(config=model.config).layers} != {DynamicLayer}:
        return False
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.arange(2, 26, device=model.device).view(2, 12) % vocab_size
    ids[:, :6] = ids[0, :6]
    expected = hidden_states(model, ids)[:, 6:].float()
    found = SharedPrefix(model, ids[0, :6].tolist()).continued(ids[:, 6:])
    errors = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # Another batch size rounds differently: single tokens of a real model move by 1e-3 in fp32.
    return bool(errors.median() <= 0.02)
