"""Token-major loops: GEMM -> row statistics -> row gradient -> GEMMs, some tokens at a time.

Losses that are known token by token get their gradients in the same pass. Work is counted in units
of N*D*V; one GEMM over the whole vocabulary costs 2.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels, reference
from ..kernels import RowTerms, row_stride
from ..reference import RowTransform, TokenStats
from .gemm import gemm
from .gradients import Gradients, Pending, Sink, Sums
from .inputs import TILE, Needs, Problem, chunk_length, in_range_of, large_empty

PerToken = Callable[[TokenStats, slice | Tensor], tuple[Tensor, TokenStats]]


class Chunk(NamedTuple):
    """Some tokens, their raw logits, and what one pass over those found."""

    tokens: slice | Tensor  # where they stand among the N
    hidden: Tensor  # (n, D)
    y: Tensor  # (n, V) raw logits, free to overwrite until the buffer's next turn
    row: RowTransform
    m: Tensor  # (n,)
    log_s: Tensor  # (n,)
    stats: TokenStats


def _chunks(
    problem: Problem, active: Tensor | None, everything: bool, sums: Sums
) -> Iterator[Chunk]:
    """In as many buffers in turn as sums wants, or later in fewer, larger ones of that memory."""
    hidden, weight, shard = problem.hidden, problem.weight, problem.shard
    count = len(hidden) if active is None else len(active)
    widest = row_stride(max(problem.sizes), hidden.device)
    stride = row_stride(len(weight), hidden.device)
    memory = hidden.new_empty(0)

    def fitting(left: int, row_bytes: int) -> int:
        length = chunk_length(left, row_bytes, problem.chunk_bytes, hidden.device)
        # free memory differs, chunks are collective calls
        return length if shard is None else shard.smallest(length)

    start = held = 0
    while start < count:
        if held != sums.buffers:
            held, left = sums.buffers, count - start
            row_bytes = widest * (problem.logit_bytes + (held - 1) * problem.dtype.itemsize)
            length = fitting(left, row_bytes)
            if 1 < sums.together < length < left:
                row_bytes += widest * (sums.together - 1) * problem.operand.itemsize
                fewer = fitting(left, row_bytes)
                if fewer >= TILE:
                    length, sums.room = fewer, min(sums.together * fewer, left)
            if start == 0:
                rows_held = min(held, -(-left // length)) * length  # whole buffers
                memory = large_empty((rows_held * stride,), problem.dtype, hidden)
            length = min(length, rows_held)
            number = rows_held // length
            turns = cycle(memory[: number * length * stride].view(number, length, stride))
        buffer = next(turns)
        end = min(count, start + length)
        tokens = slice(start, end) if active is None else active[start:end]
        start = end
        h = hidden[tokens]
        y = gemm(buffer[: len(h), : len(weight)], h, weight.t())
        row = problem.row_transform(tokens)
        parts = kernels.row_statistics(y, row, everything)
        if shard is not None:
            parts = shard.merge(parts)
        goals = None if problem.targets is None else problem.targets[tokens]
        stats = reference.statistics(parts, problem.vocab_size, goals)
        yield Chunk(tokens, h, y, row, parts.m, torch.log1p(parts.s1), stats)


def gradients_in_forward(
    problem: Problem,
    per_token: PerToken,
    needs: Needs,
    active: Tensor | None = None,
    everything: bool = False,
    sink: Sink | None = None,
) -> tuple[Tensor, Gradients]:
    """Sum of per-token losses (), and its gradients, in one pass over the tokens.

    per_token(statistics of some tokens, which) -> their losses (n,), and the losses' derivatives as
    TokenStats; everything: q, sums of z and argmax are computed too; sink: takes the weight's
    gradient.
    Work: 2 without gradients, +2 for hidden, +2 for weight; with a tolerance, +2 times the share of
    the columns that are multiplied. Memory: one chunk and what is returned; where the mask leaves
    tokens out, copies of the others that are multiplied together.
    """
    loss = problem.hidden.new_zeros((), dtype=problem.dtype)
    sums = Sums(problem, needs, sink)
    waiting: deque[Pending] = deque()
    for chunk in _chunks(problem, active, everything, sums):
        losses, upstream = per_token(chunk.stats, chunk.tokens)
        loss += losses.sum(dtype=problem.dtype)
        if not any(needs):
            continue
        upstream, scale = in_range_of(problem.operand, upstream)
        factors = reference.coefficients(chunk.stats, upstream, problem.vocab_size)
        terms = RowTerms(chunk.y, chunk.row, chunk.m, chunk.log_s, factors)
        waiting.append(sums.begin(chunk.tokens, chunk.hidden, terms, scale))
        while len(waiting) >= sums.buffers:
            sums.finish(waiting.popleft())
    for pending in waiting:
        sums.finish(pending)
    return loss, sums.result()


def entropy_loss(
    problem: Problem, mean: bool, needs: Needs, sink: Sink | None = None
) -> tuple[Tensor, Gradients]:
    """gradients_in_forward of entropy (3), weighted by the mask; summed, or over the mask's sum."""
    active = problem.active(negative_mask_allowed=not mean)
    weights = problem.token_weights(mean)

    def per_token(stats: TokenStats, tokens: slice | Tensor) -> tuple[Tensor, TokenStats]:
        assert stats.entropy is not None
        return weights[tokens] * stats.entropy, TokenStats(entropy=weights[tokens])

    return gradients_in_forward(problem, per_token, needs, active, sink=sink)


def token_loss(
    problem: Problem,
    loss_fn: Callable[[TokenStats, Tensor], Tensor],
    needs: Needs,
    grad_enabled: bool = True,
) -> tuple[Tensor, Gradients]:
    """gradients_in_forward of loss_fn's losses, weighted by the mask: autograd gives their
    derivatives inside the chunk; grad_enabled: where the caller is.
    """
    active = problem.active(negative_mask_allowed=True)
    everywhere = torch.arange(len(problem.hidden), device=problem.hidden.device)
    depends: list[bool] = []

    def per_token(stats: TokenStats, tokens: slice | Tensor) -> tuple[Tensor, TokenStats]:
        leaves = TokenStats(*(None if x is None else x.detach().clone() for x in stats))
        floats = [x for x in leaves[:5] if x is not None]
        with torch.set_grad_enabled(grad_enabled):
            for x in floats:
                x.requires_grad_(any(needs))
            losses = loss_fn(leaves, everywhere[tokens].clone())
            _check_losses(losses, len(floats[0]), floats)
            losses = losses.to(problem.dtype)
            if problem.mask is not None:
                losses = losses * problem.mask[tokens].to(problem.dtype)
            gradients: tuple[Tensor | None, ...] = (None,) * len(floats)
            if losses.requires_grad:
                gradients = torch.autograd.grad(losses.sum(), floats, allow_unused=True)
        depends.append(any(x is not None for x in gradients))
        found = iter(gradients)
        upstream = TokenStats(*(None if x is None else next(found) for x in leaves[:5]))
        if upstream.logprob is not None and problem.targets is not None:
            ignored = problem.targets[tokens] == reference.IGNORE_INDEX
            upstream = upstream._replace(logprob=upstream.logprob.masked_fill(ignored, 0))
        return losses.detach(), upstream

    results = gradients_in_forward(problem, per_token, needs, active, everything=True)
    if any(needs) and depends and not any(depends):
        raise ValueError("loss_fn: its losses do not depend on the statistics it was given")
    return results


def _check_losses(losses: Tensor, count: int, leaves: list[Tensor]) -> None:
    """One loss a token, and no gradient that would be lost."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss_fn: expected to return a tensor, got {type(losses).__name__}")
    if losses.shape != (count,):
        raise ValueError(
            f"loss_fn: expected one loss per token, ({count},), got {tuple(losses.shape)}"
        )
    if losses.is_complex():
        raise TypeError(f"loss_fn: expected real losses, got {losses.dtype}")
    seen, ahead = set(), [losses.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("AccumulateGrad"):
            variable = node.variable  # type: ignore[attr-defined]
            if not any(variable is leaf for leaf in leaves):
                raise ValueError(
                    f"loss_fn: uses a tensor {tuple(variable.shape)} that requires grad and would "
                    "get none; detach it, or take fused_token_stats"
                )
        ahead += [parent for parent, _ in node.next_functions]


def token_stats_and_unit_gradient(
    problem: Problem, name: str, everything: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics and argmax as slabs.token_stats gives them, and the gradient (N, D) of one
    statistic for hidden, upstream 1. Work: 4.
    """
    active = problem.active(negative_mask_allowed=True)
    statistics, argmax = problem.blank_statistics(everything)

    def per_token(stats: TokenStats, tokens: slice | Tensor) -> tuple[Tensor, TokenStats]:
        for row, found in zip(statistics, stats, strict=False):
            if found is not None:
                row[tokens] = found
        if everything and stats.argmax is not None:
            argmax[tokens] = stats.argmax
        value = getattr(stats, name)
        one = torch.ones_like(value)
        if name == "logprob":
            assert problem.targets is not None
            one[problem.targets[tokens] == reference.IGNORE_INDEX] = 0
        return value, TokenStats(**{name: one})

    needs = Needs(hidden=True)
    _, gradients = gradients_in_forward(problem, per_token, needs, active, everything)
    return statistics, argmax, gradients.hidden
