"""FLOP formula of csrc/gemm_bf16.cpp: import this for torch.utils.flop_counter to count the op.

It stands apart from torch_library.py because flop_counter imports Triton.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from ..kernels.cpu import is_built

if is_built():

    @register_flop_formula(torch.ops.em_kernels.gemm_bf16)
    def _gemm_bf16_flops(written_shape, a_shape, b_shape, *_, **__) -> int:  # noqa: ANN001
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]
