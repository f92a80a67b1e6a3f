"""The row kernels that a test is run on: parameters of pytest, each with what it needs."""

import functools

import interpreted
import pytest
import torch

from em_kernels.kernels import cpu, portable

needs_extension = pytest.mark.skipif(cpu._C is None, reason="em_kernels._C is not built")
ROWS = [
    pytest.param(portable, id="portable"),
    pytest.param(cpu, id="cpu", marks=needs_extension),
]


class OlderCpu:
    """The extension's kernels as a CPU runs them that has no higher instruction set."""

    def __init__(self, isa):
        self.isa = isa

    def __getattr__(self, name):
        function = getattr(cpu, name)

        @functools.wraps(function)
        def run(*arguments, **named):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cpu, "isa", lambda: self.isa)
                return function(*arguments, **named)

        return run


# ROWS run what this CPU would choose; these are the instruction sets that it has beside.
OLDER = [
    pytest.param(OlderCpu(isa), id=f"cpu-{cpu.ISAS[isa]}", marks=needs_extension)
    for isa in range(cpu.isa() if cpu.is_built() else 0)
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
