import contextlib
import gc
import os
import signal

import pytest
import torch
from hypothesis import settings
from kernel_params import CUDA, DWEIGHT, ROWS
from other_sums import other_sums
from simulated_cuda import NOT_SIMULATED, simulated
from spawned import use_tolerances
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from em_kernels import kernels as row_kernels
from em_kernels.kernels import cpu, portable
from em_kernels.ops.free_memory import free_host_bytes
from em_kernels.ops.inputs import HeadInputs

# torch keeps at the first use which functions make tensors on torch.device()'s device. Within
# transformers' loading, which replaces torch.linspace, it would keep the replacement.
_device_constructors()

pytest.register_assert_rewrite(
    *(f"training.{name}" for name in ("adapters", "lives", "processes", "updates"))
)
# Variables of the user or of this pytest run that programs started by tests would inherit.
OUTSIDE = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
for name in OUTSIDE:
    os.environ.pop(name, None)
# A shell starts background jobs with SIGINT ignored, which programs started by tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


# GPU tests that make test runs on the simulated device: a tenth, each in less than a second.
QUICK_SIMULATED = {
    *("test_any_upstream_per_token", "test_bias_counts", "test_choice_of_columns"),
    *("test_entropy_alone_has_its_gradient", "test_entropy_from_logits", "test_equal_logits"),
    *("test_frozen_inputs", "test_gradient_of_columns", "test_leading_dimensions"),
    *("test_offload_equals_the_cpu", "test_one_hot_rows", "test_shift_invariance"),
    *("test_entropy_of_a_sure_model", "test_words_masked_by_the_bias"),
}
WORKER_BYTES = 3 << 30  # the largest test with its child processes, rounded up


def pytest_xdist_auto_num_workers(config):
    """Return one worker per usable CPU, at most eight and as many as memory holds."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, min(cpus, free_host_bytes() // WORKER_BYTES, 8))
    os.environ.setdefault("OMP_NUM_THREADS", str(cpus // workers))  # per worker
    return workers


def pytest_addoption(parser):
    parser.addoption(
        "--other-sums",
        type=int,
        metavar="SEED",
        help="add up the terms of matrix products in another order, as another processor would",
    )


def pytest_configure(config):
    if (seed := config.getoption("--other-sums")) is not None:
        stack = contextlib.ExitStack()
        stack.enter_context(other_sums(seed))
        config.add_cleanup(stack.close)


def pytest_collection_finish():
    """Leave out of garbage collection what lives to the end.

    Modules and collected tests are 800,000 objects, whose collections take a tenth of the time of
    the tests (two cores, November 2026).
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Where there is no GPU, run its tests on a simulated one, most of them as slow tests, unless
    it is these alone that are asked for.
    """
    if torch.cuda.is_available() or config.option.markexpr == "gpu":
        return
    for item in [item for item in items if item.get_closest_marker("gpu")]:
        for node in item.listchain():
            node.own_markers[:] = [mark for mark in node.own_markers if not _needs_gpu(mark)]
        item.fixturenames.insert(0, "simulated_cuda")
        item.add_marker("simulated")
        if item.originalname not in QUICK_SIMULATED:
            item.add_marker("slow")
        if why := NOT_SIMULATED.get(item.name) or NOT_SIMULATED.get(item.originalname):
            item.add_marker(pytest.mark.skip(reason=why))


def _needs_gpu(mark):
    return mark.name == "gpu" or mark.kwargs.get("reason") == "needs a CUDA GPU"


@pytest.fixture
def simulated_cuda(monkeypatch):
    with simulated(monkeypatch) as cuda:
        yield cuda


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def tolerances_of_tests(monkeypatch):
    use_tolerances(monkeypatch.setattr)


@pytest.fixture(params=[*ROWS, CUDA])
def rows(request, monkeypatch):
    """Run the test with the row kernels of each device; for CUDA its tensors are moved there."""
    if request.param == "cuda":
        request.getfixturevalue("on_cuda")
    elif request.param is not cpu:
        monkeypatch.setattr(
            row_kernels,
            "kernels_for",
            lambda y, *_: portable if y.dtype == torch.float64 else request.param,
        )


@pytest.fixture(params=DWEIGHT)
def dweight(request, monkeypatch):
    """Run the test with dweight multiplied once from a kept dy, and added up chunk by chunk."""

    def keeps_dy(self, needs):
        return request.param == "kept" and self.grad_tolerance == 0 and needs.weight

    monkeypatch.setattr(HeadInputs, "keeps_dy", keeps_dy)


@pytest.fixture
def on_cuda(request, monkeypatch):
    """Create tensors on the GPU, and move those of the test's module and parameters there."""
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
    """Mode in which random tensors on the GPU get the values of the CPU's generator."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function not in (torch.rand, torch.randn, torch.randint, torch.randperm):
            return function(*arguments, **named)
        grad = named.pop("requires_grad", False)
        found = function(*arguments, **{"device": "cpu"} | named)
        return found.to(named.get("device", "cuda")).requires_grad_(grad)
