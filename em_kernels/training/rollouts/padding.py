"""Rows that are sampled side by side: padded behind what they have in common; and whether a model
gives each what it would give it alone, measured on the model itself.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os.path import commonprefix
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from ...hf import decoder_of, takes

HALF = (torch.bfloat16, torch.float16)
PADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # what was measured of a model


def check_cache(model: PreTrainedModel) -> None:
    """Raises: TypeError where rows of the model's cache cannot be repeated and dropped."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}:
        raise TypeError(
            f"model: {type(model).__name__} keeps a {kind.__name__}; only attention is supported"
        )
    if not takes(decoder_of(model), "past_key_values", "use_cache"):
        raise TypeError(
            f"model: {type(model).__name__} takes no keys and values of earlier tokens; this "
            "architecture is not supported"
        )


@contextmanager
def ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, in which the KV cache is allowed, and nothing inherited from the model's
    generation_config.
    """
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


def padded(prompts: Sequence[list[int]]) -> tuple[int, Tensor, Tensor]:
    """Length of the rows' common prefix, and ids and attention mask (n, P) with the padding behind
    that prefix: each row's own first token, which a repetition penalty has met anyway.
    """
    longest, rows, mask = max(map(len, prompts)), list[list[int]](), list[list[int]]()
    same = len(commonprefix([ids[:-1] for ids in prompts]))  # generate wants a token to start from
    for ids in prompts:
        gap = longest - len(ids)
        rows.append(ids[:same] + ids[:1] * gap + ids[same:])
        mask.append([1] * same + [0] * gap + [1] * (len(ids) - same))
    return same, torch.tensor(rows), torch.tensor(mask)


def prefilled(model: PreTrainedModel, ids: Tensor, same: int) -> DynamicCache:
    """The cache of rows (n, P) that begin with so many common tokens, which are computed once."""
    cache = DynamicCache(config=model.config)
    if same > 0:
        model(  # not its decoder: FSDP wants the root module
            input_ids=ids[:1, :same], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache.batch_repeat_interleave(len(ids))
    return cache


class _Only(LogitsProcessor):
    """Leaves one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(
            1, torch.tensor([self.token], device=scores.device), 0
        )


def _side_by_side(model: PreTrainedModel, rows: Sequence[list[int]], token: int) -> Tensor:
    """Logits (n, 2, V) of what comes next, and after a token then, as sampling.py gets them."""
    same, ids, mask = padded(rows)
    ids, mask = ids.to(model.device), mask.to(model.device)
    output = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        past_key_values=prefilled(model, ids, same),
        generation_config=GenerationConfig(
            do_sample=False,
            max_length=ids.shape[1] + 2,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            use_cache=True,
        ),
        logits_processor=LogitsProcessorList([_Only(token)]),
        synced_gpus=False,
    )
    return wide(torch.stack(output.logits, 1))


def _alone(model: PreTrainedModel, row: list[int], token: int) -> Tensor:
    """The same (2, V) of one row, without a cache."""
    ids = torch.tensor([[*row, token]], device=model.device)
    return wide(model(input_ids=ids, use_cache=False).logits[0, -2:])


@torch.no_grad()
def check_sampling(model: PreTrainedModel) -> bool:
    """Measure whether rows of unequal length can be sampled side by side, as sampling.py pads them:
    in fp32, a shorter row's logits must be no further from those of that row alone than 4 times the
    distance of two longer rows, which rounding alone moves. Remembered for :func:`can_pad`.

    Raises: TypeError where the longer rows' too differ from those alone, by more than rounding.
    """
    words = model.config.get_text_config().vocab_size
    tokens = [(17 * i + 5) % words for i in range(24)]
    rows = [tokens[:5] + tokens[start:end] for start, end in ((5, 14), (9, 18), (18, 22))]
    with ready_to_generate(model), in_fp32(model) as dtype:
        found = _side_by_side(model, rows, tokens[3])
        alone = torch.stack([_alone(model, row, tokens[3]) for row in rows])
    errors = (found - alone).norm(dim=-1) / alone.norm(dim=-1)
    longer, shorter = errors[:2].max().item(), errors[2].max().item()
    eps = torch.finfo(dtype if dtype in HALF else torch.float32).eps  # as generate keeps logits
    if not longer <= eps**0.5:
        raise TypeError(
            f"model: {type(model).__name__}'s completions depend on what is sampled beside them "
            f"(logits differ by {longer:.2g} of their size); this architecture is not supported"
        )
    # where rounding happens to move nothing, that of a few operations is nothing too
    PADS[model] = shorter <= 4 * max(longer, 8 * eps)
    return PADS[model]


def can_pad(model: PreTrainedModel, longest: int) -> bool:
    """True if rows of unequal length, up to `longest` tokens, can be sampled side by side."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if not kinds <= {DynamicLayer, DummyLayer}:  # a sliding window would count the padding in
        return False
    settings = model.config.get_text_config().to_dict().items()
    windows = [v for name, v in settings if re.search(r"(^|_)window(_size)?$", name)]
    if any(isinstance(size, int) and 0 < size < longest for size in windows):  # as GPT-Neo's
        return False
    return PADS[model] if model in PADS else check_sampling(model)


@contextmanager
def in_fp32(model: PreTrainedModel) -> Iterator[torch.dtype]:
    """While it lasts the model's modules compute in fp32, at least: each with its weights widened
    for as long as its forward runs. Gives the dtype; that of a quantised model is its own.

    Memory: the largest module's weights in fp32.
    """
    if model.dtype not in HALF:
        yield model.dtype
        return
    if getattr(model, "hf_quantizer", None) is not None:  # its layers keep the first input's dtype
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
        if any(is_half(p) for p in module._parameters.values()):
            hooks.append(module.register_forward_pre_hook(widen, with_kwargs=True))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield torch.float32
    finally:
        for hook in hooks:
            hook.remove()


def wide(x: Tensor) -> Tensor:
    return x.float() if is_half(x) else x


def is_half(x: Tensor | None) -> bool:
    return x is not None and x.dtype in HALF
