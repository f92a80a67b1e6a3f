import signal

import interpreted
import pytest
import torch
from hypothesis import settings
from torch.overrides import TorchFunctionMode

from em_kernels import rows as row_kernels
from em_kernels.rows import cpu, portable

pytest.register_assert_rewrite(
    *(f"training.{name}" for name in ("adapters", "lives", "processes", "updates"))
)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

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


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=[*ROWS, CUDA])
def rows(request, monkeypatch):
    """The row kernels in use for fp32 on the CPU: portable, the extension's or Triton's; or those
    that a GPU has, for a test whose tensors are there.
    """
    if request.param == "cuda":
        request.getfixturevalue("on_cuda")
    elif request.param is not cpu:
        monkeypatch.setattr(
            row_kernels,
            "kernels_for",
            lambda y: portable if y.dtype == torch.float64 else request.param,
        )


on_cpu_only = pytest.mark.parametrize("rows", ROWS, indirect=True)


@pytest.fixture
def on_cuda(request, monkeypatch):
    """Tensors are made on the GPU; those of the test's module and parameters are moved there."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    for names in (request.function.__globals__, parameters):
        for name in [name for name in names if not name.startswith("__")]:
            monkeypatch.setitem(names, name, _on_cuda(names[name]))
    with torch.device("cuda"), _NumbersOfTheCpu():
        yield


def _on_cuda(x):
    if torch.is_tensor(x):
        return x.cuda()
    if isinstance(x, dict):
        return {key: _on_cuda(value) for key, value in x.items()}
    return [_on_cuda(value) for value in x] if type(x) is list else x


class _NumbersOfTheCpu(TorchFunctionMode):
    """Random tensors made on the GPU hold what they would on the CPU."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function not in (torch.rand, torch.randn, torch.randint, torch.randperm):
            return function(*arguments, **named)
        grad = named.pop("requires_grad", False)
        found = function(*arguments, **{"device": "cpu"} | named)
        return found.to(named.get("device", "cuda")).requires_grad_(grad)
