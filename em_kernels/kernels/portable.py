"""Row kernels in plain torch for any device and floating dtype.

They take a few rows at a time, so that temporaries stay small.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from ..reference import Coefficients, RowParts, RowTransform

BLOCK_ELEMENTS = 1 << 21  # logits at a time; the formulas hold about eight temporaries of this size


def _blocks(y: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, y.shape[1]))
    return (slice(start, start + rows) for start in range(0, y.shape[0], rows))


def row_statistics(
    y: Tensor, row: RowTransform, with_collision_and_argmax: bool = True
) -> RowParts:
    """Compute (1), argmax and the sums of (5) and (6)."""
    parts = [
        reference.row_parts(reference.transform(y[rows], block), block.targets)
        for rows in _blocks(y)
        for block in [_take_rows(row, rows)]
    ]
    if not parts:
        return RowParts._make([*y.new_empty(6, 0), y.new_empty(0, dtype=torch.int64)])
    return RowParts(*(torch.cat(field) for field in zip(*parts, strict=True)))


def row_gradient(
    y: Tensor, row: RowTransform, m: Tensor, log_s: Tensor, factors: Coefficients, out: Tensor
) -> None:
    """Write dy (8) into out."""
    for rows in _blocks(y):
        out[rows] = _gradient(y, row, m, log_s, factors, rows)


def column_mass(
    y: Tensor, row: RowTransform, m: Tensor, log_s: Tensor, factors: Coefficients
) -> tuple[Tensor, Tensor]:
    """Sum |dy| over the rows and dy over the columns."""
    mass, row_sums = y.new_zeros(y.shape[1]), torch.empty_like(m)
    for rows in _blocks(y):
        dy = _gradient(y, row, m, log_s, factors, rows)
        row_sums[rows] = dy.sum(1)
        mass += dy.abs_().sum(0)
    return mass, row_sums


def _gradient(
    y: Tensor, row: RowTransform, m: Tensor, log_s: Tensor, factors: Coefficients, rows: slice
) -> Tensor:
    factors = Coefficients(*(factor[rows] for factor in factors))
    return reference.row_gradient(y[rows], _take_rows(row, rows), m[rows], log_s[rows], factors)


def _take_rows(row: RowTransform, rows: slice) -> RowTransform:
    return row._replace(
        inv_temperature=row.inv_temperature[rows],
        targets=None if row.targets is None else row.targets[rows],
    )
