"""Checks of arguments, each error naming the argument and the remedy."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.distributed import ProcessGroup

from .. import reference

LEAST, MOST = 1e-37, 1e37  # fp32 holds any scale between them, and its inverse
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_DTYPES = (*DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_values(
    mask: Tensor | None,
    temperature: float | Tensor,
    targets: Tensor | None,
    vocab_size: int,
    negative_mask_allowed: bool,
) -> Tensor | None:
    """Check the values of mask, temperature and targets; return the active tokens.

    These are the indices of the tokens of weight != 0, or None where that is all. All counts come
    from the device in one transfer.

    Raises: ValueError for values out of range.
    """
    counts: dict[str, Tensor] = {}
    if mask is not None:
        counts["active"] = mask.count_nonzero()
        if mask.is_floating_point():
            low = -torch.inf if negative_mask_allowed else 0
            counts["mask"] = (~((mask >= low) & mask.isfinite())).sum()
        elif mask.dtype != torch.bool and not negative_mask_allowed:
            counts["mask"] = (mask < 0).sum()
    if isinstance(temperature, Tensor):
        # fp16 would round LEAST to 0.
        wide = temperature.to(torch.promote_types(temperature.dtype, torch.float32))
        counts["temperature"] = (~((wide >= LEAST) & (wide <= MOST))).sum()
    if targets is not None:
        in_range = (targets >= 0) & (targets < vocab_size)
        counts["targets"] = (~(in_range | (targets == reference.IGNORE_INDEX))).sum()
    if not counts:
        return None
    found = dict(zip(counts, torch.stack(list(counts.values())).tolist(), strict=True))
    expected = {
        "mask": "must be finite"
        + ("" if negative_mask_allowed else ", and for a mean not negative"),
        "temperature": f"must be > 0 and finite, between {LEAST:g} and {MOST:g}",
        "targets": f"must be in [0, {vocab_size}), or {reference.IGNORE_INDEX} to be ignored",
    }
    for name, text in expected.items():
        if found.get(name):
            raise ValueError(f"{name}: {found[name]} values out of range; they {text}")
    if mask is None or found["active"] == mask.numel():
        return None
    return torch.nonzero_static(mask, size=found["active"])[:, 0]


def check_float(name: str, x: Tensor) -> None:
    """Check that x is a plain tensor of a supported dtype, in no forward mode or torch.func."""
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
    """Refuse forward-mode tangents and torch.func's transforms, whose gradients would be lost."""
    if unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{name}: has a forward-mode tangent, which would be lost; use em_kernels.reference"
        )
    # vmap hides that a tensor requires grad, and torch.func.grad cannot enter the ops.
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise RuntimeError(
            f"{name}: is within a transform of torch.func (grad, vmap or another), which is not "
            "supported; use torch.autograd.grad, or em_kernels.reference"
        )


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = ""
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check hidden, weight and bias; return them in one dtype, autocast's where it is on.

    prefix: of their names in errors.
    """
    check_float(f"{prefix}hidden", hidden)
    check_float(f"{prefix}weight", weight)
    if hidden.dim() < 1:
        raise ValueError(f"{prefix}hidden: expected (..., D), got a scalar")
    if weight.dim() != 2:
        raise ValueError(f"{prefix}weight: expected (V, D), got {tuple(weight.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight: expected (V, {hidden.shape[-1]}) to match {prefix}hidden "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"{prefix}weight: is empty: {tuple(weight.shape)}")
    if bias is not None:
        check_float(f"{prefix}bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{prefix}bias: expected ({len(weight)},), got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{prefix}{name}: is on {x.device}, {prefix}hidden on {hidden.device}; move one"
            )
    device_type = hidden.device.type
    casts = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    if casts and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{prefix}{name}: is {x.dtype}, {prefix}hidden {hidden.dtype}; cast one, or use "
                "autocast"
            )
    return hidden, weight, bias


def check_per_token(name: str, x: Tensor, rows: Tensor) -> None:
    """Check that x holds one value per row of `rows` (..., any), on their device, without grad."""
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


def check_scale_and_cap(
    logit_scale: float, softcap: float | None, prefix: str = ""
) -> tuple[float, float]:
    """Return scale and cap, 0 for none; prefix is of their names in errors."""
    scale, cap = check_number(f"{prefix}logit_scale", logit_scale), 0.0
    if not LEAST <= abs(scale) <= MOST:
        raise ValueError(
            f"{prefix}logit_scale: {logit_scale} is 0 in fp32, or not finite; 1 leaves the logits "
            "unscaled"
        )
    if softcap is not None:
        cap = check_number(f"{prefix}softcap", softcap)
        if not LEAST <= cap <= MOST:
            raise ValueError(
                f"{prefix}softcap: {softcap} is not > 0 and finite in fp32; use None for no cap"
            )
    return scale, cap


def check_transform(
    temperature: float | Tensor, logit_scale: float, softcap: float | None, rows: Tensor
) -> tuple[Tensor | None, list[float]]:
    """Check temperature, scale and cap; return HeadArguments' temperatures and transform."""
    scale_and_cap = check_scale_and_cap(logit_scale, softcap)
    if isinstance(temperature, Tensor):
        if temperature.dim() == 0:
            temperature = temperature.expand(rows.shape[:-1])
        check_per_token("temperature", temperature, rows)
        if not temperature.is_floating_point():
            raise TypeError(f"temperature: expected a floating dtype, got {temperature.dtype}")
        return temperature.reshape(-1), [*scale_and_cap, 1.0]
    if not isinstance(temperature, Real) or isinstance(temperature, bool):
        kind = type(temperature).__name__
        raise TypeError(f"temperature: expected a number or a tensor, got {kind}")
    tau = float(temperature)
    if not LEAST <= tau <= MOST:
        raise ValueError(
            f"temperature: {temperature} is not > 0 and finite, between {LEAST:g} and {MOST:g}"
        )
    return None, [*scale_and_cap, tau]


def check_mask(mask: Tensor | None, hidden: Tensor) -> None:
    if mask is None:
        return
    check_per_token("mask", mask, hidden)
    if mask.dtype not in MASK_DTYPES:
        raise TypeError(f"mask: expected bool, int or float, got {mask.dtype}")


def check_targets(targets: Tensor | None, hidden: Tensor) -> None:
    if targets is None:
        return
    if isinstance(targets, Tensor) and targets.dim() == hidden.dim():  # several a token
        hidden = hidden[..., None, :].expand(*hidden.shape[:-1], targets.shape[-1], -1)
    check_per_token("targets", targets, hidden)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}; pass targets.long()")


def check_top_k(top_k: int | None) -> int:
    """Return how many of the largest entries are asked for; the op knows how many there are."""
    if top_k is None:
        return 0
    if not isinstance(top_k, Integral) or isinstance(top_k, bool):
        raise TypeError(f"top_k: expected an int, got {type(top_k).__name__}")
    if top_k < 1:
        raise ValueError(f"top_k: {top_k} is not > 0; leave it out for none")
    return int(top_k)


def check_support(
    support: tuple[Tensor, Tensor] | None, hidden: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Check shapes, dtypes and devices; the op checks the values."""
    if support is None:
        return None, None
    if not isinstance(support, Sequence) or len(support) != 2:
        raise TypeError("support: expected (indices, offsets), two tensors")
    tokens = hidden.shape[:-1].numel()
    for name, x in zip(("indices", "offsets"), support, strict=True):
        if not isinstance(x, Tensor) or x.dtype != torch.int64 or x.dim() != 1:
            found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"support: its {name} must be an int64 tensor of one dimension, not {found}"
            )
        if x.device != hidden.device:
            raise ValueError(f"support: its {name} are on {x.device}, hidden on {hidden.device}")
    if len(support[1]) != tokens + 1:
        raise ValueError(
            f"support: expected {tokens + 1} offsets, one more than tokens, got {len(support[1])}"
        )
    return support[0], support[1]


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


class HeadArguments(NamedTuple):
    """Checked arguments of a call, in the form that the ops take."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor | None  # (N,), or (N, K) for several a token
    mask: Tensor | None  # (N,)
    temperatures: Tensor | None  # (N,), where there is one per token
    transform: list[float]  # logit_scale, softcap (0: none), temperature (1 if per token)
    chunk_bytes: int | None
    group: str | None  # the process group's name


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    mask: Tensor | None,
    transform: tuple[float | Tensor, float, float | None],
    chunk_bytes: int | None,
    process_group: ProcessGroup | None,
) -> HeadArguments:
    """Check the arguments that all functions of a head share.

    Args:
        transform: (temperature, logit_scale, softcap).
        others: as in fused_token_stats.
    """
    hidden, weight, bias = check_head(hidden, weight, bias)
    temperatures, scalars = check_transform(*transform, hidden)
    check_mask(mask, hidden)
    check_targets(targets, hidden)
    if targets is not None:
        targets = targets.reshape(hidden.shape[:-1].numel(), *targets.shape[hidden.dim() - 1 :])
    return HeadArguments(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets,
        None if mask is None else mask.reshape(-1),
        temperatures,
        scalars,
        check_chunk(chunk_bytes),
        check_group(process_group),
    )
