"""The one GEMM: 16-bit operands, fp32 accumulation and result."""

import torch
from torch import Tensor

# of a weight slab, where a GEMM cannot take 16 bits and return fp32
UPCAST_BYTES = 16 << 20


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(weight: Tensor) -> torch.dtype:
    """What the row gradient is rounded to for the GEMMs with weight."""
    return weight.dtype if weight.is_cuda else accumulation_dtype(weight.dtype)


def gemm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> Tensor:
    """out (+)= a @ b, computed and returned in out's dtype whatever the operands' dtype."""
    beta = 1 if accumulate else 0
    if a.dtype == b.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, out=out)
    if out.is_cuda and a.dtype == b.dtype:
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    a = a.to(out.dtype)
    inner, columns = b.shape
    step = max(1, UPCAST_BYTES // (out.element_size() * max(1, min(inner, columns))))
    if columns >= inner:
        for i in range(0, columns, step):
            gemm(out[:, i : i + step], a, b[:, i : i + step].to(out.dtype), accumulate)
    else:
        for i in range(0, inner, step):
            gemm(out, a[:, i : i + step], b[i : i + step].to(out.dtype), accumulate or i > 0)
    return out
