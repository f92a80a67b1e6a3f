import interpreted
import pytest
import torch
from hypothesis import settings

from em_kernels import rows as row_kernels
from em_kernels.rows import cpu, portable

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


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=ROWS)
def rows(request, monkeypatch):
    """The row kernels in use for fp32 on the CPU: portable, the extension's or Triton's."""
    if request.param is not cpu:
        monkeypatch.setattr(
            row_kernels,
            "kernels_for",
            lambda y: portable if y.dtype == torch.float64 else request.param,
        )
    return request.param
