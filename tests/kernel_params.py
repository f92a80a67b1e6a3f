"""Row kernels as pytest parameters, each with the marks that it needs."""

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
    """The extension's kernels on a CPU whose highest instruction set is `isa`."""

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


# ROWS run the instruction set that this CPU chooses; these are its others.
OLDER = [
    pytest.param(OlderCpu(isa), id=f"cpu-{cpu.ISAS[isa]}", marks=needs_extension)
    for isa in range(cpu.isa() if cpu.is_built() else 0)
]
interpreted_triton = interpreted.load()
TRITON = pytest.param(
    interpreted_triton,
    id="triton",
    # numpy warns of NaN and infinities, which the tests want.
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
DWEIGHT = ["kept", "accumulated"]  # parameters of the fixture `dweight`
on_cpu_only = pytest.mark.parametrize("rows", ROWS, indirect=True)
