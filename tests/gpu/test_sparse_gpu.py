"""The sparse gradient on a GPU, where the next chunk starts before a choice is known."""

import pytest
import torch
from test_sparse import peaked
from truth import relative_error

from em_kernels import fused_entropy_loss, gradient_report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
N, V, D = 2000, 50_257, 24


def gradients(inputs, tolerance, **arguments):
    arguments |= {"temperature": 0.5, "reduction": "sum", "grad_tolerance": tolerance}
    loss = fused_entropy_loss(*inputs, **arguments)
    return gradient_report(loss), torch.autograd.grad(loss, inputs)


def on_gpu(dtype):
    return [x.detach().cuda().requires_grad_() for x in peaked(N, V, D, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("chunk_bytes", [None, 300 * V * 12])
def test_near_the_exact_gradient_and_the_same_bits_again(chunk_bytes, dtype):
    inputs = on_gpu(dtype)
    report, found = gradients(inputs, 2**-9, chunk_bytes=chunk_bytes)
    assert report.active_share < 0.5 and 0 < report.dropped_share <= 2**-9
    for other, mine in zip(
        gradients(inputs, 2**-9, chunk_bytes=chunk_bytes)[1], found, strict=True
    ):
        assert torch.equal(other, mine)
    rounding = 0 if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
    for mine, true in zip(found, gradients(inputs, 0.0, chunk_bytes=chunk_bytes)[1], strict=True):
        assert 0 < relative_error(mine, true.double()) < 3 * 2**-9 + rounding


@pytest.mark.parametrize("flat_from", [0, 700])
def test_flat_distributions_get_the_dense_gradient(flat_from):
    inputs = on_gpu(torch.float32)
    inputs[0].data[flat_from:] *= 0.01
    report, found = gradients(inputs, 2**-9, chunk_bytes=300 * V * 12)
    assert report.active_share == 1 if flat_from == 0 else 0.3 < report.active_share < 1
    for mine, true in zip(found, gradients(inputs, 0.0)[1], strict=True):
        assert relative_error(mine, true.double()) < 0.01


def test_chunk_bytes_bounds_the_peak():
    """The peak holds both buffers, and dweight only for the entries that are kept."""
    inputs, chunk_bytes = [x.detach() for x in peaked(N, V, 512, torch.bfloat16)], 64 << 20
    inputs = [x.cuda().requires_grad_() for x in inputs]
    arguments = {"temperature": 0.5, "grad_tolerance": 2**-9, "chunk_bytes": chunk_bytes}
    fused_entropy_loss(*inputs, **arguments).backward()  # cuBLAS takes a workspace, and keeps it
    for x in inputs:
        x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_entropy_loss(*inputs, **arguments).backward()
    peak = torch.cuda.max_memory_allocated() - before
    returned, few = sum(x.nbytes for x in inputs), V * 512
    slab = chunk_bytes // 2
    assert peak <= chunk_bytes + returned + few + slab + 64 * N * 4 + (1 << 20)
