"""Vocabulary-major loops: some words at a time, all tokens; each slab of dweight is one GEMM.

For losses that are known only when every token's statistics are: with m and log s saved, the
gradient needs no whole row. The statistics come from the same slabs, as the very same logits must
be computed again: rounded in another order they would cost a sure token's small probabilities their
digits. Work is counted as in chunked.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels, reference
from ..kernels import RowTerms, row_stride
from ..reference import RowTransform, TokenStats
from .gemm import gemm
from .inputs import Needs, Problem, chunk_length, in_range_of, large_empty

MIN_SLAB_BYTES = 64 << 20  # measured on a CPU; GEMMs of fewer words are slow


class Slab(NamedTuple):
    """Some words, and all tokens' raw logits of them."""

    words: slice  # where they stand in the weight
    weight: Tensor  # (v, D)
    y: Tensor  # (N, v) raw logits, free to overwrite
    row: RowTransform


def _slabs(problem: Problem, hidden: Tensor, tokens: slice | Tensor) -> Iterator[Slab]:
    """In one reused buffer; hidden holds the rows of `tokens`."""
    weight, count, device = problem.weight, len(hidden), hidden.device
    # in the backward also the slab's fp32 dweight
    word_bytes = count * problem.logit_bytes + hidden.shape[1] * problem.dtype.itemsize
    # dhidden is read and written once a slab
    enough = max(MIN_SLAB_BYTES, 16 * hidden.numel() * problem.dtype.itemsize)
    length = chunk_length(len(weight), word_bytes, problem.chunk_bytes, device, enough)
    longest = row_stride(min(length, len(weight)), device)
    buffer = large_empty((count * longest,), problem.dtype, hidden)
    for start in range(0, len(weight), length):
        words = slice(start, min(start + length, len(weight)))
        w = weight[words]
        stride = row_stride(len(w), device)
        y = gemm(buffer[: count * stride].view(count, stride)[:, : len(w)], hidden, w.t())
        yield Slab(words, w, y, problem.row_transform(tokens, words))


def token_stats(problem: Problem, everything: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics (5, N) in TokenStats' order and argmax (N,), without everything (3, N) and (0,);
    and for the backward m, log s (N,).

    Work: 2. Memory: one slab, and a copy of the tokens left where the mask leaves some out.
    """
    active = problem.active(negative_mask_allowed=True)
    tokens: slice | Tensor = slice(None) if active is None else active
    parts = None
    for slab in _slabs(problem, problem.hidden[tokens], tokens):
        found = kernels.row_statistics(slab.y, slab.row, everything)
        if found.argmax is not None:
            found = found._replace(argmax=found.argmax + slab.words.start)
        parts = found if parts is None else reference.merge([parts, found])
    assert parts is not None  # functional.py refuses an empty vocabulary
    if problem.shard is not None:
        parts = problem.shard.merge(parts)
    targets = None if problem.targets is None else problem.targets[tokens]
    stats = reference.statistics(parts, problem.vocab_size, targets)
    statistics, argmax = problem.blank_statistics(everything)
    m, log_s = statistics.new_zeros(2, len(problem.hidden))
    for row, value in zip(statistics, stats, strict=False):
        if value is not None:
            row[tokens] = value
    if everything and stats.argmax is not None:
        argmax[tokens] = stats.argmax
    m[tokens], log_s[tokens] = parts.m, torch.log1p(parts.s1)
    return statistics, argmax, m.clone(), log_s.clone()


def token_stats_backward(
    problem: Problem,
    upstream: Tensor,
    statistics: Tensor,
    m: Tensor,
    log_s: Tensor,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for any upstream, shaped as the statistics, from logits computed again.

    Returns dhidden, dweight, dbias in the inputs' dtypes.
    Work: 2, +2 for hidden, +2 for weight: with the forward's 2, 8 in all. Memory: one slab, fp32
    dhidden, and where the mask leaves tokens out a copy of the others.
    """
    hidden, weight, wide = problem.hidden, problem.weight, problem.dtype
    active = None if problem.mask is None else problem.mask.nonzero()[:, 0]
    if active is not None and len(active) == len(hidden):
        active = None
    tokens: slice | Tensor = slice(None) if active is None else active
    h = hidden[tokens]
    stats = TokenStats(*statistics[:, tokens])
    up = TokenStats(*upstream[:, tokens].to(wide))
    if problem.targets is None or up.logprob is None:
        up = up._replace(logprob=None)
    else:
        ignored = problem.targets[tokens] == reference.IGNORE_INDEX
        up = up._replace(logprob=up.logprob.masked_fill(ignored, 0))
    up, scale = in_range_of(problem.operand, up)
    factors = reference.coefficients(stats, up, problem.vocab_size)
    dh = h.new_zeros(h.shape if needs.hidden else (0,), dtype=wide)
    dw = large_empty(weight.shape if needs.weight else (0,), weight.dtype, weight)
    dw_slab = dh.new_empty(0)
    db = weight.new_empty(len(weight) if needs.bias else 0)
    for words, w, y, row in _slabs(problem, h, tokens):
        out = kernels.gradient_buffer(y, problem.operand)
        dy = kernels.row_gradient(RowTerms(y, row, m[tokens], log_s[tokens], factors), out)
        if needs.hidden:
            gemm(dh, dy, w, accumulate=True, alpha=scale)
        if needs.weight:
            if dw_slab.numel() == 0:  # the first is the longest
                dw_slab = large_empty(w.shape, wide, w)
            dw[words] = gemm(dw_slab[: len(w)], dy.t(), h, alpha=scale)
        if needs.bias:
            db[words] = (dy.sum(0, dtype=wide) * scale).to(db.dtype)
        del out, dy  # on a GPU their memory is the next slab's
    if needs.hidden and problem.shard is not None:
        problem.shard.sum(dh)
    dh = dh.to(hidden.dtype)
    if needs.hidden and active is not None:
        dh = hidden.new_zeros(hidden.shape).index_copy_(0, active, dh)
    return dh, dw, db
