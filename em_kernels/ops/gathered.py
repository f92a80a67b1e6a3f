"""Statistics over small supports: only the listed logits are computed, from gathered weights.

The products go over all listed entries of all tokens, some at a time. Statistics and gradient come
from the row kernels, on blocks of tokens whose few logits are padded with -inf to equal length.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..kernels import FinishedRows, RowTerms
from ..reference import RowTransform, TokenStats
from .chosen import ChosenEntries
from .inputs import GradMask, HeadInputs, SavedStats, StatsOutput, part_of
from .memory import chunk_length, logits_budget, untouched_zeros
from .support import Support

DEFAULT_BYTES = 64 << 20  # for gathered weights, as slabs of the vocabulary have


class Block(NamedTuple):
    """Tokens and their logits, padded with -inf."""

    tokens: Tensor  # positions among those that count
    elements: Tensor  # positions of their logits among all
    place: tuple[Tensor, Tensor]  # row and column of these in y
    y: Tensor  # (tokens, width)
    row: RowTransform


class Gathered(NamedTuple):
    """The tokens that count, and the entries of each."""

    tokens: slice | Tensor
    hidden: Tensor  # (n, D)
    support: Support  # of these tokens
    row_of: Tensor  # (nnz,) token of each entry
    row: RowTransform  # without bias, which the logits have; targets are places in the support


def _gather(inputs: HeadInputs, active: Tensor | None) -> Gathered:
    tokens: slice | Tensor = slice(None) if active is None else active
    assert inputs.support is not None
    support = inputs.support.of(tokens)
    row = inputs.row_transform()._replace(bias=None)
    if inputs.targets is not None:
        row = row._replace(targets=inputs.support.places_of(inputs.targets, inputs.vocab_size))
    return Gathered(tokens, inputs.hidden[tokens], support, support.row_of, part_of(row, tokens))


def _slices(inputs: HeadInputs, gathered: Gathered) -> Iterator[slice]:
    """Yield slices of the entries whose gathered weights and hidden states fit the budget."""
    count, width = len(gathered.row_of), inputs.hidden.shape[1]
    entry_bytes = width * (inputs.weight.dtype.itemsize + 2 * inputs.dtype.itemsize)
    length = chunk_length(
        count, entry_bytes, inputs.chunk_bytes, inputs.hidden.device, DEFAULT_BYTES
    )
    return (slice(start, start + length) for start in range(0, count, length))


def _logits(inputs: HeadInputs, gathered: Gathered) -> Tensor:
    """Compute the listed logits, (nnz,), bias included."""
    entries, wide = gathered.support.indices, inputs.dtype
    y = inputs.hidden.new_empty(len(entries), dtype=wide)
    for part in _slices(inputs, gathered):
        w = inputs.weight[entries[part]].to(wide)
        y[part] = w.mul_(gathered.hidden[gathered.row_of[part]]).sum(1)
    if inputs.bias is not None:
        y += inputs.bias[entries]
    return y


def _blocks(inputs: HeadInputs, gathered: Gathered, y: Tensor) -> Iterator[Block]:
    """Yield blocks of tokens whose supports are of like size: at most half of it is padding."""
    support = gathered.support
    order = support.counts.argsort(descending=True, stable=True)
    widths = support.counts[order].tolist()
    budget = logits_budget(inputs.chunk_bytes, y.device, DEFAULT_BYTES) // y.itemsize
    begin = 0
    while begin < len(order):
        width, end = widths[begin], begin + 1
        while end < len(order) and 2 * widths[end] >= width and (end + 1 - begin) * width <= budget:
            end += 1
        tokens = order[begin:end]
        begin = end
        elements, row_of = support.positions_of(tokens)
        place = row_of, elements - support.offsets[tokens][row_of]
        padded = y.new_full((len(tokens), width), -torch.inf)
        padded[place] = y[elements]
        yield Block(tokens, elements, place, padded, part_of(gathered.row, tokens))


def token_stats(inputs: HeadInputs, keep_logits: bool) -> StatsOutput:
    """Compute all tokens' statistics over their supports. Work: 2 nnz D."""
    active = inputs.check_and_find_active(negative_mask_allowed=True)
    gathered = _gather(inputs, active)
    y = _logits(inputs, gathered)
    output = inputs.zero_output()
    for tokens, _, _, logits, row in _blocks(inputs, gathered, y):
        positions = tokens if active is None else active[tokens]
        parts = kernels.row_statistics(logits, row, with_collision_and_argmax=False)
        targets = None if inputs.targets is None else inputs.targets[positions]
        finished = kernels.finish_rows(parts, inputs.vocab_size, targets)
        chosen = ChosenEntries(targets)
        chosen.add(logits, row, 0)
        output.store(positions, finished, chosen.finish(finished))
    return output._replace(logits=y[None]) if keep_logits else output


def token_stats_backward(
    inputs: HeadInputs,
    upstream: Tensor,
    saved: SavedStats,
    needs: GradMask,
    chosen_upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dhidden, dweight and dbias in the inputs' dtypes. Work: 2 nnz D for each of two."""
    hidden, weight, wide = inputs.hidden, inputs.weight, inputs.dtype
    active = inputs.active_tokens()
    gathered = _gather(inputs, active)
    dy = _logit_gradient(inputs, upstream, saved, gathered, chosen_upstream)
    entries = gathered.support.indices
    used, row_of_entry = entries.unique(return_inverse=True)
    dh = hidden.new_zeros(gathered.hidden.shape if needs.hidden else (0,), dtype=wide)
    dw = dh.new_zeros((len(used), weight.shape[1]) if needs.weight else (0,))
    db = dh.new_zeros(len(used) if needs.bias else 0)
    if needs.bias:
        _add_rows(db, row_of_entry, dy)
    for part in _slices(inputs, gathered):
        row_of, factors = gathered.row_of[part], dy[part, None]
        if needs.hidden:
            _add_rows(dh, row_of, factors * weight[entries[part]])
        if needs.weight:
            _add_rows(dw, row_of_entry[part], factors * gathered.hidden[row_of])
    return (
        inputs.spread(dh, active if needs.hidden else None),
        _spread(dw, used, weight) if needs.weight else weight.new_empty(0),
        _spread(db, used, weight[:, 0]) if needs.bias else weight.new_empty(0),
    )


def _logit_gradient(
    inputs: HeadInputs,
    upstream: Tensor,
    saved: SavedStats,
    gathered: Gathered,
    chosen_upstream: Tensor | None,
) -> Tensor:
    """Compute dy (8) of the listed logits (nnz,)."""
    tokens, y = gathered.tokens, saved.logits[0]
    statistics, m, log_s = saved.statistics[:, tokens], saved.m[tokens], saved.log_s[tokens]
    up = inputs.upstream_of(upstream, tokens, chosen_upstream)
    dy = torch.empty_like(y)
    for rows, elements, place, logits, row in _blocks(inputs, gathered, y):
        finished = FinishedRows(TokenStats(*statistics[:, rows]), m[rows], log_s[rows])
        up_of_rows = TokenStats._make(None if x is None else x[rows] for x in up)
        per_row = kernels.gradient_factors(finished, up_of_rows, inputs.vocab_size)
        terms = RowTerms(logits, row, per_row)
        dy[elements] = kernels.row_gradient(terms, logits, up_of_rows.logprob)[place]
    return dy


def _add_rows(out: Tensor, keys: Tensor, rows: Tensor) -> None:
    """Add rows to those of `out` at the keys, in an order that does not change: no float atomics.

    index_add_ has them on a GPU, and index_put_ on a CPU.
    """
    if out.is_cpu:
        out.index_add_(0, keys, rows)
    else:
        out.index_put_((keys,), rows, accumulate=True)


def _spread(rows: Tensor, used: Tensor, like: Tensor) -> Tensor:
    """Return a gradient of like's shape and dtype: these rows, and zeros elsewhere."""
    is_cpu = like.is_cpu
    zeros = untouched_zeros(like.shape, like.dtype) if is_cpu else torch.zeros_like(like)
    return zeros.index_copy_(0, used, rows.to(like.dtype))
