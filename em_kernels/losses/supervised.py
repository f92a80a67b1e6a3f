"""Losses on given tokens: cross-entropy, and two that weigh it by the model's own certainty."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import REDUCTIONS, fused_token_loss, fused_token_stats
from ..ops.checks import check_float, check_number, check_per_token, check_top_k
from ..reference import IGNORE_INDEX, TokenStats
from .averages import check_head_arguments, count_tensor, wide_weights, zeros_to_one


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weights: Tensor | None = None,
    **others: Any,
) -> Any:
    """Compute the cross-entropy of the next-token distributions with given tokens.

    Equivalent to this, with targets of ignore_index left out::

        logits = F.linear(hidden, weight).float()
        losses = F.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing,
            reduction="none"
        )
        losses = losses + z_loss * logits.logsumexp(-1).flatten() ** 2
        weights = (mask * class_weights[targets]).flatten()
        loss = (weights * losses).sum() / weights.sum()

    With the entropy and the token accuracy, from the same pass::

        loss, stats = cross_entropy(
            hidden, weight, labels, return_stats=("entropy", "argmax"), ignore_index=-100
        )
        accuracy = (stats.argmax == labels)[labels != -100].float().mean()

    Args:
        hidden: (..., D).
        weight: (V, D) of the output head.
        targets: (...) of any integer dtype, each in [0, V) or ignore_index.
        label_smoothing: in [0, 1]: share of the target distribution spread evenly over the
            vocabulary. Not together with class_weights.
        z_loss: weight of logsumexp squared; PaLM takes 1e-4.
        class_weights: (V,) weight of each target, of the whole vocabulary if that is split.
        mask: (...) weight of each target.
        ignore_index: target of tokens that are left out, any int, -100 by default.
        shift: whether hidden state t, of (..., T, D), scores target t + 1. targets and mask are
            shifted, not hidden; statistics returned stay at their hidden states.
        num_items_in_batch: a number or tensor (); divides the sum, in place of this call's weights.
        reduction: "mean", "sum", or "none" for (...), weighted.
        return_stats: names of statistics to return, detached, as in :func:`fused_token_loss`.
        others: bias, temperature, logit_scale, softcap, grad_tolerance, chunk_bytes and
            process_group, as in :func:`fused_token_loss`.

    Returns:
        The loss, fp32 (fp64 for fp64), 0 where nothing counts; with return_stats (loss,
        TokenStats).

    Gradient, precision, memory: as in :func:`fused_token_loss`, which is called once; for "none"
        as in :func:`fused_token_stats`.
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward.
    Source: torch.nn.functional.cross_entropy; z-loss of PaLM, arXiv 2204.02311, section 5.
    """
    if not 0 <= check_number("label_smoothing", label_smoothing) <= 1:
        raise ValueError(f"label_smoothing: {label_smoothing} is not in [0, 1]")
    z_loss = check_number("z_loss", z_loss)
    if class_weights is not None and label_smoothing > 0:
        raise ValueError(
            "label_smoothing: not together with class_weights, which would need a weighted sum of "
            "the logits; give one of them"
        )
    stats = ["logprob"]
    if label_smoothing > 0 or z_loss != 0:
        stats.append("logsumexp")
    if label_smoothing > 0:
        stats.append("mean_logit")

    def loss_fn(stats: TokenStats, index: Any) -> Tensor:
        assert stats.logprob is not None
        losses = -stats.logprob
        if label_smoothing > 0:
            assert stats.logsumexp is not None and stats.mean_logit is not None
            even = stats.logsumexp - stats.mean_logit
            losses = (1 - label_smoothing) * losses + label_smoothing * even
        if z_loss != 0:
            assert stats.logsumexp is not None
            losses = losses + z_loss * stats.logsumexp**2
        return losses

    others["class_weights"] = class_weights
    return _average("cross_entropy", loss_fn, stats, hidden, weight, targets, **others)


def dft_loss(hidden: Tensor, weight: Tensor, targets: Tensor, **others: Any) -> Any:
    """Compute dynamic fine-tuning's loss: cross-entropy, weighted by the token's probability.

    Equivalent to::

        logprob = F.linear(hidden, weight).float().log_softmax(-1).gather(-1, targets[..., None])
        loss = -(logprob.exp().detach() * logprob).mean()

    Args:
        hidden, weight, targets: as in :func:`cross_entropy`.
        others: class_weights, mask, ignore_index, shift, num_items_in_batch, reduction,
            return_stats and those of the head, as in :func:`cross_entropy`.

    Returns, gradient, precision, memory, raises: as in :func:`cross_entropy`.
    Source: DFT, arXiv 2508.05629.
    """

    def loss_fn(stats: TokenStats, index: Any) -> Tensor:
        assert stats.logprob is not None
        return -(stats.logprob.exp().detach() * stats.logprob)

    return _average("dft_loss", loss_fn, ["logprob"], hidden, weight, targets, **others)


def eaft_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    top_k: int = 20,
    **others: Any,
) -> Any:
    """Compute entropy-adaptive fine-tuning's loss: cross-entropy, gated by the model's entropy.

    Where the model is certain, and the target says otherwise, nearly nothing is learnt. Equivalent
    to::

        logits = F.linear(hidden, weight).float()
        top = logits.topk(top_k).values.log_softmax(-1)
        entropy = -(top.exp() * top).sum(-1)
        gate = (entropy.detach() / math.log(top_k)) ** alpha
        logprob = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        loss = -(gate * logprob).mean()

    Args:
        hidden, weight, targets: as in :func:`cross_entropy`.
        alpha: power of the gate, >= 0; 0 is cross-entropy.
        top_k: > 1, how many of the likeliest tokens the gate's entropy is of.
        others: class_weights, mask, ignore_index, shift, num_items_in_batch, reduction,
            return_stats and those of the head, as in :func:`cross_entropy`.

    Returns, gradient, precision, memory, raises: as in :func:`cross_entropy`.
    Source: EAFT, arXiv 2601.02151, with its alpha and top_k.
    """
    if not check_number("alpha", alpha) >= 0:
        raise ValueError(f"alpha: {alpha} is not >= 0")
    if check_top_k(top_k) < 2:
        raise ValueError(f"top_k: {top_k} is not > 1")

    def loss_fn(stats: TokenStats, index: Any) -> Tensor:
        assert stats.logprob is not None and stats.top_logprobs is not None
        entropy = torch.special.entr(stats.top_logprobs.detach().softmax(-1)).sum(-1)
        gate = (entropy / math.log(top_k)).clamp(0, 1) ** alpha
        return -(gate * stats.logprob)

    others["top_k"] = top_k
    return _average("eaft_loss", loss_fn, ["logprob"], hidden, weight, targets, **others)


def _average(
    function: str,
    loss_fn: Callable[[TokenStats, Any], Tensor],
    stats: Sequence[str],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: bool = False,
    num_items_in_batch: float | Tensor | None = None,
    reduction: str = "mean",
    return_stats: Sequence[str] | None = None,
    top_k: int | None = None,
    **head: Any,
) -> Any:
    """Reduce loss_fn's losses, which need `stats`, over the targets that count."""
    check_head_arguments(function, head)
    head["top_k"] = top_k
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is unknown; use one of {', '.join(REDUCTIONS)}")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f'num_items_in_batch: is for reduction="mean", got {reduction!r}')
    targets, weights = _weigh(hidden, targets, mask, ignore_index, shift)
    if class_weights is not None:
        entries = None if head.get("process_group") is not None else len(weight)
        weights = weights * _class_weights(class_weights, entries, hidden)[
            targets.clamp(0, len(class_weights) - 1)
        ].to(weights.dtype)
    if reduction == "none":
        head.pop("grad_tolerance", None)  # losses per token are exact, as fused_entropy_loss's
        names = [*dict.fromkeys((*stats, *(return_stats or ())))]
        found = fused_token_stats(hidden, weight, targets, stats=names, mask=weights, **head)
        losses = weights * loss_fn(found, ...)
        if return_stats is None:
            return losses
        return losses, TokenStats(**{name: getattr(found, name).detach() for name in return_stats})
    if num_items_in_batch is not None:
        weights = weights / count_tensor("num_items_in_batch", num_items_in_batch, weights)
    elif reduction == "mean":
        weights = weights / zeros_to_one(weights.sum())
    return fused_token_loss(
        hidden, weight, targets, loss_fn, mask=weights, return_stats=return_stats, **head
    )


def _weigh(
    hidden: Tensor, targets: Tensor, mask: Tensor | None, ignore_index: int, shift: bool
) -> tuple[Tensor, Tensor]:
    """Return targets with -100 where they are ignored, and the weight of each."""
    check_float("hidden", hidden)
    check_per_token("targets", targets, hidden)
    if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
        raise TypeError(f"targets: expected integers, got {targets.dtype}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    targets = targets.long()
    weights = wide_weights(torch.ones_like(targets) if mask is None else mask, hidden)
    if shift:
        if hidden.dim() < 2:
            raise ValueError(f"shift: needs hidden (..., T, D), got {tuple(hidden.shape)}")
        targets, weights = targets.roll(-1, -1), weights.roll(-1, -1)
        weights[..., -1:] = 0
    ignored = targets == ignore_index
    # -100 where another number is ignored is out of range; -1 is in every case.
    others = targets.masked_fill(targets == IGNORE_INDEX, -1)
    return torch.where(ignored, IGNORE_INDEX, others), weights.masked_fill(ignored, 0)


def _class_weights(class_weights: Tensor, entries: int | None, hidden: Tensor) -> Tensor:
    check_float("class_weights", class_weights)
    if class_weights.dim() != 1 or entries not in (None, len(class_weights)):
        expected = "V of the whole vocabulary" if entries is None else entries
        raise ValueError(f"class_weights: expected ({expected},), got {tuple(class_weights.shape)}")
    if class_weights.requires_grad:
        raise ValueError("class_weights: must not require grad; pass class_weights.detach()")
    if class_weights.device != hidden.device:
        raise ValueError(f"class_weights: is on {class_weights.device}, hidden on {hidden.device}")
    return class_weights
