"""No tensor comes near the size of the logits, and the user's budget holds."""

import itertools
import mmap
import sys

import pytest
import torch
from kernel_params import needs_extension, on_cpu_only
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from truth import draw, entropy_of, leaves

from em_kernels import (
    entropy_from_logits,
    fused_divergence,
    fused_entropy_loss,
    fused_token_stats,
    gradient_report,
)
from em_kernels.ops import from_logits, gemm, saved_gradients
from em_kernels.ops.memory import untouched_zeros

N, D, V = 512, 32, 2048
CHUNK_BYTES = 64 * V * 4
UPSTREAM = torch.linspace(-1, 1, N)
MASK = torch.arange(N) % 5 > 0


def changes(function):
    """Return bytes allocated (> 0) and freed (< 0) by the function, also inside operators."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return [event.nbytes() for event in memory]


def allocations(function):
    return [size for size in changes(function) if size > 0]


def sum_stats(h, w, b, **arguments):
    targets = torch.arange(N)
    stats = fused_token_stats(h, w, targets, bias=b, **arguments)
    return (UPSTREAM * (stats.entropy + stats.logprob)).sum()


def sum_none(h, w, b, **arguments):
    loss = fused_entropy_loss(h, w, bias=b, reduction="none", **arguments)
    return (UPSTREAM * loss).sum()


def divergence(h, w, b, **arguments):
    """Return the divergence from the model itself, whose memory is the model's own."""
    ref = h.detach(), w.detach()
    return fused_divergence(h, w, *ref, bias=b, ref_bias=b.detach(), beta=0.3, **arguments)


LOSSES = {
    "mean": lambda h, w, b, **k: fused_entropy_loss(h, w, bias=b, **k),
    "sum": lambda h, w, b, **k: fused_entropy_loss(h, w, bias=b, reduction="sum", **k),
    "masked": lambda h, w, b, **k: fused_entropy_loss(h, w, bias=b, mask=MASK, **k),
    "none": sum_none,
    "token_stats": sum_stats,
    "masked token_stats": lambda h, w, b, **k: sum_stats(h, w, b, mask=MASK, **k),
    "softcap": lambda h, w, b, **k: sum_none(h, w, b, softcap=9.0, temperature=0.5, **k),
}
DIVERGENCES = {
    "divergence": divergence,
    "each divergence": lambda h, w, b, **k: UPSTREAM @ divergence(h, w, b, reduction="none", **k),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorder_sees_full_logits(dtype):
    inputs = draw(N, D, V, dtype=dtype)[:3]
    largest = max(allocations(lambda: entropy_of(*inputs).mean().backward()))
    assert largest == N * V * 4


def test_recorder_looks_into_custom_operators():
    hidden, weight, _, _ = draw(N, D, V)
    found = allocations(lambda: fused_entropy_loss(hidden, weight, chunk_bytes=N * V * 4))
    assert max(found) == N * V * 4


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
@on_cpu_only
def test_no_tensor_of_the_size_of_the_logits(loss, dtype):
    inputs = draw(N, D, V, dtype=dtype)[:3]
    found = allocations(lambda: LOSSES[loss](*inputs, chunk_bytes=CHUNK_BYTES).backward())
    gradient = V * D * 4
    assert CHUNK_BYTES / 2 < max(found) < N * V * 4 / 2
    # The budget bounds all but the fp32 dweight.
    assert max(size for size in found if size != gradient) <= CHUNK_BYTES


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("loss", DIVERGENCES)
@on_cpu_only
def test_two_heads_share_the_budget(loss):
    inputs = draw(N, D, V)[:3]
    found = allocations(lambda: DIVERGENCES[loss](*inputs, chunk_bytes=CHUNK_BYTES).backward())
    assert V * D * 4 <= CHUNK_BYTES / 2 == max(found)


@needs_extension
@pytest.mark.parametrize("loss", LOSSES | DIVERGENCES)
def test_peak_is_one_chunk_and_the_gradients(loss):
    """For the C++ kernels only, as the portable ones have temporaries."""
    inputs, function = draw(N, D, V)[:3], (LOSSES | DIVERGENCES)[loss]
    sizes = changes(lambda: function(*inputs, chunk_bytes=CHUNK_BYTES).backward())
    gradients = sum(x.grad.nbytes for x in inputs)
    per_token = 40 * N * 4  # statistics, upstreams, coefficients
    active = inputs[0].nbytes  # a copy of the tokens that the mask keeps
    assert max(itertools.accumulate(sizes)) <= CHUNK_BYTES + gradients + per_token + active


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("loss", LOSSES)
@on_cpu_only
def test_frozen_weight_has_no_gradient_in_memory(loss):
    hidden, weight, bias, _ = draw(N, D, V)
    frozen = weight.detach(), bias.detach()
    found = allocations(lambda: LOSSES[loss](hidden, *frozen, chunk_bytes=CHUNK_BYTES).backward())
    assert max(size for size in found if size > CHUNK_BYTES / 4) <= CHUNK_BYTES
    assert V * D * 4 not in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("retain_graph", [False, True])
def test_backward_holds_no_second_fp32_dweight(dtype, retain_graph):
    """The saved dweight becomes the gradient, or is rounded into it, unless the graph is kept."""
    entries = 8 * V
    inputs = draw(N, 192, entries, dtype=dtype)[:2]  # too many tokens to keep dy
    loss = fused_entropy_loss(*inputs, reduction="sum")
    found = allocations(lambda: loss.backward(retain_graph=retain_graph))
    large = [size for size in found if size >= entries * 192 * 2]
    fresh = dtype == torch.bfloat16 or retain_graph
    assert large == ([entries * 192 * dtype.itemsize] if fresh else [])


@torch.no_grad()
def test_no_grad_makes_no_gradient():
    inputs = draw(N, D, V)[:3]
    losses = []
    found = allocations(lambda: losses.append(LOSSES["mean"](*inputs, chunk_bytes=CHUNK_BYTES)))
    assert V * D * 4 not in found and not losses[0].requires_grad


@pytest.mark.usefixtures("rows")
@on_cpu_only
def test_budget_bounds_the_slabs_of_dweight(monkeypatch):
    """With few tokens of a wide model a slab's fp32 dweight is larger than its logits."""
    n, d, budget = 16, 256, 16 * V * 4
    monkeypatch.setattr(gemm, "UPCAST_BYTES", budget)
    hidden, weight, _, _ = draw(n, d, V, dtype=torch.bfloat16)
    loss = fused_entropy_loss(hidden, weight, reduction="none", chunk_bytes=budget).sum()
    *others, largest = sorted(allocations(loss.backward))
    assert largest == V * d * 2 and others[-1] <= budget


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_cpu_only
def test_entropy_from_logits(dtype, monkeypatch):
    monkeypatch.setattr(from_logits, "BLOCK_BYTES", CHUNK_BYTES)
    x = torch.randn(N, V, dtype=dtype, requires_grad=True)
    entropy = []
    forward = allocations(lambda: entropy.append(entropy_from_logits(x)))
    assert max(forward) <= CHUNK_BYTES
    backward = sorted(allocations(lambda: entropy[0].backward(UPSTREAM)))
    assert backward[-1] == N * V * dtype.itemsize and backward[-2] <= CHUNK_BYTES


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_a_tolerance_leaves_0_take_no_memory(dtype):
    """All but a few rows of dweight are 0, in memory that nobody touches."""
    weight = torch.randn(100_000, 128).to(dtype)
    hidden, weight = leaves(weight[:8].clone(), weight)
    loss = fused_entropy_loss(hidden, weight, grad_tolerance=2**-9, chunk_bytes=8 << 20)
    assert gradient_report(loss).active_share < saved_gradients.UNTOUCHED_SHARE
    before = resident_bytes()
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert resident_bytes() - before < first.nbytes / 4
    assert first.is_contiguous() and first.shape == weight.shape and first.dtype == dtype
    (second,) = torch.autograd.grad(3 * loss, weight)
    assert_close(second, 3 * first)
    kept = (first != 0).any(1)
    first += 1  # it is the caller's to write to
    assert (first[~kept] == 1).all() and 8 <= kept.sum() < 10_000
    assert torch.equal((second != 0).any(1), kept)


def test_as_exact_as_where_all_rows_are_written(monkeypatch):
    hidden, weight = leaves(torch.randn(8, 64), torch.randn(5000, 64))
    loss = fused_entropy_loss(hidden.detach() * 4, weight, grad_tolerance=0.01)
    found = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(saved_gradients, "UNTOUCHED_SHARE", share)
        found.append(torch.autograd.grad(loss, weight, retain_graph=True)[0])
    assert torch.equal(*found) and (found[0] == 0).all(1).any()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (70, 1000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_untouched_zeros(shape, dtype):
    found = untouched_zeros(shape, dtype)
    assert torch.equal(found, torch.zeros(shape, dtype=dtype))
    assert torch.equal(found.fill_(2.5), torch.full(shape, 2.5, dtype=dtype))
