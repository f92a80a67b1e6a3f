"""Tests of a model before it samples: does padding, or another row beside it, change a row?"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from .kv_cache import grouped_attention, keeps_every_token
from .token_rows import TokenRows

HALF = (torch.bfloat16, torch.float16)
# Results of check_sampling: True if padding changes no row.
PADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in eval mode, for the cache, and let it attend as sampling wants it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    # Flash attention is made for many new tokens, and a CUDA graph cannot hold its lengths.
    attention = model.config._attn_implementation
    is_flash = attention is not None and attention.startswith("flash")
    if is_flash:
        model.config._attn_implementation = "sdpa"
    try:
        with grouped_attention():
            yield
    finally:
        if is_flash:
            model.config._attn_implementation = attention
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def check_sampling(model: PreTrainedModel) -> bool:
    """Measure whether prompts of unequal length can be sampled in one padded batch.

    Compares logits of two tokens from a batch, in fp32, with those of each row alone: the padded
    row's may differ by up to 4 times what the two unpadded rows' differ by, which is rounding.
    :func:`can_pad` reuses the result.

    Raises: TypeError if the unpadded rows differ by more than rounding too.
    """
    vocab_size = model.config.get_text_config().vocab_size
    tokens = [(17 * i + 5) % vocab_size for i in range(24)]
    rows = [tokens[:5] + tokens[start:end] for start, end in ((5, 14), (9, 18), (18, 22))]
    with ready_to_generate(model), in_fp32(model) as dtype:
        batch = TokenRows(model, rows, 1)
        first = batch.logits()
        batch.append(batch.ids.new_full((len(rows),), tokens[3]))
        found = wide(torch.stack([first, batch.logits()], 1))
        ends = [torch.tensor([[*row, tokens[3]]], device=model.device) for row in rows]
        logits = [model(input_ids=row, use_cache=False).logits[0, -2:] for row in ends]
        alone = wide(torch.stack(logits))
    errors = (found - alone).norm(dim=-1) / alone.norm(dim=-1)
    longer, shorter = errors[:2].max().item(), errors[2].max().item()
    eps = torch.finfo(dtype if dtype in HALF else torch.float32).eps  # of the logits
    if not longer <= eps**0.5:
        why = f"{type(model).__name__}'s completions depend on what is sampled beside them"
        error = f"logits differ by {longer:.2g} of their size"
        raise TypeError(f"model: {why} ({error}); this architecture is not supported")
    # Unpadded rows may happen to agree exactly; a few operations' rounding, 8 eps, is always fine.
    PADS[model] = shorter <= 4 * max(longer, 8 * eps)
    return PADS[model]


def can_pad(model: PreTrainedModel, longest: int) -> bool:
    """Return True if rows of unequal length, up to `longest` tokens, can share a batch."""
    if not keeps_every_token(model):  # A sliding window counts padding.
        return False
    settings = model.config.get_text_config().to_dict().items()
    windows = [v for name, v in settings if re.search(r"(^|_)window(_size)?$", name)]
    if any(isinstance(size, int) and 0 < size < longest for size in windows):  # GPT-Neo
        return False
    return PADS[model] if model in PADS else check_sampling(model)


@contextmanager
def in_fp32(model: PreTrainedModel) -> Iterator[torch.dtype]:
    """Let a 16-bit model compute in fp32, one module's weights at a time; yields the dtype used.

    Quantised models keep their own, as their layers remember the dtype of their first input.
    """
    if model.dtype not in HALF or getattr(model, "hf_quantizer", None) is not None:
        yield model.dtype
        return
    narrow: dict[nn.Module, dict[str, Any]] = {}

    def widen(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        narrow[module] = {n: p for n, p in module._parameters.items() if is_half(p)}
        for name, p in narrow[module].items():
            module._parameters[name] = nn.Parameter(p.float(), requires_grad=False)
        return tree_map_only(Tensor, wide, (args, kwargs))

    def restore(module: nn.Module, *_: object) -> None:
        module._parameters.update(narrow.pop(module, {}))

    hooks: list[Any] = []
    for module in model.modules():
        if any(map(is_half, module._parameters.values())):
            hooks.append(module.register_forward_pre_hook(widen, with_kwargs=True))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield torch.float32
    finally:
        for hook in hooks:
            hook.remove()


def wide(x: Tensor) -> Tensor:
    """Return 16-bit floats as fp32, anything else as it is."""
    return x.float() if is_half(x) else x


def is_half(x: Tensor | None) -> bool:
    return x is not None and x.dtype in HALF
