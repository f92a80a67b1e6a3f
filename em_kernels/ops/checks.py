"""Checks of arguments, each error naming the argument and the remedy."""

from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.distributed import ProcessGroup

from .. import reference

LEAST, MOST = 1e-37, 1e37  # of a scale and its inverse in fp32
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_DTYPES = (*DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
        least = torch.promote_types(temperature.dtype, torch.float32)  # fp16 rounds LEAST to 0
        wide = temperature.to(least)
        questions["temperature"] = (~((wide >= LEAST) & (wide <= MOST))).sum()
    if targets is not None:
        in_range = (targets >= 0) & (targets < vocab_size)
        questions["targets"] = (~(in_range | (targets == reference.IGNORE_INDEX))).sum()
    if not questions:
        return None
    answers = dict(zip(questions, torch.stack(list(questions.values())).tolist(), strict=True))
    remedy = {
        "mask": "must be finite"
        + ("" if negative_mask_allowed else ", and for a mean not negative"),
        "temperature": f"must be > 0 and finite, between {LEAST:g} and {MOST:g}",
        "targets": f"must be in [0, {vocab_size}), or {reference.IGNORE_INDEX} to be ignored",
    }
    for name, text in remedy.items():
        if answers.get(name):
            raise ValueError(f"{name}: {answers[name]} values out of range; they {text}")
    if mask is None or answers["count"] == mask.numel():
        return None
    return torch.nonzero_static(mask, size=answers["count"])[:, 0]


def check_float(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name}: is a DTensor; pass {name}.full_tensor(), or .to_local() of each rank's rows"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: dtype {x.dtype} is not supported; use fp32, bf16, fp16 or fp64")
    check_tangent(name, x)


def check_tangent(name: str, x: Tensor) -> None:
    if unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{name}: has a forward-mode tangent, which would be lost; use em_kernels.reference"
        )


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden, weight and bias in one dtype: autocast's where it is on."""
    check_float("hidden", hidden)
    check_float("weight", weight)
    if hidden.dim() < 1:
        raise ValueError("hidden: expected (..., D), got a scalar")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected (V, D), got {tuple(weight.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected (V, {hidden.shape[-1]}) to match hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"weight: is empty: {tuple(weight.shape)}")
    if bias is not None:
        check_float("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected ({len(weight)},), got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{name}: is on {x.device}, hidden on {hidden.device}; move one of them"
            )
    device_type = hidden.device.type
    casts = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    if casts and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: is {x.dtype}, hidden {hidden.dtype}; cast one, or use autocast"
            )
    return hidden, weight, bias


def check_per_token(name: str, x: Tensor, rows: Tensor) -> None:
    """x holds one value for each of the rows (..., any), on their device, without grad."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.shape != rows.shape[:-1]:
        raise ValueError(f"{name}: expected exactly {tuple(rows.shape[:-1])}, got {tuple(x.shape)}")
    if x.device != rows.device:
        raise ValueError(f"{name}: is on {x.device}, expected {rows.device}")
    if x.requires_grad:
        raise ValueError(f"{name}: must not require grad; pass {name}.detach()")
    check_tangent(name, x)


def check_number(name: str, x: float) -> float:
    if not isinstance(x, Real):  # a 0-dim tensor would silently lose its gradient
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    return float(x)


def check_tolerance(grad_tolerance: float) -> float:
    tolerance = check_number("grad_tolerance", grad_tolerance)
    if not 0 <= tolerance < 1:
        raise ValueError(f"grad_tolerance: {grad_tolerance} is not in [0, 1)")
    return tolerance


def check_transform(
    temperature: float | Tensor, logit_scale: float, softcap: float | None, rows: Tensor
) -> tuple[Tensor | None, list[float]]:
    """Temperatures per row or None, and (logit_scale, softcap or 0, temperature)."""
    scale = check_number("logit_scale", logit_scale)
    if not LEAST <= abs(scale) <= MOST:
        raise ValueError(f"logit_scale: {logit_scale} is not a finite number other than 0 in fp32")
    cap = 0.0
    if softcap is not None:
        cap = check_number("softcap", softcap)
        if not LEAST <= cap <= MOST:
            raise ValueError(f"softcap: {softcap} is not > 0 and finite in fp32; None is no cap")
    if isinstance(temperature, Tensor):
        if temperature.dim() == 0:
            temperature = temperature.expand(rows.shape[:-1])
        check_per_token("temperature", temperature, rows)
        if not temperature.is_floating_point():
            raise TypeError(f"temperature: expected a floating dtype, got {temperature.dtype}")
        return temperature.reshape(-1), [scale, cap, 1.0]
    tau = check_number("temperature", temperature)
    if not LEAST <= tau <= MOST:
        raise ValueError(
            f"temperature: {temperature} is not > 0 and finite, between {LEAST:g} and {MOST:g}"
        )
    return None, [scale, cap, tau]


def check_mask(mask: Tensor | None, hidden: Tensor) -> None:
    if mask is None:
        return
    check_per_token("mask", mask, hidden)
    if mask.dtype not in MASK_DTYPES:
        raise TypeError(f"mask: expected bool, int or float, got {mask.dtype}")


def check_targets(targets: Tensor | None, hidden: Tensor) -> None:
    if targets is None:
        return
    check_per_token("targets", targets, hidden)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")


def check_chunk(chunk_bytes: int | None) -> int | None:
    if chunk_bytes is None:
        return None
    if not isinstance(chunk_bytes, Integral) or isinstance(chunk_bytes, bool):
        raise TypeError(f"chunk_bytes: expected an int, got {type(chunk_bytes).__name__}")
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: {chunk_bytes} is not > 0")
    return int(chunk_bytes)


def check_group(process_group: ProcessGroup | None) -> str | None:
    if process_group is None:
        return None
    if not isinstance(process_group, ProcessGroup):
        raise TypeError(
            f"process_group: expected a ProcessGroup, got {type(process_group).__name__}"
        )
    return process_group.group_name


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    mask: Tensor | None,
    transform: tuple[float | Tensor, float, float | None],
    chunk_bytes: int | None,
    process_group: ProcessGroup | None,
) -> list:
    """All of them checked, and as the ops take them."""
    hidden, weight, bias = check_head(hidden, weight, bias)
    temperatures, scalars = check_transform(*transform, hidden)
    check_mask(mask, hidden)
    check_targets(targets, hidden)
    return [
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        None if targets is None else targets.reshape(-1),
        None if mask is None else mask.reshape(-1),
        temperatures,
        scalars,
        check_chunk(chunk_bytes),
        check_group(process_group),
    ]
