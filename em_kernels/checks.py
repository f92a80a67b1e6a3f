"""Checks of values, which only the device knows: all in one transfer."""

import torch
from torch import Tensor

from . import reference


def check_values(
    mask: Tensor | None,
    temperature: float | Tensor,
    targets: Tensor | None,
    vocab_size: int,
    negative_mask_allowed: bool,
) -> Tensor | None:
    """Raise ValueError for values out of range; return the indices of the tokens of weight != 0
    (None: all).

    Everything that needs the device's answer is asked in one transfer.
    """
    questions: dict[str, Tensor] = {}
    if mask is not None:
        questions["count"] = mask.count_nonzero()
        if mask.is_floating_point():
            low = -torch.inf if negative_mask_allowed else 0
            questions["mask"] = (~((mask >= low) & mask.isfinite())).sum()
        elif mask.dtype != torch.bool and not negative_mask_allowed:
            questions["mask"] = (mask < 0).sum()
    if isinstance(temperature, Tensor):
        questions["temperature"] = (~((temperature > 0) & temperature.isfinite())).sum()
    if targets is not None:
        in_range = (targets >= 0) & (targets < vocab_size)
        questions["targets"] = (~(in_range | (targets == reference.IGNORE_INDEX))).sum()
    if not questions:
        return None
    answers = dict(zip(questions, torch.stack(list(questions.values())).tolist(), strict=True))
    remedy = {
        "mask": "weights must be finite, and with reduction='mean' not negative",
        "temperature": "must be finite and > 0",
        "targets": f"must be in [0, {vocab_size}), or {reference.IGNORE_INDEX} to be ignored",
    }
    for name, text in remedy.items():
        if answers.get(name):
            raise ValueError(f"{name}: {answers[name]} values out of range; they {text}")
    if mask is None or answers["count"] == mask.numel():
        return None
    return torch.nonzero_static(mask, size=answers["count"])[:, 0]
