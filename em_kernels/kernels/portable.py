"""Row kernels in plain torch for any device and floating dtype.

They take a few rows at a time, so that temporaries stay small, and compute in fp32 or fp64.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import reference, reference_divergence
from ..reference import Coefficients, RowParts, RowTransform, TokenStats
from ..reference_divergence import DivergenceTerms

BLOCK_ELEMENTS = 1 << 21  # logits at a time; the formulas hold about eight temporaries of this size
# Thresholds tried per round, and rounds: keeps some 1 % more columns than sorting would.
STEPS, ROUNDS = 6, 3


class FinishedRows(NamedTuple):
    """Statistics of whole rows."""

    stats: TokenStats
    m: Tensor  # (rows,)
    log_s: Tensor  # (rows,)


class ColumnChoice(NamedTuple):
    """The columns of a chunk that are multiplied, and what leaving out the others drops."""

    vocab_indices: Tensor  # (K or more,) ascending; the first K are valid
    dweight_rows: Tensor  # (K or more,)
    row_of: Tensor  # (V,) these rows, and those of earlier choices; -1: none
    counts: Tensor  # (2,) int64: K, and how many of them are in no earlier choice
    masses: Tensor  # (2,) of the columns left out, and of all
    sample: Tensor  # (S,) indices of columns left out: the heaviest of every few
    shares: Tensor  # (1, S) of the sample's mass, or zeros where nothing was left out


def _blocks(y: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, y.shape[1]))
    return (slice(start, start + rows) for start in range(0, y.shape[0], rows))


def _wide(y: Tensor) -> Tensor:
    return y if y.dtype == torch.float64 else y.float()


def row_statistics(
    y: Tensor, row: RowTransform, with_collision_and_argmax: bool = True
) -> RowParts:
    """Compute (1), argmax and the sums of (5) and (6)."""
    parts = [
        reference.row_parts(reference.transform(_wide(y[rows]), block), block.targets)
        for rows in _blocks(y)
        for block in [_take_rows(row, rows)]
    ]
    if not parts:
        argmax = y.new_empty(1, 0, dtype=torch.int64)
        return RowParts._make([*_wide(y.new_empty(6, 1, 0)), argmax])
    return RowParts(*(torch.cat(field)[None] for field in zip(*parts, strict=True)))


def finish_rows(parts: RowParts, vocab_size: int, targets: Tensor | None) -> FinishedRows:
    """Merge the parts and compute (2) to (6)."""
    if len(parts.m) == 1:
        merged = RowParts._make(None if field is None else field[0] for field in parts)
    else:
        merged = reference.merge(parts)
    stats = reference.statistics(merged, vocab_size, targets)
    return FinishedRows(stats, merged.m, torch.log1p(merged.s1))


def gradient_factors(rows: FinishedRows, upstream: TokenStats, vocab_size: int) -> Tensor:
    """Compute the per-row terms of (8)."""
    factors = reference.coefficients(rows.stats, upstream, vocab_size)
    return torch.stack([rows.m, rows.log_s, *factors])


def row_gradient(y: Tensor, row: RowTransform, per_row: Tensor, out: Tensor) -> None:
    """Write dy (8) into out."""
    for rows in _blocks(y):
        out[rows] = _gradient(y, row, per_row, rows)


def column_mass(y: Tensor, row: RowTransform, per_row: Tensor) -> tuple[Tensor, Tensor]:
    """Sum |dy| over the rows and dy over the columns."""
    mass, row_sums = per_row.new_zeros(y.shape[1]), torch.empty_like(per_row[0])
    for rows in _blocks(y):
        dy = _gradient(y, row, per_row, rows)
        row_sums[rows] = dy.sum(1)
        mass += dy.abs_().sum(0)
    return mass, row_sums


def choose_columns(
    mass: Tensor, row_of: Tensor, tolerance: float, sample_size: int, sample_dtype: torch.dtype
) -> ColumnChoice:
    """Choose the heaviest columns."""
    total = mass.sum()
    budget = tolerance * total
    # All columns below budget / V can go, none above the budget. Each round tries thresholds in a
    # geometric series from the best one so far.
    powers = torch.arange(STEPS, device=mass.device, dtype=mass.dtype)
    threshold = torch.where(total.isfinite(), budget / len(mass), 0)
    for finer in range(1, ROUNDS + 1):
        tried = threshold * len(mass) ** (powers / STEPS**finer)
        below = torch.where(mass < tried[:, None], mass, 0).sum(1)
        threshold = torch.where(below <= budget, tried, 0).amax()
    kept = ~(mass < threshold) & (mass != 0)
    left_out = torch.where(kept, 0, mass)
    vocab_indices = kept.nonzero()[:, 0]
    dweight_rows = row_of[vocab_indices]
    is_new = dweight_rows < 0
    new_rows = (row_of >= 0).sum() + is_new.cumsum(0) - 1
    dweight_rows = torch.where(is_new, new_rows, dweight_rows)
    counts = torch.stack([kept.sum(), is_new.sum()])
    sample, shares = _sample(left_out, sample_size)
    return ColumnChoice(
        vocab_indices,
        dweight_rows,
        row_of.index_copy(0, vocab_indices, dweight_rows),
        counts,
        torch.stack([left_out.sum(), total]),
        sample,
        shares.to(sample_dtype),
    )


def _sample(left_out: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the heaviest of every few columns, and their shares (1, size) of its mass."""
    count = min(size, len(left_out))
    stride = -(-len(left_out) // count)
    padded = pad(left_out, (0, stride * count - len(left_out)))
    heaviest, place = padded.view(stride, count).max(0)
    indices = place * count + torch.arange(count, device=place.device)
    total = heaviest.sum()
    shares = heaviest / torch.where(total > 0, total, 1)
    return indices.clamp(max=len(left_out) - 1), shares[None]  # padding has no share


def divergence_sums(terms: DivergenceTerms) -> Tensor:
    """Sum (10), and c of (11)."""
    y, row, ref_y, ref_row, per_row, beta = terms
    sums = per_row.new_zeros(2, y.shape[0])
    for rows in _blocks(y):
        log_p = _log_probabilities(y, row, per_row[:2], rows)
        log_q = _log_probabilities(ref_y, ref_row, per_row[2:4], rows)
        sums[:, rows] = reference_divergence.divergence_sums(log_p, log_q, per_row[4, rows], beta)
    return sums


def divergence_gradient(terms: DivergenceTerms, out: Tensor) -> None:
    """Write dy of (11) into out."""
    y, row, ref_y, ref_row, per_row, beta = terms
    for rows in _blocks(y):
        log_p = _log_probabilities(y, row, per_row[:2], rows)
        log_q = _log_probabilities(ref_y, ref_row, per_row[2:4], rows)
        pivot, centre, weight = per_row[4:, rows]
        dz = reference_divergence.divergence_row_gradient(log_p, log_q, pivot, centre, beta)
        dz *= weight[:, None]
        out[rows] = reference.through_transform(dz, _wide(y[rows]), _take_rows(row, rows))


def _log_probabilities(y: Tensor, row: RowTransform, sums: Tensor, rows: slice) -> Tensor:
    """Return log p (4) of these rows; sums are all rows' m and log s."""
    m, log_s = sums[:, rows]
    z = reference.transform(_wide(y[rows]), _take_rows(row, rows))
    return (z - m[:, None]) - log_s[:, None]


def take_columns(
    y: Tensor, row: RowTransform, vocab_indices: Tensor
) -> tuple[Tensor, RowTransform]:
    """Return a copy of these columns, and their transform, as if there were no others."""
    targets = row.targets
    if targets is not None:
        place = torch.searchsorted(vocab_indices, targets)
        is_taken = torch.searchsorted(vocab_indices, targets, right=True) > place
        targets = torch.where(is_taken, place, -1)
    bias = None if row.bias is None else row.bias[vocab_indices]
    return y.index_select(1, vocab_indices), row._replace(bias=bias, targets=targets)


def _gradient(y: Tensor, row: RowTransform, per_row: Tensor, rows: slice) -> Tensor:
    m, log_s, *factors = per_row[:, rows]
    terms = m, log_s, Coefficients(*factors)
    return reference.row_gradient(_wide(y[rows]), _take_rows(row, rows), *terms)


def _take_rows(row: RowTransform, rows: slice) -> RowTransform:
    return row._replace(
        inv_temperature=row.inv_temperature[rows],
        targets=None if row.targets is None else row.targets[rows],
    )
