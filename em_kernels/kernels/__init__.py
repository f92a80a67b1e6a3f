"""Row kernels: a chunk of raw logits in, statistics or their gradient out.

One file per device, each with the same functions, which are documented here. They get the fields of
RowTerms one by one, and DivergenceTerms whole; only Triton's has gradient_of_columns, for which the
others have parts. They know one target a row; what several need is added here, on the few values at
them. y (rows, V) holds raw logits in fp32 or fp64 (on a GPU also in 16 bits), each row contiguous;
statistics and everything per row are in the accumulation dtype; a gradient is written into separate
memory or a gradient_buffer.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference import RowParts, RowTransform, TokenStats
from ..reference_divergence import DivergenceTerms
from . import cpu, portable, self_test
from .portable import ColumnChoice, FinishedRows


class RowTerms(NamedTuple):
    """The terms of equation (8)."""

    y: Tensor  # (rows, V) raw logits
    row: RowTransform
    per_row: Tensor  # (8, rows): m, log s, and the Coefficients


def kernels_for(
    x: Tensor,
    out_dtype: torch.dtype | None = None,
    results: self_test.Results = self_test.row_results,
) -> ModuleType:
    """Return the fastest row kernels that this machine has for x, logits or their statistics.

    Args:
        out_dtype: in which the results are written, where it is not x's.
        results: by which a GPU's kernels are tested.
    """
    if x.is_cuda and x.dtype != torch.float64:
        return self_test.tested_kernels(x, out_dtype or x.dtype, results)
    return cpu if cpu.supports(x) else portable


def row_statistics(y: Tensor, row: RowTransform, with_collision_and_argmax: bool) -> RowParts:
    """Compute (1), with fields (parts, rows): a GPU splits few rows into several parts.

    with_collision_and_argmax adds argmax and the sums of (5) and (6), which are None or without
    meaning otherwise.
    """
    return kernels_for(y).row_statistics(y, _with_one_target(row), with_collision_and_argmax)


def finish_rows(parts: RowParts, vocab_size: int, targets: Tensor | None) -> FinishedRows:
    """Merge the parts of whole rows by (7) and compute their statistics, (2) to (6).

    targets (rows,) are counted over the whole vocabulary; of several a row there is no logprob.
    """
    if targets is not None and targets.dim() == 2:
        targets = None
    return kernels_for(parts.m).finish_rows(parts, vocab_size, targets)


def gradient_factors(rows: FinishedRows, upstream: TokenStats, vocab_size: int) -> Tensor:
    """Compute RowTerms.per_row (8, rows) from the statistics' upstream gradients (None: none).

    Of several targets a row, whose logprob and its upstream are (rows, K), gamma is their sum.
    """
    if upstream.logprob is not None and upstream.logprob.dim() == 2:
        upstream = upstream._replace(logprob=upstream.logprob.sum(1))
        rows = rows._replace(stats=rows.stats._replace(logprob=torch.zeros_like(rows.m)))
    return kernels_for(rows.m).gradient_factors(rows, upstream, vocab_size)


def row_gradient(terms: RowTerms, out: Tensor, logprob_upstream: Tensor | None = None) -> Tensor:
    """Write dy (8), (rows, V), into out, in its dtype; return out.

    logprob_upstream: (rows, K) where there are several targets a row; else it is not read.
    """
    at_targets = None
    if logprob_upstream is not None and logprob_upstream.dim() == 2:
        # Before y is overwritten, whose memory `out` may be.
        at_targets = reference.gradient_at_targets(*terms, logprob_upstream)
    y, row, per_row = terms
    kernels_for(y, out.dtype).row_gradient(y, _with_one_target(row), per_row, out)
    if at_targets is not None:
        out.scatter_(1, at_targets[0], at_targets[1].to(out.dtype))
    return out


def _with_one_target(row: RowTransform) -> RowTransform:
    several = row.targets is not None and row.targets.dim() == 2
    return row._replace(targets=None) if several else row


def column_mass(terms: RowTerms) -> tuple[Tensor, Tensor]:
    """Return the sums of |dy| over the rows (V,) and of dy over the columns (rows,).

    dy is equation (8)'s, and is not stored.
    """
    return kernels_for(terms.y).column_mass(*terms)


def choose_columns(
    mass: Tensor, row_of: Tensor, tolerance: float, sample_size: int, sample_dtype: torch.dtype
) -> ColumnChoice:
    """Choose the heaviest columns, which hold all but `tolerance` of the mass.

    Args:
        mass: (V,) of each column.
        row_of: (V,) int64; the row that a column of an earlier choice has in dweight, -1 for those
            that were in none. New columns get the next rows, in ascending order.
        tolerance: share of the mass that may be left out.
        sample_size: columns left out whose indices and shares are returned at most.
        sample_dtype: dtype of these shares.
    """
    kernels = kernels_for(mass, sample_dtype)
    return kernels.choose_columns(mass, row_of, tolerance, sample_size, sample_dtype)


def gradient_of_columns(
    terms: RowTerms, vocab_indices: Tensor, dtype: torch.dtype, residual: Tensor
) -> Tensor:
    """Return dy (8), (rows, K), of some columns, whose indices (K,) ascend.

    dy's sums over them are subtracted from residual (rows,).
    """
    kernels = kernels_for(terms.y, dtype)
    if hasattr(kernels, "gradient_of_columns"):  # gathers and computes at once
        return kernels.gradient_of_columns(*terms, vocab_indices, dtype, residual)
    taken = portable.take_columns(terms.y, terms.row, vocab_indices)
    residual -= kernels.column_mass(*taken, terms.per_row)[1]
    out = gradient_buffer(taken[0], dtype)
    kernels.row_gradient(*taken, terms.per_row, out)
    return out


def divergence_sums(terms: DivergenceTerms) -> Tensor:
    """Return the sums (2, rows) of (10), and c of (11), over these columns.

    Of per_row the first five are read.
    """
    kernels = kernels_for(terms.y, None, self_test.divergence_results)
    return kernels.divergence_sums(terms)


def divergence_gradient(terms: DivergenceTerms, out: Tensor) -> Tensor:
    """Write dy of (11), times the rows' weights, into out, in its dtype; return out."""
    kernels = kernels_for(terms.y, out.dtype, self_test.divergence_results)
    kernels.divergence_gradient(terms, out)
    return out


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
