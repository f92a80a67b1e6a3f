"""Matrix products of the simulated CUDA device: the dtypes that CUDA takes."""

import torch

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


def check_product(function, arguments, named, is_old_rocm):
    """Raise what CUDA raises for the dtypes of a matrix product."""
    has_self = "add" in function._schema.name
    a, b = arguments[has_self : has_self + 2]
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        raise NotImplementedError(f'"addmm_cuda" not implemented for {a.dtype}')
    if not function._overloadname.startswith("dtype"):
        return
    out_dtype = arguments[has_self + 2]
    if a.dtype != b.dtype:
        raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {a.dtype}, {b.dtype}")
    if out_dtype != a.dtype and (out_dtype != torch.float32 or a.dtype.itemsize != 2):
        raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
    if is_old_rocm:
        raise RuntimeError(f"gemm input type {a.dtype} ... is not supported for ROCm")
    if a.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`")
    if "out" in named and named["out"].dtype != out_dtype:
        raise RuntimeError("out_dtype must be the same as the dtype of the provided out tensor")
    if has_self and arguments[0].dtype not in (out_dtype, a.dtype):
        raise RuntimeError("self dtype must match either out_dtype or mat1 dtype")


def product_in_fp32(*arguments, out=None, **scales):
    *matrices, dtype = arguments
    name = {2: ("mm", "bmm"), 3: ("addmm", "baddbmm")}[len(matrices)][matrices[-1].dim() - 2]
    found = getattr(torch, name)(*(x.to(dtype) for x in matrices), **scales)
    return found if out is None else out.copy_(found)
