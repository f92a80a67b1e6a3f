"""Row kernels in C++ for the CPU (csrc/entropy_rows.cpp), fp32."""

import torch
from torch import Tensor

from ..reference import Coefficients, RowParts

try:
    from .. import _C  # type: ignore[attr-defined]

    WHY_NOT = ""
except ImportError as error:  # rows/__init__.py takes the portable rows
    _C, WHY_NOT = None, str(error)


def is_built() -> bool:
    """Whether the extension is there."""
    return _C is not None


def supports(y: Tensor) -> bool:
    return is_built() and y.device.type == "cpu" and y.dtype == torch.float32


def _contiguous(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def row_statistics(
    y: Tensor,
    bias: Tensor | None,
    inv_temperature: Tensor,
    logit_scale: float,
    softcap: float | None,
    targets: Tensor | None,
) -> RowParts:
    """Equation (1) and the sums of (5), (6)."""
    parts = y.new_empty(6, y.shape[0])
    argmax = torch.empty(y.shape[0], dtype=torch.int64)
    torch.ops.em_kernels.row_statistics(
        y,
        _contiguous(bias, torch.float32),
        inv_temperature,
        logit_scale,
        softcap,
        _contiguous(targets, torch.int64),
        parts,
        argmax,
    )
    return RowParts._make([*parts, argmax])


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
    torch.ops.em_kernels.row_gradient(
        y,
        _contiguous(bias, torch.float32),
        inv_temperature,
        logit_scale,
        softcap,
        _contiguous(targets, torch.int64),
        m,
        log_s,
        torch.stack(factors),
    )
    return y
