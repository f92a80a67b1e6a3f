"""Vocabulary-major loops: some vocabulary entries at a time, for all tokens.

Each slab of dweight is one GEMM. These loops serve losses that are known only once all tokens'
statistics are: with m and log s saved, the gradient needs no whole row. The statistics come from
the same slabs, as the backward must compute the very same logits again: if they were summed in
another order, a confident token's small probabilities would lose their digits. Work is counted as
in chunked.py.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels, reference
from ..kernels import FinishedRows, RowTerms, row_stride
from ..reference import RowParts, RowTransform, TokenStats
from .chosen import ChosenEntries
from .gemm import gemm
from .inputs import GradMask, HeadInputs, SavedStats, StatsOutput, part_of, scale_upstream
from .memory import chunk_length, large_empty, logits_budget
from .support import DenseSupport

MIN_SLAB_BYTES = 64 << 20  # measured on a CPU: GEMMs over fewer vocabulary entries are slow
SLABS_PER_MERGE = 16  # on a GPU: a merge is 30 launches, their parts take 512 bytes a token or more
MAX_KEPT_SLAB_BYTES = 64 << 20  # for dy and fp32 dweight of a slab of kept logits


class Slab(NamedTuple):
    """Some vocabulary entries, and all tokens' raw logits of them."""

    vocab_slice: slice
    weight: Tensor  # (v, D)
    y: Tensor  # (N, v) raw logits, free to overwrite unless the forward has kept them
    row: RowTransform


def _slabs(inputs: HeadInputs, hidden: Tensor, tokens: slice | Tensor) -> Iterator[Slab]:
    """Yield all slabs, their logits in one reused buffer; `hidden` holds the rows of `tokens`."""
    weight, count, device = inputs.weight, len(hidden), hidden.device
    # The backward also holds the slab's fp32 dweight; both passes need the same slabs.
    entry_bytes = count * inputs.logit_bytes + hidden.shape[1] * inputs.dtype.itemsize
    # dhidden is read and written once per slab, so a slab is large beside it.
    default_bytes = max(MIN_SLAB_BYTES, 16 * hidden.numel() * inputs.dtype.itemsize)
    length = chunk_length(len(weight), entry_bytes, inputs.chunk_bytes, device, default_bytes)
    support = None if inputs.support is None else DenseSupport(inputs.support.of(tokens))
    longest = row_stride(min(length, len(weight)), device)
    buffer = large_empty((count * longest,), inputs.dtype, hidden)
    all_entries = part_of(inputs.row_transform(), tokens)
    for start in range(0, len(weight), length):
        vocab_slice = slice(start, min(start + length, len(weight)))
        w = weight[vocab_slice]
        stride = row_stride(len(w), device)
        y = gemm(buffer[: count * stride].view(count, stride)[:, : len(w)], hidden, w.t())
        if support is not None:
            support.mask(y, start)
        yield Slab(vocab_slice, w, y, part_of(all_entries, slice(None), vocab_slice))


def _kept_slabs(inputs: HeadInputs, logits: Tensor, tokens: slice | Tensor) -> Iterator[Slab]:
    """Yield slabs of logits that the forward has kept, as views."""
    weight = inputs.weight
    entry_bytes = len(logits) * inputs.operand.itemsize + weight.shape[1] * inputs.dtype.itemsize
    budget = min(MAX_KEPT_SLAB_BYTES, logits_budget(inputs.chunk_bytes, weight.device))
    length = max(16, budget // entry_bytes // 16 * 16)  # aligned columns, which a GPU reads fast
    all_entries = part_of(inputs.row_transform(), tokens)
    for start in range(0, len(weight), length):
        vocab_slice = slice(start, min(start + length, len(weight)))
        row = part_of(all_entries, slice(None), vocab_slice)
        yield Slab(vocab_slice, weight[vocab_slice], logits[:, vocab_slice], row)


def token_stats(
    inputs: HeadInputs,
    with_collision_and_argmax: bool,
    may_keep_logits: bool = False,
    top_k: int = 0,
) -> StatsOutput:
    """Compute all tokens' statistics, and m and log s for the backward.

    Work: 2. Memory: one slab, and a copy of the active tokens' hidden where the mask leaves some
    out. Where all logits fit into the budget they may be kept for the backward.
    """
    active = inputs.check_and_find_active(negative_mask_allowed=True)
    tokens: slice | Tensor = slice(None) if active is None else active
    hidden, weight = inputs.hidden[tokens], inputs.weight
    targets = None if inputs.targets is None else inputs.targets[tokens]
    chosen = ChosenEntries(targets, top_k)
    logits = hidden.new_empty(0, 0, dtype=inputs.dtype)
    stride = row_stride(len(weight), hidden.device)
    size = len(hidden) * stride * inputs.dtype.itemsize
    if may_keep_logits and size <= logits_budget(inputs.chunk_bytes, hidden.device):
        logits = large_empty((len(hidden), stride), inputs.dtype, hidden)
        y = gemm(logits[:, : len(weight)], hidden, weight.t())
        if inputs.support is not None:
            DenseSupport(inputs.support.of(tokens)).mask(y)
        row = part_of(inputs.row_transform(), tokens)
        parts = kernels.row_statistics(y, row, with_collision_and_argmax)
        chosen.add(y, row, 0)
    else:
        parts = _statistics_of_slabs(inputs, tokens, with_collision_and_argmax, chosen)
    if inputs.shard is not None:
        parts = inputs.shard.gather(parts)
        chosen.gather(inputs.shard)
    finished = kernels.finish_rows(parts, inputs.vocab_size, targets)
    output = inputs.zero_output(with_collision_and_argmax, top_k)
    output.store(tokens, finished, chosen.finish(finished))
    return output._replace(logits=logits)


def _statistics_of_slabs(
    inputs: HeadInputs,
    tokens: slice | Tensor,
    with_collision_and_argmax: bool,
    chosen: ChosenEntries,
) -> RowParts:
    """Return the parts of all slabs of these tokens, merged now and then so that they stay few.

    The chosen entries are collected on the way.
    """
    parts: list[RowParts] = []
    most = SLABS_PER_MERGE if inputs.hidden.is_cuda else 1
    for slab in _slabs(inputs, inputs.hidden[tokens], tokens):
        part = kernels.row_statistics(slab.y, slab.row, with_collision_and_argmax)
        if part.argmax is not None:
            part = part._replace(argmax=part.argmax + slab.vocab_slice.start)
        parts.append(part)
        chosen.add(slab.y, slab.row, slab.vocab_slice.start)
        if len(parts) > most:
            merged = reference.merge(_joined(parts))
            parts = [RowParts._make(None if field is None else field[None] for field in merged)]
    return _joined(parts)


def _joined(parts: list[RowParts]) -> RowParts:
    fields = zip(*parts, strict=True)
    return RowParts._make(None if field[0] is None else torch.cat(field) for field in fields)


def token_stats_backward(
    inputs: HeadInputs,
    upstream: Tensor,
    saved: SavedStats,
    needs: GradMask,
    chosen_upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dhidden, dweight and dbias in the inputs' dtypes, from logits kept or recomputed.

    `upstream` has the statistics' shape; chosen_upstream (N, K) is logprob's, for several targets.
    Work: 2 to recompute logits, +2 for hidden, +2 for weight: with the forward's 2, 8 in all, or 6
    from kept logits. Memory: one slab, fp32 dhidden, and a copy of the active tokens' hidden where
    the mask leaves some out.
    """
    hidden, weight, wide = inputs.hidden, inputs.weight, inputs.dtype
    active = inputs.active_tokens()
    tokens: slice | Tensor = slice(None) if active is None else active
    h = hidden[tokens]
    stats = TokenStats(*saved.statistics[:, tokens])
    up = inputs.upstream_of(upstream, tokens, chosen_upstream)
    up, scale = scale_upstream(up, inputs.operand)
    finished = FinishedRows(stats, saved.m[tokens], saved.log_s[tokens])
    per_row = kernels.gradient_factors(finished, up, inputs.vocab_size)
    dh = h.new_zeros(h.shape if needs.hidden else (0,), dtype=wide)
    dw = weight.new_empty(weight.shape if needs.weight else (0,))
    dw_slab = dh.new_empty(0)
    db = weight.new_empty(len(weight) if needs.bias else 0)
    is_kept = saved.logits.numel() > 0
    slabs = _kept_slabs(inputs, saved.logits, tokens) if is_kept else _slabs(inputs, h, tokens)
    for vocab_slice, w, y, row in slabs:
        if is_kept:  # a later backward may read the logits again
            out = y.new_empty(len(y), row_stride(len(w), y.device), dtype=inputs.operand)
            out = out[:, : len(w)]
        else:
            out = kernels.gradient_buffer(y, inputs.operand)
        dy = kernels.row_gradient(RowTerms(y, row, per_row), out, up.logprob)
        if needs.hidden:
            gemm(dh, dy, w, accumulate=True, alpha=scale)
        if needs.weight:
            if dw_slab.numel() == 0:  # the first slab is the longest
                dw_slab = large_empty(w.shape, wide, w)
            dw[vocab_slice] = gemm(dw_slab[: len(w)], dy.t(), h, alpha=scale)
        if needs.bias:
            db[vocab_slice] = (dy.sum(0, dtype=wide) * scale).to(db.dtype)
        del y, out, dy  # a GPU reuses their memory for the next slab
    if needs.hidden and inputs.shard is not None:
        inputs.shard.sum(dh)
    return inputs.spread(dh, active if needs.hidden else None), dw, db
