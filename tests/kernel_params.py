"""The row kernels that a test is run on: parameters of pytest, each with what it needs."""

import interpreted
import pytest
import torch

from em_kernels.rows import cpu, portable

needs_extension = pytest.mark.skipif(cpu._C is None, reason="em_kernels._C is not built")
ROWS = [
    pytest.param(portable, id="portable"),
    pytest.param(cpu, id="cpu", marks=needs_extension),
]
interpreted_triton = interpreted.load()
TRITON = pytest.param(
    interpreted_triton,
    id="triton",
    # of NaN and infinities, which are wanted
    marks=pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
)
CUDA = pytest.param(
    "cuda",
    id="cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ],
)
on_cpu_only = pytest.mark.parametrize("rows", ROWS, indirect=True)
