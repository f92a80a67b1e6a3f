"""Row kernels: a chunk of raw logits in, statistics or their gradient out. One file a device, one
interface:

row_statistics(y, row, with_collision_and_argmax) -> RowParts; q1, total and argmax may be None unless with_collision_and_argmax.
row_gradient(*RowTerms, out) writes dy into out.
column_mass(*RowTerms) -> sums of |dy| by column (V,), of dy by row (rows,).

y (rows, V) raw logits in fp32 or fp64 (Triton: in 16 bits too), its columns contiguous; m, log_s
and the factors (rows,) in the accumulation dtype; out (rows, V) separate, or a gradient_buffer.
"""

from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import Coefficients, RowParts, RowTransform
from . import cpu, portable


class RowTerms(NamedTuple):
    """All that (8) is made of."""

    y: Tensor  # (rows, V) raw logits
    row: RowTransform
    m: Tensor  # (rows,)
    log_s: Tensor  # (rows,)
    factors: Coefficients


def kernels_for(y: Tensor) -> ModuleType:
    """The fastest row kernels that this machine has for y."""
    if y.is_cuda and y.dtype != torch.float64 and find_spec("triton"):
        from . import triton  # slow to import

        return triton
    return cpu if cpu.supports(y) else portable


def row_statistics(y: Tensor, row: RowTransform, with_collision_and_argmax: bool) -> RowParts:
    """Equation (1), and with with_collision_and_argmax argmax and the sums of (5) and (6)."""
    return kernels_for(y).row_statistics(y, row, with_collision_and_argmax)


def row_gradient(terms: RowTerms, out: Tensor) -> Tensor:
    """Equation (8) in out's dtype, (rows, V)."""
    kernels_for(terms.y).row_gradient(*terms, out)
    return out


def column_mass(terms: RowTerms) -> tuple[Tensor, Tensor]:
    """Sums of |dy| over the rows (V,) and of dy over the columns (rows,), for equation (8)'s dy,
    which is not stored.
    """
    return kernels_for(terms.y).column_mass(*terms)


def row_stride(columns: int, device: torch.device) -> int:
    """Elements from one row of logits to the next: on a GPU rows begin where vector loads can."""
    return columns if device.type == "cpu" else -(-columns // 16) * 16


def gradient_buffer(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the gradient of y, (rows, V): y's own, each row's first bytes where the dtype is
    narrower; but not on a GPU, whose blocks of a row run in any order.
    """
    if y.dtype == dtype:
        return y
    if y.is_cuda:
        return y.new_empty(y.shape[0], y.stride(0), dtype=dtype)[:, : y.shape[1]]
    return y.view(dtype)[:, : y.shape[1]]
