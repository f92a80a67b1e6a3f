"""Row kernels in plain torch: any device, any floating dtype. A few rows at a time, so that
temporaries stay small.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from ..reference import Coefficients, RowParts

BLOCK_ELEMENTS = 1 << 21  # of logits; the formulas hold about eight temporaries of this size


def _blocks(y: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, y.shape[1]))
    return (slice(start, start + rows) for start in range(0, y.shape[0], rows))


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def row_statistics(
    y: Tensor,
    bias: Tensor | None,
    inv_temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
    targets: Tensor | None,
) -> RowParts:
    """Equation (1) and the sums of (5), (6)."""
    found = [
        reference.row_parts(
            reference.transform(
                _biased(y[rows], bias), inv_temperature[rows, None], logit_scale, softcap
            ),
            None if targets is None else targets[rows],
        )
        for rows in _blocks(y)
    ]
    if not found:
        return RowParts._make([*y.new_empty(6, 0), y.new_empty(0, dtype=torch.int64)])
    return RowParts(*(torch.cat(field) for field in zip(*found, strict=True)))


def row_gradient(
    y: Tensor,
    bias: Tensor | None,
    inv_temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
    targets: Tensor | None,
    m: Tensor,
    log_s: Tensor,
    factors: Coefficients,
) -> Tensor:
    """Equation (8)."""
    for rows in _blocks(y):
        y[rows] = reference.row_gradient(
            _biased(y[rows], bias),
            m[rows],
            log_s[rows],
            Coefficients(*(factor[rows] for factor in factors)),
            None if targets is None else targets[rows],
            inv_temperature[rows, None],
            logit_scale,
            softcap,
        )
    return y
