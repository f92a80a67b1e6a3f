"""The simulated CUDA device refuses, poisons and counts what a real one would."""

from types import SimpleNamespace

import pytest
import torch
from kernel_params import interpreted_triton
from simulated_memory import BLOCK_BYTES
from simulated_tensors import TOTAL_BYTES
from torch.testing import assert_close

from em_kernels import fused_entropy_loss
from em_kernels.kernels import triton
from em_kernels.ops.gemm import gemm, widens
from em_kernels.ops.sparse import AsyncCounts
from em_kernels.training.engines.offload import Bounce

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is there"),
    pytest.mark.usefixtures("simulated_cuda"),
]
N = 6
BF16, FP32 = torch.bfloat16, torch.float32


def on_gpu(*shape, **named):
    return torch.randn(*shape, device="cuda", **named)


def pinned(n=N):
    return torch.zeros(n, pin_memory=True)


def test_tensors_say_cuda_and_autograd_runs():
    x = torch.randn(N, 3).cuda().requires_grad_()
    assert x.is_cuda and not x.is_cpu and x.device == torch.device("cuda", 0)
    assert x.to("cuda") is x and x.get_device() == 0
    ((x.bfloat16() * 2).float().sum() + x.cpu().sum().cuda()).backward()
    assert x.grad.is_cuda and torch.equal(x.grad.cpu(), torch.full((N, 3), 3.0))
    assert torch.zeros_like(x, device="cpu").is_cpu
    with pytest.raises(TypeError, match="numpy"):
        x.detach().numpy()


@pytest.mark.parametrize(
    "meet",
    [
        lambda ours, host: ours + host,
        lambda ours, host: host.add_(ours),
        lambda ours, host: ours @ host.T,
        lambda ours, host: torch.cat([ours, host]),
        lambda ours, host: host[ours.argmax(1)],
        lambda ours, host: torch.where(host > 0, ours, 0),
        lambda ours, host: torch.addmm(host, ours, ours.T),
        lambda ours, host: host[0, 0].add_(ours[0, 0]),
        lambda ours, host: torch.cat([ours[0], host[0, :1]]),
    ],
)
def test_devices_do_not_meet(meet):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        meet(on_gpu(N, N), torch.randn(N, N))


def test_scalars_and_indices_of_the_host_are_taken():
    ours, host = on_gpu(N, N), torch.randn(N, N)
    for x in (ours * host[0, 0], ours[host.argmax(1)], ours.masked_fill(ours > 0, host[0, 0])):
        assert x.is_cuda
    ours[torch.arange(2)] = torch.tensor(3.0)
    assert ours[:2].tolist() == [[3.0] * N] * 2


@pytest.mark.parametrize(
    "a, b, out_dtype, out, message",
    [
        (BF16, torch.float16, FP32, FP32, "must have the same dtype"),
        (FP32, FP32, torch.float64, torch.float64, "out_dtype must be the same as input dtype"),
        (BF16, BF16, torch.float16, torch.float16, "out_dtype must be the same as input dtype"),
        (BF16, BF16, FP32, BF16, "the provided out tensor"),
        (torch.int64, torch.int64, torch.int64, torch.int64, "not implemented"),
    ],
)
def test_products_that_cuda_refuses(a, b, out_dtype, out, message):
    a, b = (torch.ones(N, N, dtype=dtype, device="cuda") for dtype in (a, b))
    out = torch.ones(N, N, dtype=out, device="cuda")
    with pytest.raises(RuntimeError, match=message):
        torch.addmm(out, a, b, out_dtype=out_dtype, out=out)


def test_products_in_fp32():
    a, b = on_gpu(N, 50, dtype=BF16), on_gpu(50, N, dtype=BF16)
    out = on_gpu(N, N)
    expected = out.cpu() + 0.5 * a.cpu().float() @ b.cpu().float()
    gemm(out, a, b, accumulate=True, alpha=0.5)
    assert_close(out.cpu(), expected)
    with pytest.raises(RuntimeError, match="self dtype must match"):
        torch.addmm(out.double(), a, b, out_dtype=FP32)


@pytest.mark.parametrize("shape", [(3, 50, 7), (50, 3, 7), (7, 3, 50), (50, 7, 3), (0, 5, 6)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_are_upcast_by_slabs_where_fp32_results_are_refused(
    shape, accumulate, simulated_cuda, monkeypatch
):
    monkeypatch.setattr("em_kernels.ops.gemm.UPCAST_BYTES", 4 * 7 * 5)
    rows, inner, columns = shape
    a, b = on_gpu(rows, inner, dtype=BF16), on_gpu(columns, inner, dtype=BF16).t()
    before, found = on_gpu(rows, columns), []
    for simulated_cuda.is_old_rocm in (True, False):
        monkeypatch.setattr("em_kernels.ops.gemm._widens", {})
        out = before.clone()
        assert gemm(out, a, b, accumulate, alpha=0.5) is out
        found.append(out.cpu())
    assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("allowed", [True, False])
def test_products_beside_fp16_accumulation(allowed, monkeypatch):
    flags = torch.backends.cuda.matmul
    before, flags.allow_fp16_accumulation = flags.allow_fp16_accumulation, allowed
    try:
        a, b = on_gpu(N, 50, dtype=torch.float16), on_gpu(50, N, dtype=torch.float16)
        out = gemm(on_gpu(N, N), a, b)
        assert flags.allow_fp16_accumulation == allowed
        assert widens(a)
        assert_close(out.cpu(), a.cpu().float() @ b.cpu().float())
    finally:
        flags.allow_fp16_accumulation = before


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_loss_where_fp32_results_are_refused(simulated_cuda, monkeypatch):
    """It has the same numbers, and takes no fp32 copy of the gradient of all logits."""
    slab_bytes = 1 << 15
    monkeypatch.setattr("em_kernels.ops.gemm.UPCAST_BYTES", slab_bytes)
    hidden, weight = on_gpu(30, 8, dtype=BF16), on_gpu(3000, 8, dtype=BF16)
    found, peaks = [], []
    for simulated_cuda.is_old_rocm in (True, False):
        monkeypatch.setattr("em_kernels.ops.gemm._widens", {})
        inputs = [x.detach().requires_grad_() for x in (hidden, weight)]
        torch.cuda.reset_peak_memory_stats()
        loss = fused_entropy_loss(*inputs)
        found.append([x.cpu() for x in torch.autograd.grad(loss, inputs)])
        peaks.append(torch.cuda.max_memory_allocated())
    for upcast, direct in zip(*found, strict=True):
        assert_close(upcast, direct, rtol=2**-7, atol=2**-7 * direct.abs().max().item())
    assert peaks[0] <= peaks[1] + 4 * slab_bytes < peaks[1] + 30 * 3000 * 4


def test_kernels_of_the_cpu_refuse():
    x = on_gpu(N, N, dtype=BF16)
    with pytest.raises(NotImplementedError, match="gemm_bf16"):
        torch.ops.em_kernels.gemm_bf16(x.float(), x, x, False, 1)
    y, row = torch.randn(N, 50), torch.ones(N)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        triton.row_gradient_kernel[(1,)](y, row)
    assert triton.row_gradient_kernel.kernel is interpreted_triton.row_gradient_kernel


def test_new_memory_holds_nan():
    assert torch.empty(N, device="cuda").isnan().all()
    assert on_gpu(N).new_empty(N, dtype=torch.int64).max() < -(2**62)


@pytest.mark.parametrize("wait", [torch.cuda.Event.synchronize, torch.cuda.Event.query])
def test_a_copy_to_the_host_arrives_with_its_event(wait):
    x, host = on_gpu(N), pinned()
    expected = x.cpu()
    host.copy_(x, non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    x.zero_()  # in the order of the stream: after the copy
    assert host.isnan().all()
    getattr(event, wait.__name__)()
    assert torch.equal(host, expected)


def test_a_blocking_or_pageable_copy_has_arrived():
    x = on_gpu(N)
    assert torch.equal(pinned().copy_(x), x.cpu())
    assert torch.equal(torch.empty(N).copy_(x, non_blocking=True), x.cpu())
    late = x.to("cpu", non_blocking=True)  # which torch pins
    assert late.is_pinned() and late.isnan().all()
    torch.cuda.synchronize()
    assert torch.equal(late, x.cpu())


def test_an_earlier_event_does_not_make_a_later_copy_arrive():
    x, host = on_gpu(N), pinned()
    event = torch.cuda.current_stream().record_event()
    host.copy_(x, non_blocking=True)
    event.synchronize()
    assert host.isnan().all()
    torch.cuda.current_stream().synchronize()
    assert not host.isnan().any()


def test_a_buffer_that_is_reused_too_early_gives_wrong_numbers():
    found = []
    for wait in (torch.cuda.synchronize, lambda: None):
        host, ours = pinned().fill_(1), torch.empty(N, device="cuda")
        ours.copy_(host, non_blocking=True)
        wait()
        host.fill_(2)
        found.append(ours.sum().item())
    assert found == [N, 2 * N]


@pytest.mark.parametrize("waits", [True, False])
def test_a_source_overwritten_before_another_stream_copied_it(waits):
    x, host, side = on_gpu(N), pinned(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        host.copy_(x, non_blocking=True)
    if waits:
        torch.cuda.current_stream().wait_stream(side)
    expected = x.cpu()
    x.fill_(7)
    side.synchronize()
    assert torch.equal(host, expected) == waits


@pytest.mark.parametrize("recorded", [True, False])
def test_a_source_freed_before_another_stream_copied_it(recorded):
    x, host, side = on_gpu(N), pinned(), torch.cuda.Stream()
    expected = x.cpu()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        host.copy_(x, non_blocking=True)
        if recorded:
            x.record_stream(side)
    del x
    side.synchronize()
    assert torch.equal(host, expected) == recorded


def test_a_stream_that_does_not_wait_for_another_races():
    x, side = on_gpu(N), torch.cuda.Stream()
    with torch.cuda.stream(side):
        with pytest.raises(RuntimeError, match="race"):
            x + 1
        side.wait_stream(torch.cuda.default_stream())
        assert (x + 1).is_cuda


class LateThread:
    """Stand-in for a thread pool whose work begins when somebody waits for it."""

    def submit(self, function, *arguments):
        return SimpleNamespace(result=lambda: function(*arguments))

    def shutdown(self):
        pass


def test_faults_in_our_own_transfers_are_found(monkeypatch):
    counts = torch.arange(2, device="cuda")
    found = AsyncCounts(counts)
    found.arrived = None
    assert found.read() != [0, 1]
    assert AsyncCounts(counts).read() == [0, 1]

    def fetched():
        bounce, x, got = Bounce(torch.device("cuda")), on_gpu(N), []
        bounce.thread = LateThread()
        expected = x.cpu()
        bounce.fetch(x, lambda part, host: got.append(host.clone()), reused=False)
        del x
        bounce.wait(), bounce.close()
        return torch.equal(got[0], expected)

    assert fetched()
    monkeypatch.setattr(type(counts), "record_stream", lambda x, stream: None)
    assert not fetched()


def test_memory_is_counted_and_limited():
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1000, device="cuda")
    view = x[10:]
    assert torch.cuda.memory_allocated() - before == 4096
    assert torch.cuda.mem_get_info() == (TOTAL_BYTES - before - 4096, TOTAL_BYTES)
    del x
    assert torch.cuda.memory_allocated() - before == 4096
    del view
    assert torch.cuda.memory_allocated() == before
    torch.zeros(1, device="cuda")
    assert torch.cuda.max_memory_allocated() == before + 4096
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == before
    torch.cuda.set_per_process_memory_fraction(BLOCK_BYTES / TOTAL_BYTES)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.zeros(BLOCK_BYTES, device="cuda")
