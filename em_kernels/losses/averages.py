"""Shared by the losses: values per token, weighted sums over them, and checks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import fused_token_loss, fused_token_stats
from ..ops.checks import check_float, check_mask, check_number, check_per_token
from ..reference import TokenStats

HEAD_ARGUMENTS = (
    "bias",
    "temperature",
    "logit_scale",
    "softcap",
    "grad_tolerance",
    "chunk_bytes",
    "process_group",
)
# (statistics of n tokens, their index among all) -> losses (n,), values (n,) to be averaged
LossFn = Callable[[TokenStats, Any], tuple[Tensor, dict[str, Tensor]]]


def check_head_arguments(function: str, head: dict[str, Any], *more: str) -> None:
    """Check that a loss's other arguments are those of the head, or some more of its own."""
    for name in head:
        if name not in (*HEAD_ARGUMENTS, *more):
            known = ", ".join((*HEAD_ARGUMENTS, *more))
            raise TypeError(
                f"{name}: {function} has no such argument; beside those in its docstring it takes "
                f"{known}"
            )


def zeros_to_one(count: Tensor) -> Tensor:
    """Return a divisor that leaves a sum of nothing 0."""
    return torch.where(count == 0, 1, count)


def wide_weights(mask: Tensor, hidden: Tensor) -> Tensor:
    """Return the mask in the dtype of the loss."""
    check_per_token("mask", mask, hidden)
    check_mask(mask, hidden)
    return mask.to(torch.promote_types(hidden.dtype, torch.float32))


def count_tensor(name: str, count: float | Tensor | None, like: Tensor) -> Tensor:
    """Return a count that the caller gives, a number or a tensor, as a () tensor like `like`."""
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.requires_grad:
            raise ValueError(
                f"{name}: expected one number without grad, got {tuple(count.shape)}"
                + (", which requires grad" if count.requires_grad else "")
            )
        return zeros_to_one(count.reshape(()).to(like))
    if count is None or not check_number(name, count) > 0:
        raise ValueError(f"{name}: is {count}; this loss needs a number > 0")
    return like.new_tensor(float(count))


def per_token(
    hidden: Tensor, mask: Tensor, fill: bool, **given: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Check values per token or completion; return them flat, and the mask as weights (..., T).

    With fill they are 0 where the mask is.
    """
    check_float("hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(f"hidden: expected (..., T, D), got {tuple(hidden.shape)}")
    weights = wide_weights(mask, hidden)
    flat = {}
    for name, x in given.items():
        if x is None and name not in ("targets", "advantages"):
            continue
        per_completion = name in ("advantages", "importance_weights")
        if per_completion and isinstance(x, Tensor) and x.shape == hidden.shape[:-2]:
            x = x[..., None].expand(hidden.shape[:-1])
        elif per_completion and isinstance(x, Tensor) and x.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{name}: expected exactly {tuple(hidden.shape[:-2])}, one per completion, or "
                f"{tuple(hidden.shape[:-1])}, one per token, got {tuple(x.shape)}"
            )
        check_per_token(name, x, hidden)  # type: ignore[arg-type]
        assert x is not None
        if name != "targets":  # of ints, and of the fp64 that numpy gives
            x = x.to(weights.dtype)
        flat[name] = (x.masked_fill(weights == 0, 0) if fill else x).reshape(-1)
    return flat, weights


def sum_losses(
    loss_fn: LossFn,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    divisor: Tensor,
    *,
    needs_all: bool,
    **head: Any,
) -> Any:
    """Sum the weighted losses over the divisor, chunk by chunk or, with needs_all, all at once.

    Where loss_fn returns values they are averaged over the tokens, and returned beside the sum.
    """
    mask = weights / divisor
    if needs_all:
        head.pop("grad_tolerance", None)
        names = ("entropy", "logprob")
        stats = fused_token_stats(hidden, weight, targets, stats=names, mask=mask, **head)
        flat = TokenStats(*(None if x is None else x.reshape(-1) for x in stats))
        losses, values = loss_fn(flat, slice(None))
        loss = (mask.reshape(-1) * losses).sum()
    else:
        head.pop("support", None)
        loss, _, *found = fused_token_loss(
            hidden, weight, targets, loss_fn, mask=mask, return_stats=(), **head
        )
        values = found[0] if found else {}
    if not values:
        return loss
    shares = weights.reshape(-1) / zeros_to_one(weights.sum())
    return loss, {name: (shares * x.detach().reshape(-1)).sum() for name, x in values.items()}


def clip_shares(ratio: Tensor, advantage: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Return which tokens get no gradient as their ratio is beyond 1 - low or 1 + high."""
    return {
        "clip_low": (ratio < 1 - low) & (advantage < 0),
        "clip_high": (ratio > 1 + high) & (advantage > 0),
    }
