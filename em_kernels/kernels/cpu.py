"""Row kernels in C++ for fp32 logits on the CPU (csrc/entropy_rows.cpp)."""

import functools

import torch
from torch import Tensor

from ..reference import RowParts, RowTransform
from ..reference_divergence import DivergenceTerms

# These work on few values per row or column, for which plain torch is fast enough.
from .portable import choose_columns as choose_columns
from .portable import finish_rows as finish_rows
from .portable import gradient_factors as gradient_factors

try:
    from .. import _C  # type: ignore[attr-defined]

    WHY_NOT = ""
except ImportError as error:  # the portable kernels serve instead
    _C, WHY_NOT = None, str(error)


ISAS = ("baseline", "avx2", "avx512")  # as csrc/entropy_rows.cpp numbers them


def is_built() -> bool:
    """Return True if the C++ extension is loaded."""
    return _C is not None


@functools.cache
def isa() -> int:
    """Return the index in ISAS that the kernels use: the highest that this CPU has."""
    return torch.ops.em_kernels.row_isa()


def supports(y: Tensor) -> bool:
    """Return True if these kernels run on y."""
    return is_built() and y.device.type == "cpu" and y.dtype == torch.float32


def _contiguous(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def row_statistics(
    y: Tensor, row: RowTransform, with_collision_and_argmax: bool = True
) -> RowParts:
    """Compute (1), argmax and the sums of (5) and (6)."""
    parts = y.new_empty(6, y.shape[0])
    argmax = y.new_empty(y.shape[0], dtype=torch.int64)
    torch.ops.em_kernels.row_statistics(y, *_arguments(row), parts, argmax, isa())
    return RowParts._make([*parts[:, None], argmax[None]])


def row_gradient(y: Tensor, row: RowTransform, per_row: Tensor, out: Tensor) -> None:
    """Write dy (8) into out."""
    if out.dtype == torch.float16:
        wide = torch.empty_like(y)
        row_gradient(y, row, per_row, wide)
        out.copy_(wide)
        return
    m, log_s, factors = per_row[0], per_row[1], per_row[2:]
    torch.ops.em_kernels.row_gradient(y, *_arguments(row), m, log_s, factors, out, isa())


def column_mass(y: Tensor, row: RowTransform, per_row: Tensor) -> tuple[Tensor, Tensor]:
    """Sum |dy| over the rows and dy over the columns, to the same bits for any thread count."""
    m, log_s, factors = per_row[0], per_row[1], per_row[2:]
    mass, row_sums = y.new_empty(y.shape[1]), torch.empty_like(m)
    torch.ops.em_kernels.column_mass(y, *_arguments(row), m, log_s, factors, mass, row_sums, isa())
    return mass, row_sums


def divergence_sums(terms: DivergenceTerms) -> Tensor:
    """Sum (10), and c of (11)."""
    y, row, ref_y, ref_row, per_row, beta = terms
    sums = y.new_empty(2, y.shape[0])
    pair = (y, *_arguments(row)[:4], ref_y, *_head(ref_row), per_row, beta)
    torch.ops.em_kernels.divergence_sums(*pair, sums, isa())
    return sums


def divergence_gradient(terms: DivergenceTerms, out: Tensor) -> None:
    """Write dy of (11) into out."""
    y, row, ref_y, ref_row, per_row, beta = terms
    if out.dtype == torch.float16:
        wide = torch.empty_like(y)
        divergence_gradient(terms, wide)
        out.copy_(wide)
        return
    pair = (y, *_arguments(row)[:4], ref_y, *_head(ref_row), per_row, beta)
    torch.ops.em_kernels.divergence_gradient(*pair, out, isa())


def _head(row: RowTransform) -> tuple[Tensor | None, float, float | None]:
    return _contiguous(row.bias, torch.float32), row.logit_scale, row.softcap


def _arguments(row: RowTransform) -> RowTransform:
    return row._replace(
        bias=_contiguous(row.bias, torch.float32), targets=_contiguous(row.targets, torch.int64)
    )
