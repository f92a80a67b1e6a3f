"""Padding of prompts for one batch, and whether a model then computes each row as if alone."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os.path import commonprefix
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...hf import decoder_of, takes

# Layers that share another's keys and values; transformers before 5.23 has no class for them.
DUMMY_LAYER = getattr(cache_utils, "DummyLayer", DynamicLayer)
HALF = (torch.bfloat16, torch.float16)
# Results of check_sampling: True if padding changes no row.
PADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def check_cache(model: PreTrainedModel) -> None:
    """Raise TypeError if rows of the model's KV cache cannot be repeated and dropped."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    name = type(model).__name__
    for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer, DUMMY_LAYER}:
        raise TypeError(f"model: {name} keeps a {kind.__name__}; only attention is supported")
    if not takes(decoder_of(model), "past_key_values", "use_cache"):
        why = f"{name} takes no keys and values of earlier tokens"
        raise TypeError(f"model: {why}; this architecture is not supported")


@contextmanager
def ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in eval mode, for the cache, and hide its generation_config from generate."""
    modes = [(module, module.training) for module in model.modules()]
    config = model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        model.generation_config = config


def pad_prompts(
    model: PreTrainedModel, prompts: Sequence[list[int]]
) -> tuple[Tensor, Tensor, DynamicCache]:
    """Pad prompts after their common prefix, with each row's own first token, which a repetition
    penalty counts anyway; return ids (n, P), mask (n, P), and a KV cache that has the prefix.
    """
    longest, rows, masks = max(map(len, prompts)), list[list[int]](), list[list[int]]()
    # The last token stays out of the prefix, as generate needs one to start from.
    same = len(commonprefix([ids[:-1] for ids in prompts]))
    for row in prompts:
        gap = longest - len(row)
        rows.append(row[:same] + row[:1] * gap + row[same:])
        masks.append([1] * same + [0] * gap + [1] * (len(row) - same))
    ids, mask = (torch.tensor(x, device=model.device) for x in (rows, masks))
    cache = DynamicCache(config=model.config)
    if same > 0:
        model(  # FSDP requires a call of the root module, not of its decoder.
            input_ids=ids[:1, :same], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache.batch_repeat_interleave(len(ids))
    return ids, mask, cache


def run_generate(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: DynamicCache,
    config: dict[str, Any],
    **options: Any,
) -> Any:
    """Call transformers' generate; its processors, given as options, decide the tokens."""
    fixed = {"do_sample": False, "return_dict_in_generate": True, "use_cache": True}
    return model.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        past_key_values=cache,
        generation_config=GenerationConfig(**fixed, **config),
        synced_gpus=False,  # Under FSDP, ranks would wait for each other's segments.
        **options,
    )


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
        ids, mask, cache = pad_prompts(model, rows)
        config = {"max_length": ids.shape[1] + 2, "pad_token_id": 0, "output_logits": True}
        forced = {"prefix_allowed_tokens_fn": lambda row, ids: tokens[3:4]}
        output = run_generate(model, ids, mask, cache, config, **forced)
        found = wide(torch.stack(output.logits, 1))
        ends = [torch.tensor([[*row, tokens[3]]], device=model.device) for row in rows]
        logits = [model(input_ids=row, use_cache=False).logits[0, -2:] for row in ends]
        alone = wide(torch.stack(logits))
    errors = (found - alone).norm(dim=-1) / alone.norm(dim=-1)
    longer, shorter = errors[:2].max().item(), errors[2].max().item()
    eps = torch.finfo(dtype if dtype in HALF else torch.float32).eps  # of generate's logits
    if not longer <= eps**0.5:
        why = f"{type(model).__name__}'s completions depend on what is sampled beside them"
        error = f"logits differ by {longer:.2g} of their size"
        raise TypeError(f"model: {why} ({error}); this architecture is not supported")
    # Unpadded rows may happen to agree exactly; a few operations' rounding, 8 eps, is always fine.
    PADS[model] = shorter <= 4 * max(longer, 8 * eps)
    return PADS[model]


def can_pad(model: PreTrainedModel, longest: int) -> bool:
    """Return True if rows of unequal length, up to `longest` tokens, can share a batch."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if not kinds <= {DynamicLayer, DUMMY_LAYER}:  # A sliding window counts padding.
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
