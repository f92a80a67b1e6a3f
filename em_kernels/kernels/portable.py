"""Row kernels in plain torch: any device, any floating dtype. A few rows at a time, so that
temporaries stay small.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from ..reference import Coefficients, RowParts, RowTransform

BLOCK_ELEMENTS = 1 << 21  # of logits; the formulas hold about eight temporaries of this size


def _blocks(y: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, y.shape[1]))
    return (slice(start, start + rows) for start in range(0, y.shape[0], rows))


def row_statistics(y: Tensor, row: RowTransform, with_collision_and_argmax: bool = True) -> RowParts:
    """Equation (1) and the sums of (5), (6)."""
    found = [
        reference.row_parts(reference.transform(y[rows], part), part.targets)
        for rows in _blocks(y)
        for part in [_part(row, rows)]
    ]
    if not found:
        return RowParts._make([*y.new_empty(6, 0), y.new_empty(0, dtype=torch.int64)])
    return RowParts(*(torch.cat(field) for field in zip(*found, strict=True)))


def row_gradient(
    y: Tensor, row: RowTransform, m: Tensor, log_s: Tensor, factors: Coefficients, out: Tensor
) -> None:
    """Equation (8)."""
    for rows in _blocks(y):
        out[rows] = _gradient(y, row, m, log_s, factors, rows)


def column_mass(
    y: Tensor, row: RowTransform, m: Tensor, log_s: Tensor, factors: Coefficients
) -> tuple[Tensor, Tensor]:
    """Sums of (8): of |dy| by column, of dy by row."""
    mass, row_sums = y.new_zeros(y.shape[1]), torch.empty_like(m)
    for rows in _blocks(y):
        dy = _gradient(y, row, m, log_s, factors, rows)
        row_sums[rows] = dy.sum(1)
        mass += dy.abs_().sum(0)
    return mass, row_sums


def _gradient(
    y: Tensor, row: RowTransform, m: Tensor, log_s: Tensor, factors: Coefficients, rows: slice
) -> Tensor:
    part = Coefficients(*(factor[rows] for factor in factors))
    return reference.row_gradient(y[rows], _part(row, rows), m[rows], log_s[rows], part)


def _part(row: RowTransform, rows: slice) -> RowTransform:
    return row._replace(
        inv_temperature=row.inv_temperature[rows],
        targets=None if row.targets is None else row.targets[rows],
    )
