"""The GEMM of all loops: operands may have 16 bits; accumulation and result are fp32 or fp64."""

import functools
import threading

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..kernels.cpu import is_built

# A GEMM that cannot take 16 bits and return fp32 upcasts its operand in slabs of this size.
UPCAST_BYTES = 16 << 20
BF16_ISAS = ("none", "AVX512-BF16", "AMX")  # as csrc/gemm_bf16.cpp numbers them

_widens: dict[tuple[torch.device, torch.dtype], bool] = {}
_fp16_flag_lock = threading.Lock()


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


def widens(x: Tensor) -> bool:
    """Return whether addmm of operands like x, of 16 bits on a GPU, returns their fp32 sums.

    ROCm refused, or wrote 16 bits, before torch 2.10 (pytorch issue 154221, pull request 162600).
    It is tried once per device and dtype, and waited for.
    """
    key = x.device, x.dtype
    if key not in _widens:
        if isinstance(x, FakeTensor) or torch.cuda.is_current_stream_capturing():
            return True  # there are no numbers, or reading them would break the capture
        a = torch.full((16, 16), 1 + 2**-6, dtype=x.dtype, device=x.device)
        out = torch.empty(16, 16, dtype=torch.float32, device=x.device)
        try:
            found = _addmm_into_fp32(out, a, a, beta=0, alpha=1)
            # A sum of 13 bits, more than bf16 and fp16 have
            _widens[key] = bool(found.eq(16 * (1 + 2**-6) ** 2).all())
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError):  # a torch without out_dtype raises TypeError
            _widens[key] = False
    return _widens[key]


def _addmm_into_fp32(out: Tensor, a: Tensor, b: Tensor, *, beta: int, alpha: float) -> Tensor:
    if a.dtype != torch.float16:
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    # cuBLAS has no fp16 accumulation beside an fp32 result: torch would raise. The flag is the
    # process's, hence the lock.
    flags = torch.backends.cuda.matmul
    with _fp16_flag_lock:
        is_allowed = flags.allow_fp16_accumulation
        flags.allow_fp16_accumulation = False
        try:
            return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
        finally:
            flags.allow_fp16_accumulation = is_allowed


def gemm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False, alpha: float = 1.0) -> Tensor:
    """Compute out (+)= alpha a @ b in out's dtype, whatever the operands' dtype; return out."""
    beta = 1 if accumulate else 0
    if a.dtype == b.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    if out.is_cuda and a.dtype == b.dtype and widens(a):
        return _addmm_into_fp32(out, a, b, beta=beta, alpha=alpha)
    in_bf16 = a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32 and alpha == 1
    if in_bf16 and out.is_cpu and bf16_isa() and _has_unit_stride(a) and _has_unit_stride(b):
        torch.ops.em_kernels.gemm_bf16(out, a, b, accumulate, bf16_isa())
        return out
    if out.is_cuda and a.numel() > b.numel():  # dy in 16 bits: the larger operand goes by slabs
        gemm(out.t(), b.t(), a.t(), accumulate, alpha)
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
