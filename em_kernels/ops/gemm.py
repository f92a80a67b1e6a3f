"""The GEMM of all loops: operands may have 16 bits; accumulation and result are fp32 or fp64."""

import functools

import torch
from torch import Tensor

from ..kernels.cpu import is_built

# A GEMM that cannot take 16 bits and return fp32 upcasts its operand in slabs of this size.
UPCAST_BYTES = 16 << 20
BF16_ISAS = ("none", "AVX512-BF16", "AMX")  # as csrc/gemm_bf16.cpp numbers them


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def bf16_isa() -> int:
    """Return which of BF16_ISAS csrc/gemm_bf16.cpp uses on this CPU, 0 where it cannot run."""
    return torch.ops.em_kernels.gemm_bf16_isa() if is_built() else 0


def operand_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype to which the logit gradient is rounded for the GEMMs with weight."""
    takes_16_bits = weight.is_cuda or (weight.dtype == torch.bfloat16 and bf16_isa() > 0)
    return weight.dtype if takes_16_bits else accumulation_dtype(weight.dtype)


def _has_unit_stride(x: Tensor) -> bool:
    return 1 in x.stride() or min(x.shape) <= 1


def gemm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False, alpha: float = 1.0) -> Tensor:
    """Compute out (+)= alpha a @ b in out's dtype, whatever the operands' dtype; return out."""
    beta = 1 if accumulate else 0
    if a.dtype == b.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    if out.is_cuda and a.dtype == b.dtype:
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    in_bf16 = a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32 and alpha == 1
    if in_bf16 and out.is_cpu and bf16_isa() and _has_unit_stride(a) and _has_unit_stride(b):
        torch.ops.em_kernels.gemm_bf16(out, a, b, accumulate, bf16_isa())
        return out
    a = a.to(out.dtype)
    inner, columns = b.shape
    step = max(1, UPCAST_BYTES // (out.element_size() * max(1, min(inner, columns))))
    if columns >= inner:
        for i in range(0, columns, step):
            gemm(out[:, i : i + step], a, b[:, i : i + step].to(out.dtype), accumulate, alpha)
    else:
        for i in range(0, inner, step):
            gemm(out, a[:, i : i + step], b[i : i + step].to(out.dtype), accumulate or i > 0, alpha)
    return out
