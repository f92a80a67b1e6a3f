"""Keys and values of the tokens so far, and attention to them. What transformers' interface of
caches and attention asks stands here alone; training's shared prompt has cache layers of its own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...hf import decoder_of, takes

# Layers that share another's keys and values; transformers before 5.23 has no class for them.
DUMMY_LAYER = getattr(cache_utils, "DummyLayer", DynamicLayer)
_lock, _users = threading.Lock(), 0  # of grouped_attention, which changes what all threads call


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, in memory that is allocated once for all tokens to come.

    transformers' own layer allocates and copies everything anew for each token.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.memory: list[Tensor] = []  # keys and values (rows, heads, capacity, head_dim)
        self.fixed: tuple[Tensor, int] | None = None  # see fixed_step()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add tokens (rows, heads, tokens, head_dim); return views of all keys and values."""
        states, start = (key_states, value_states), self.get_seq_length()
        if self.fixed is not None:
            place, end = self.fixed
            for memory, new in zip(self.memory, states, strict=True):
                memory.index_copy_(2, place, new)
            return self.show(end)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.memory = [self._allocated(new, len(new)) for new in states]
        end = start + key_states.shape[-2]
        for memory, new in zip(self.memory, states, strict=True):
            memory[:, :, start:end] = new
        return self.show(end)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if (length := self.get_seq_length()) > 0:
            for i, memory in enumerate(self.memory):
                self.memory[i] = self._allocated(memory, repeats * len(memory))
                repeated = memory[:, :, :length].repeat_interleave(repeats, dim=0)
                self.memory[i][:, :, :length] = repeated
            self.show(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, at the start of the same memory."""
        if (length := self.get_seq_length()) > 0:
            for i, memory in enumerate(self.memory):
                self.memory[i] = memory[: len(indices)]
                self.memory[i][:, :, :length] = memory[indices, :, :length]
            self.show(length)

    def _allocated(self, like: Tensor, rows: int) -> Tensor:
        memory = like.new_empty(rows, like.shape[1], self.capacity, like.shape[3])
        # A fixed_step(), on a GPU, multiplies masked keys and values with 0 all the same. On a CPU
        # memory that is not written to takes none.
        return memory.zero_() if memory.is_cuda else memory

    def show(self, length: int) -> tuple[Tensor, Tensor]:
        """Make so many tokens the layer's; return views of their keys and values."""
        keys, values = (memory[:, :, :length] for memory in self.memory)
        self.keys, self.values = keys, values
        return keys, values


def new_cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """Return an empty cache for so many tokens; a sliding window's layers hold their window."""
    cache = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = PreallocatedLayer(capacity)
    return cache


@contextmanager
def fixed_step(cache: DynamicCache, place: Tensor, end: int) -> Iterator[None]:
    """Within this context a token goes to `place` (1,), whatever tokens there are, and attention
    sees the first `end` keys and values; the caller masks those that are none.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]
    for layer in layers:
        layer.fixed = place, end
    try:
        yield
    finally:
        for layer in layers:
            layer.fixed = None


def set_length(cache: DynamicCache, length: int) -> None:
    """Make the cache hold the first tokens in its memory."""
    for layer in cache.layers:
        if isinstance(layer, PreallocatedLayer) and layer.is_initialized:
            layer.show(length)


def layer_kinds(model: PreTrainedModel) -> set[type]:
    """Return the classes of the model's cache layers, those of layers that have none left out."""
    return {type(layer) for layer in DynamicCache(config=model.config).layers} - {DUMMY_LAYER}


def keeps_every_token(model: PreTrainedModel) -> bool:
    """Return True if no layer drops keys that a sliding window has passed."""
    return layer_kinds(model) <= {DynamicLayer}


def check_cache(model: PreTrainedModel) -> None:
    """Raise TypeError if rows of the model's KV cache cannot be repeated and dropped."""
    name = type(model).__name__
    for kind in layer_kinds(model) - {DynamicLayer, DynamicSlidingWindowLayer}:
        raise TypeError(f"model: {name} keeps a {kind.__name__}; only attention is supported")
    if not takes(decoder_of(model), "past_key_values", "use_cache"):
        why = f"{name} takes no keys and values of earlier tokens"
        raise TypeError(f"model: {why}; this architecture is not supported")


@contextmanager
def grouped_attention() -> Iterator[None]:
    """Within this context, transformers' sdpa repeats no keys for the query heads that share them.

    One new token: these heads become the rows of one product, as torch's own grouped attention
    reads the keys once for every query head, which takes 10 times as long on a CPU. Several new
    tokens that continue a prefix: torch's lower-right causal attention.
    """
    global _users
    with _lock:
        _users += 1
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _mask
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                del ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def _mask(*arguments: Any, **options: Any) -> Any:
    """transformers' mask for sdpa, marked if it is causal and nothing else.

    Attention that knows the mark needs no mask; models that compute their own still have it.
    """
    mask: Any = sdpa_mask(*arguments, **options)
    plain = options.get("mask_function") is causal_mask_function
    if mask is not None and plain and options.get("attention_mask") is None:
        start, end = options.get("q_offset"), options["kv_length"]
        same_end = isinstance(start, int) and start + options["q_length"] == end
        mask.is_lower_right = same_end and options.get("kv_offset") == 0
    return mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,  # some models name the arguments
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa; shapes (rows, heads, tokens, head_dim)."""
    rows, heads, tokens, head_dim = query.shape
    unchanged = all(options.get(name) is None for name in ("position_bias", "cache", "softcap"))
    plain = unchanged and not options.get("dropout")
    attend = partial(scaled_dot_product_attention, scale=options.get("scaling"))
    grouped = heads != key.shape[1]
    if plain and tokens > 1 and getattr(attention_mask, "is_lower_right", False):
        bias = attention_mask[:1]  # the rows' masks are the same
        if query.is_cuda:  # where only flash attention needs neither a mask nor repeated keys
            parameters = SDPAParams(query, key, value, None, 0.0, False, grouped)
            is_flash = can_use_flash_attention(parameters)
            bias = causal_lower_right(tokens, key.shape[2]) if is_flash else None
        if bias is not None:
            found = attend(query, key, value, attn_mask=bias, enable_gqa=grouped)
            return found.transpose(1, 2).contiguous(), None
    alike = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
    if plain and tokens == 1 and grouped and alike:
        groups = query.reshape(rows, key.shape[1], -1, head_dim)
        found = attend(groups, key, value, attn_mask=attention_mask)
        return found.reshape(rows, 1, heads, value.shape[-1]), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
