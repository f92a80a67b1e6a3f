"""A GPU whose Triton kernels do not work uses the portable ones, after one warning.

The GPU is the simulated one, whose kernels Triton's interpreter runs.
"""

import sys
import threading
import warnings
from subprocess import CalledProcessError

import pytest
import torch
from kernel_params import needs_extension
from simulated_cuda import LOGIT_DTYPES
from simulated_tensors import CUDA
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources
from truth import draw

from em_kernels import entropy_from_logits, fused_entropy_loss, fused_token_stats
from em_kernels.cli import main
from em_kernels.kernels import cpu, kernels_for, portable, self_test, triton

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
KERNELS = [name for name in vars(triton) if name.endswith("_kernel")]
# As triton/runtime/build.py raises it.
NO_COMPILER = RuntimeError(
    "Failed to find C compiler. Please specify via CC environment variable or set "
    "triton.knobs.build.impl."
)


@pytest.fixture
def first_use(monkeypatch, request):
    """A simulated GPU that nothing has used yet; its self-test runs on few rows."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA GPU is there")
    cuda = request.getfixturevalue("simulated_cuda")
    monkeypatch.setattr(self_test, "_chosen", {})
    monkeypatch.setattr(self_test, "ROWS", 2)
    return cuda


class Failing:
    """A kernel whose launch raises."""

    def __init__(self, error):
        self.error, self.launches = error, 0

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **named):
        self.launches += 1
        raise self.error


class Wrong:
    """A kernel that is right but for one number in each of its results."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            tensors = [x for x in (*arguments, *named.values()) if torch.is_tensor(x)]
            before = [x.clone() for x in tensors]
            self.kernel[grid](*arguments, **named)
            for x, old in zip(tensors, before, strict=True):
                written = ~((x == old) | (x.isnan() & old.isnan()))
                if written.any():
                    last = tuple(written.nonzero()[-1].tolist())
                    x[last] = 2 * x[last] + 1

        return launch


def loss_and_gradients(device, dtype=BF16, tolerance=0.0):
    hidden, weight = (x.detach().to(device, dtype) for x in draw(6, 16, 300, dtype=dtype)[:2])
    hidden.requires_grad_(), weight.requires_grad_()
    loss = fused_entropy_loss(hidden, weight, temperature=0.5, grad_tolerance=tolerance)
    return [x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))]


def assert_right_numbers():
    for found, expected in zip(loss_and_gradients("cuda"), loss_and_gradients("cpu"), strict=True):
        tolerance = 2**-7 * expected.abs().max().item()
        assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("results", [self_test.row_results, self_test.divergence_results])
@pytest.mark.parametrize("kernels", [portable, pytest.param(cpu, marks=needs_extension)])
def test_kernels_of_the_cpu_pass(kernels, results):
    assert self_test.wrong_result(kernels, CPU, FP32, FP32, results) == ""


def test_the_choice_of_columns_is_not_a_matter_of_rounding():
    """In fp32 and fp64, and with budgets a little smaller and larger, it is the same."""
    given = self_test.problem()
    found = [
        portable.choose_columns(given.mass.to(dtype), given.row_of, tolerance, 8, FP32)
        for dtype in (FP32, torch.float64)
        for tolerance in (self_test.COLUMN_TOLERANCE * x for x in (1 - 1e-5, 1, 1 + 1e-5))
    ]
    assert all(torch.equal(x.vocab_indices, found[0].vocab_indices) for x in found)
    assert 100 < len(found[0].vocab_indices) < self_test.COLUMNS - 100


def test_values_are_the_same_in_all_dtypes():
    y = self_test.problem().y
    assert all(torch.equal(y.to(dtype).float(), y) for dtype in LOGIT_DTYPES)


def test_first_use(first_use):
    """The test runs once for each pair of dtypes, and leaves the caller's random numbers alone."""
    state = torch.get_rng_state()
    y = torch.ones(1, 16, device="cuda")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="em_kernels")
        assert kernels_for(y) is triton
        steps = first_use.steps
        assert steps > 0 and kernels_for(y) is triton and first_use.steps == steps
        assert kernels_for(y.double()) is portable
    assert torch.equal(torch.get_rng_state(), state)
    assert self_test.failure(CUDA) == ""


@pytest.mark.parametrize(
    "error, told",
    [
        (NO_COMPILER, "Triton needs a C compiler at run time; install gcc, or set CC"),
        (FileNotFoundError(2, "No such file or directory: 'icc'"), "install gcc and Python's"),
        (CalledProcessError(1, ["gcc", "main.c"]), "install gcc and Python's headers"),
        (CompilationError("def f():\n  x", None, "no such op"), "CompilationError: no such op"),
        (OutOfResources(70000, 65536, "shared memory"), "OutOfResources: out of resource: shared"),
    ],
)
def test_a_kernel_that_does_not_run(error, told, first_use, monkeypatch):
    kernel = Failing(error)
    monkeypatch.setattr(triton, "row_statistics_kernel", kernel)
    with pytest.warns(UserWarning, match="cuda:0 uses the portable kernels") as caught:
        assert_right_numbers()
    (warning,) = caught
    assert told in str(warning.message) and "\n" not in str(warning.message)
    assert kernel.launches == 1 and told in self_test.failure(CUDA)


@pytest.mark.parametrize(
    "name",
    [KERNELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in KERNELS[1:])],
)
def test_a_kernel_that_is_wrong(name, first_use, monkeypatch):
    monkeypatch.setattr(triton, name, Wrong(getattr(triton, name)))
    results = self_test.divergence_results if "divergence" in name else self_test.row_results
    with pytest.warns(UserWarning, match="the Triton kernels .* give .*; please report it"):
        assert kernels_for(torch.ones(1, 16, device="cuda"), None, results) is portable


def test_failure_in_16_bits_after_fp32(first_use, monkeypatch):
    """A device on which any pair of dtypes fails has no Triton kernels from then on."""
    y = torch.ones(1, 16, device="cuda")
    assert kernels_for(y) is triton
    monkeypatch.setattr(triton, "row_gradient_kernel", Wrong(triton.row_gradient_kernel))
    with pytest.warns(UserWarning, match="float32 to bfloat16"):
        assert kernels_for(y, BF16) is portable
    assert kernels_for(y) is portable and kernels_for(y.half()) is portable
    assert_right_numbers()


@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_all_that_falls_back(tolerance, first_use, monkeypatch):
    """16-bit logits too: the portable kernels compute in fp32."""
    monkeypatch.setitem(self_test._failures, CUDA, "a test wants it")
    ours, host = (loss_and_gradients(x, FP32, tolerance) for x in ("cuda", "cpu"))
    for found, expected in zip(ours, host, strict=True):
        assert_close(found, expected, rtol=1e-4, atol=1e-6)
    hidden, weight, _, targets = draw(6, 16, 300)
    stats = [
        fused_token_stats(hidden.to(x), weight.to(x), targets.to(x)).logprob.cpu()
        for x in ("cuda", "cpu")
    ]
    assert_close(*stats, rtol=1e-5, atol=1e-5)
    logits = (torch.randn(5, 300) * 4).bfloat16()
    entropy = [entropy_from_logits(logits.to(x)).cpu() for x in ("cuda", "cpu")]
    assert_close(*entropy, rtol=1e-5, atol=1e-6)
    assert first_use.steps == 0


@pytest.mark.parametrize(
    "module, told",
    [("triton", "Triton is not installed"), ("triton.language", "Triton does not load")],
)
def test_without_triton(module, told, first_use, monkeypatch):
    for ours in [x for x in sys.modules if x.startswith("em_kernels.kernels.triton")]:
        monkeypatch.delitem(sys.modules, ours)
    monkeypatch.delattr("em_kernels.kernels.triton")
    monkeypatch.setitem(sys.modules, module, None)  # which makes its import fail
    with pytest.warns(UserWarning, match=told) as caught:
        assert_right_numbers()
    assert len(caught) == 1


def test_threads_wait_for_one_test(first_use, monkeypatch):
    calls, both, found = [], threading.Barrier(2), []

    def why_not(*key):
        calls.append(key)
        with pytest.raises(threading.BrokenBarrierError):  # no other thread comes here
            both.wait(timeout=0.1)
        return ""

    monkeypatch.setattr(self_test, "_why_not", why_not)
    y = torch.ones(1, 16, device="cuda")
    threads = [threading.Thread(target=lambda: found.append(kernels_for(y))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [triton] * 2 and calls == [(CUDA, FP32, FP32, self_test.row_results)]


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_test_where_nothing_is_computed(dtype, monkeypatch):
    monkeypatch.setattr(self_test, "_chosen", {})
    monkeypatch.setattr(triton, "row_statistics_kernel", Failing(AssertionError("was run")))
    with FakeTensorMode():
        assert kernels_for(torch.empty(1, 16, dtype=dtype, device="cuda")) is portable
    assert not self_test._chosen


def test_capture(first_use, monkeypatch):
    """Before the first use a graph records the portable kernels; afterwards Triton's."""
    y = torch.ones(1, 16, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match="call the function once before the capture"):
        assert kernels_for(y) is portable
    assert first_use.steps == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernels_for(y) is triton
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kernels_for(y) is triton


def test_info_says_why(first_use, monkeypatch, capfd):
    monkeypatch.setattr(triton, "row_statistics_kernel", Failing(NO_COMPILER))
    assert main(["info"]) == 0
    out = capfd.readouterr().out
    assert "portable, plain torch: Triton needs a C compiler" in out
