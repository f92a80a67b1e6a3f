"""Imported, lets torch.utils.flop_counter.FlopCounterMode count the op of csrc/gemm_bf16.cpp.

Apart from ops.py, as flop_counter imports Triton.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from ..kernels.cpu import is_built

if is_built():

    @register_flop_formula(torch.ops.em_kernels.gemm_bf16)
    def _gemm_bf16_flops(written_shape, a_shape, b_shape, *_, **__) -> int:  # noqa: ANN001
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]
