"""Row kernels: a chunk of raw logits in, statistics or their gradient out.

One file per device, each with the same interface:

row_statistics(y, row, with_collision_and_argmax) -> RowParts; without collision and argmax its q1,
    total and argmax may be None.
row_gradient(*RowTerms, out) writes dy into out.
column_mass(*RowTerms) -> sums of |dy| over the rows (V,), sums of dy over the columns (rows,).

y (rows, V) holds raw logits in fp32 or fp64 (for Triton also in 16 bits), each row contiguous; m,
log_s and the factors (rows,) are in the accumulation dtype; out (rows, V) is separate memory or a
gradient_buffer.
"""

from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import Coefficients, RowParts, RowTransform
from . import cpu, portable


class RowTerms(NamedTuple):
    """The terms of equation (8)."""

    y: Tensor  # (rows, V) raw logits
    row: RowTransform
    m: Tensor  # (rows,)
    log_s: Tensor  # (rows,)
    factors: Coefficients


def kernels_for(y: Tensor) -> ModuleType:
    """Return the fastest row kernels that this machine has for y."""
    if y.is_cuda and y.dtype != torch.float64 and find_spec("triton"):
        from . import triton  # imported only here, as it is slow to import

        return triton
    return cpu if cpu.supports(y) else portable


def row_statistics(y: Tensor, row: RowTransform, with_collision_and_argmax: bool) -> RowParts:
    """Compute (1); with_collision_and_argmax adds argmax and the sums of (5) and (6)."""
    return kernels_for(y).row_statistics(y, row, with_collision_and_argmax)


def row_gradient(terms: RowTerms, out: Tensor) -> Tensor:
    """Write dy (8), (rows, V), into out, in its dtype; return out."""
    kernels_for(terms.y).row_gradient(*terms, out)
    return out


def column_mass(terms: RowTerms) -> tuple[Tensor, Tensor]:
    """Return the sums of |dy| over the rows (V,) and of dy over the columns (rows,).

    dy is equation (8)'s, and is not stored.
    """
    return kernels_for(terms.y).column_mass(*terms)


def row_stride(columns: int, device: torch.device) -> int:
    """Return the elements from one row of logits to the next; a GPU's rows allow vector loads."""
    return columns if device.type == "cpu" else -(-columns // 16) * 16


def gradient_buffer(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for the gradient of y, (rows, V).

    It is y's own memory, of which a narrower dtype takes each row's first bytes. On a GPU, where
    the blocks of a row run in any order, a narrower dtype gets new memory.
    """
    if y.dtype == dtype:
        return y
    if y.is_cuda:
        return y.new_empty(y.shape[0], y.stride(0), dtype=dtype)[:, : y.shape[1]]
    return y.view(dtype)[:, : y.shape[1]]
