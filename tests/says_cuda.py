"""Tensors without memory that say they are CUDA's, on which the loops run as on a GPU."""

import contextlib

import torch

from em_kernels.kernels import self_test, triton
from em_kernels.ops import gemm
from em_kernels.ops.inputs import HeadInputs


def say_cuda(patch, kernel_of):
    """Make tensors say that they are CUDA's, and leave out what only a GPU can do.

    kernel_of: returns what stands in for the Triton kernel of a name.
    """
    patch.setattr(torch.Tensor, "is_cuda", True)
    patch.setattr(torch.cuda, "device_of", lambda y: contextlib.nullcontext())
    patch.setattr(triton, "_capability", lambda y: (9, 0))
    patch.setattr(triton, "_sm_count", lambda y: 132)
    for name in [name for name in vars(triton) if name.endswith("_kernel")]:
        patch.setattr(triton, name, kernel_of(name))
    patch.setattr(self_test, "tested_kernels", lambda x, out_dtype, results: triton)
    patch.setattr(gemm, "widens", lambda x: True)
    # Checks of values happen once a call, and need values.
    patch.setattr(HeadInputs, "check_and_find_active", lambda *_, **__: None)
