"""Row kernels: a chunk of raw logits in, statistics or their gradient out. One file a device, one
interface:

row_statistics(y, row, everything) -> RowParts; q1, total and argmax may be None unless everything.
row_gradient(y, row, m, log_s, factors, out) writes dy into out.

y (rows, V) raw logits in fp32 or fp64, its columns contiguous; m, log_s and the factors (rows,) in
y's dtype; out (rows, V) separate, y itself, or y's own memory in a narrower dtype.
"""

from types import ModuleType

import torch
from torch import Tensor

from .. import reference
from ..reference import RowParts, RowTransform, TokenStats
from . import cpu, portable


def kernels_for(y: Tensor) -> ModuleType:
    """The fastest row kernels that this machine has for y."""
    return cpu if cpu.supports(y) else portable


def row_statistics(y: Tensor, row: RowTransform, everything: bool) -> RowParts:
    """Equation (1), and with everything argmax and the sums of (5) and (6)."""
    return kernels_for(y).row_statistics(y, row, everything)


def row_gradient(
    y: Tensor,
    row: RowTransform,
    m: Tensor,
    log_s: Tensor,
    stats: TokenStats,
    upstream: TokenStats,
    vocab_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Equation (8) in this dtype, (rows, V). It overwrites y, but on a GPU, whose blocks of a row
    run in any order, only where y has that dtype.
    """
    if y.dtype == dtype:
        out = y
    elif y.is_cuda:
        out = torch.empty_like(y, dtype=dtype)
    else:
        out = y.view(dtype)[:, : y.shape[1]]  # each row in its own first bytes
    factors = reference.coefficients(stats, upstream, vocab_size)
    kernels_for(y).row_gradient(y, row, m, log_s, factors, out)
    return out
