"""Divergence of a head's distributions from a reference's, with gradients in the same pass.

Work is counted in units of N*D*V, as in chunked.py; of the reference D is its own.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..kernels import DivergenceTerms, FinishedRows, row_stride
from ..reference import RowTransform
from .checks import HeadArguments
from .gemm import gemm
from .gradients import GradAccumulator, Gradients
from .inputs import (
    GradMask,
    HeadInputs,
    build_inputs,
    part_of,
    power_of_two,
    store_statistics,
)
from .memory import chunk_length, large_empty
from .saved_gradients import weight_gradient
from .weight_gradient import WeightGradCallback

# fp16's largest number is 65504: its range for the entries of a dy whose bound is 1
FP16_ROOM = 2.0**14


class ReferenceArguments(NamedTuple):
    """Checked arguments of the reference, in the form that the ops take."""

    hidden: Tensor  # (N, D of the reference)
    weight: Tensor  # (V, D of the reference)
    bias: Tensor | None  # (V,)
    transform: list[float]  # logit_scale, softcap (0: none), beta


class Pair(NamedTuple):
    """A head, and the reference that its distributions are compared with."""

    head: HeadInputs
    ref: HeadInputs
    beta: float


def build_pair(head: HeadArguments, ref: ReferenceArguments, collectives: int) -> Pair:
    """Build the loop's inputs; collectives as in build_inputs, which is a collective call."""
    inputs = build_inputs(head, collectives)
    logit_scale, softcap, beta = ref.transform
    other = inputs._replace(
        hidden=ref.hidden,
        weight=ref.weight,
        bias=ref.bias,
        logit_scale=logit_scale,
        softcap=softcap or None,
    )
    return Pair(inputs, other, beta)


def _finished(
    inputs: HeadInputs, tokens: slice | Tensor, row: RowTransform, y: Tensor, targets: Tensor | None
) -> FinishedRows:
    """Write raw logits of these tokens into y; return their statistics.

    targets (n,) are counted over the whole vocabulary; None: the argmax is found instead.
    """
    gemm(y, inputs.hidden[tokens], inputs.weight.t())
    if targets is not None:
        local = targets if inputs.shard is None else targets - inputs.shard.start
        row = row._replace(targets=local)
    parts = kernels.row_statistics(y, row, with_collision_and_argmax=targets is None)
    if inputs.shard is not None:
        parts = inputs.shard.gather(parts)
    return kernels.finish_rows(parts, inputs.vocab_size, targets)


class Divergences(NamedTuple):
    """Each token's divergence, and the model's own statistics; 0 where the mask is."""

    values: Tensor  # (N,)
    statistics: Tensor  # (5, N) in TokenStats' order, without logprob
    argmax: Tensor  # (N,) int64


def divergences(
    pair: Pair,
    weights: Tensor,
    needs: GradMask,
    active: Tensor | None,
    keep_dy: bool = False,
    on_weight_grad: WeightGradCallback | None = None,
) -> tuple[Divergences, Gradients]:
    """Compute all tokens' divergences, and the gradients of their sum times the weights (N,).

    Work: 2 for each head, +2 for hidden, +2 for weight. Memory: a chunk of each head's logits and
    what is returned. With keep_dy, and on_weight_grad, as in chunked.sum_losses.
    """
    inputs, ref, beta = pair
    hidden, device, wide = inputs.hidden, inputs.hidden.device, inputs.dtype
    found = Divergences(hidden.new_zeros(len(hidden), dtype=wide), *inputs.zero_statistics(True))
    keep_dy = keep_dy and inputs.keeps_dy(needs)
    accumulator = GradAccumulator(inputs, needs, on_weight_grad, keep_dy)
    count = len(hidden) if active is None else len(active)
    if accumulator.keeps_dy:
        accumulator.batch.capacity = count
    stride = row_stride(len(inputs.weight), device)
    widest = row_stride(max(inputs.shard_sizes), device)
    row_bytes = widest * (inputs.logit_bytes + wide.itemsize)
    length = chunk_length(count, row_bytes, inputs.chunk_bytes, device)
    if inputs.shard is not None:
        length = inputs.shard.smallest(length)
    # Two tensors, as a kept dy may be the first's memory, and keeps no more than that.
    buffers = [large_empty((min(length, count), stride), wide, hidden) for _ in range(2)]
    all_rows = inputs.row_transform()
    all_ref_rows = all_rows._replace(
        bias=ref.bias, logit_scale=ref.logit_scale, softcap=ref.softcap
    )
    for start in range(0, count, length):
        end = min(count, start + length)
        tokens = slice(start, end) if active is None else active[start:end]
        row, ref_row = part_of(all_rows, tokens), part_of(all_ref_rows, tokens)
        y, ref_y = (buffer[: end - start, : len(inputs.weight)] for buffer in buffers)
        stats, m, log_s = _finished(inputs, tokens, row, y, None)
        ref_stats, ref_m, ref_log_s = _finished(ref, tokens, ref_row, ref_y, stats.argmax)
        assert ref_stats.logprob is not None
        pivot, weight = -log_s - ref_stats.logprob, weights[tokens]
        per_row = torch.stack([m, log_s, ref_m, ref_log_s, pivot, weight, weight])
        terms = DivergenceTerms(y, row, ref_y, ref_row, per_row, beta)
        value_and_centre = kernels.divergence_sums(terms)
        if inputs.shard is not None:
            inputs.shard.sum(value_and_centre)
        found.values[tokens] = value = value_and_centre[0]
        store_statistics(stats, tokens, found.statistics, found.argmax)
        if not any(needs):
            continue
        # An infinite divergence has no gradient, which all of its row says.
        per_row[5] = value_and_centre[1] + (value - value)
        scale = 1.0
        if inputs.operand == torch.float16:
            largest = _bound_of_gradient(value, beta) * weight * row.inv_temperature
            scale = power_of_two(largest * row.logit_scale) / FP16_ROOM
            per_row[6] /= scale
        accumulator.finish(accumulator.begin(tokens, hidden[tokens], terms, scale))
    return found, accumulator.result()


def _bound_of_gradient(value: Tensor, beta: float) -> Tensor:
    """Return what no |dz| (11) exceeds.

    By Pinsker's inequality half of sum |p - q| is at most sqrt(value / 2), and between the two
    KL divergences at most sqrt(value / (2 beta (1 - beta))). (11) is q - p at beta 0, at most
    beta |p - q| + value between, and for r in q's place at most sqrt(2 KL(p || r)) + 2 KL(p || r).
    """
    root = torch.sqrt(2 * value.clamp(min=0))
    if beta == 0:
        return (root / 2).clamp(max=1)
    share = 1.0
    if beta < 1:
        share = min(0.5 * math.sqrt(beta / (1 - beta)), math.sqrt(1 - beta))
    return 2 * value + share * root


def sum_divergences(
    pair: Pair, mean: bool, needs: GradMask, on_weight_grad: WeightGradCallback | None = None
) -> tuple[Tensor, Divergences, Gradients]:
    """Sum or average the divergences, weighted by the mask, with their gradients.

    Where a callback gets the weight's gradient, nothing is kept for a backward.
    """
    active = pair.head.check_and_find_active(negative_mask_allowed=not mean)
    weights, keep_dy = pair.head.token_weights(mean), on_weight_grad is None
    found, gradients = divergences(pair, weights, needs, active, keep_dy, on_weight_grad)
    values = found.values
    if active is not None:  # 0 * inf would be NaN
        values, weights = values[active], weights[active]
    return (weights * values).sum(), found, gradients


def each_divergence(pair: Pair) -> Divergences:
    """Compute the divergences. Work: 4."""
    active = pair.head.check_and_find_active(negative_mask_allowed=True)
    weights = pair.head.token_weights(mean=False)
    return divergences(pair, weights, GradMask(), active)[0]


def gradients_of_each(
    pair: Pair, upstream: Tensor, needs: GradMask
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dhidden, dweight and dbias in the inputs' dtypes, for any upstream (N,).

    All logits are computed again. Work: 8.
    """
    inputs = pair.head
    active = inputs.check_and_find_active(negative_mask_allowed=True)
    weights = upstream.to(inputs.dtype)
    _, found = divergences(pair, weights, needs, active, keep_dy=True)
    dw = inputs.weight.new_empty(0)
    if needs.weight:
        one = weights.new_ones(())
        kept = (found.weight, found.vocab_indices, found.dy, found.dy_scales)
        given = (inputs.hidden, inputs.mask, one, *inputs.weight.shape[:1], inputs.weight.dtype)
        dw = weight_gradient(*kept, *given)
    bias_dtype = inputs.weight.dtype if inputs.bias is None else inputs.bias.dtype
    return found.hidden.to(inputs.hidden.dtype), dw, found.bias.to(bias_dtype)
