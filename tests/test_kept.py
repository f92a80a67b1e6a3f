"""Kept dy and kept logits: the same gradients as accumulated and recomputed ones, for less."""

import itertools

import pytest
import torch
from kernel_params import needs_extension
from test_chunked import work
from test_memory import allocations, changes
from truth import draw, relative_error

from em_kernels import fused_entropy_loss, fused_token_loss, fused_token_stats
from em_kernels.ops import chunked, vocab_slabs, weight_gradient
from em_kernels.ops import inputs as ops_inputs
from em_kernels.ops.inputs import GradMask, HeadInputs, SavedStats
from em_kernels.ops.saved_gradients import weight_gradient as weight_gradient_of

N, D, V = 60, 48, 700
CHUNK_BYTES = 9 * V * 8  # several chunks
MASK = torch.arange(N) % 4
TARGETS = torch.arange(N) * 7 % V


def mean(h, w, b, **arguments):
    return fused_entropy_loss(h, w, bias=b, **arguments)


def policy(h, w, b, **arguments):
    def loss_fn(stats, index):
        return (index + 1) / N * (0.1 * stats.entropy - stats.logprob)

    return fused_token_loss(h, w, TARGETS, loss_fn, bias=b, **arguments)


def statistics(h, w, b, **arguments):
    stats = fused_token_stats(h, w, TARGETS, bias=b, **arguments)
    return (torch.linspace(-1, 1, N) * (stats.entropy + stats.logprob)).sum()


def gradients(loss, inputs, **arguments):
    return torch.autograd.grad(loss(*inputs, **arguments), inputs)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("chunk_bytes", [None, CHUNK_BYTES], ids=["one", "several"])
@pytest.mark.parametrize("loss", [mean, policy])
def test_kept_dy_gives_the_accumulated_gradients(loss, chunk_bytes, mask, dtype, monkeypatch):
    inputs = draw(N, D, V, dtype=dtype)[:3]
    arguments = {"mask": mask, "chunk_bytes": chunk_bytes, "temperature": 0.7}
    found = []
    for keep in (True, False):
        monkeypatch.setattr(HeadInputs, "keeps_dy", lambda self, needs, keep=keep: keep)
        found.append(gradients(loss, inputs, **arguments))
    # fp32 sums in another order, which the result's dtype may round to its neighbour
    eps = torch.finfo(dtype).eps
    for mine, other in zip(*found, strict=True):
        assert relative_error(mine, other.double()) <= 4 * eps


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("slab_bytes", [64 << 20, 20 * V], ids=["one", "several"])
def test_kept_logits_give_the_recomputed_gradients(slab_bytes, mask, dtype, monkeypatch):
    inputs = draw(N, D, V, dtype=dtype)[:3]
    monkeypatch.setattr(vocab_slabs, "MAX_KEPT_SLAB_BYTES", slab_bytes)
    found = []
    for budget in (N * V * 8, 0):
        monkeypatch.setattr(vocab_slabs, "logits_budget", lambda *_, budget=budget: budget)
        found.append(gradients(statistics, inputs, mask=mask, temperature=0.7))
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for mine, other in zip(*found, strict=True):
        assert relative_error(mine, other.double()) <= 200 * eps + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [mean, policy, statistics])
def test_a_second_backward_gives_the_same_bits(loss, dtype):
    inputs = draw(N, 2 * D, V, dtype=dtype)[:3]
    result = loss(*inputs)
    twice = [torch.autograd.grad(result, inputs, 3.0 * result.new_ones(()), True) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
    scaled = gradients(loss, inputs)
    for mine, once in zip(twice[0], scaled, strict=True):
        assert relative_error(mine, 3.0 * once.double()) <= 4 * torch.finfo(dtype).eps


def test_hidden_must_not_change_before_the_backward():
    leaf, weight, _, _ = draw(N, 2 * D, V)
    hidden = leaf * 1
    loss = fused_entropy_loss(hidden, weight)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hidden_may_change_where_no_dy_is_kept():
    leaf, weight, _, _ = draw(4 * D, D, V)
    for arguments in ({}, {"grad_tolerance": 2**-9}):
        hidden = leaf * 1
        loss = fused_entropy_loss(hidden, weight, **arguments)
        hidden.mul_(2)
        loss.backward()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_few_tokens(count):
    inputs = draw(8, D, V, dtype=torch.bfloat16)[:3]
    mask = torch.arange(8) < count
    found = gradients(mean, inputs, mask=mask)
    expected = gradients(mean, inputs, mask=mask, chunk_bytes=V * 4)
    assert all(torch.isfinite(x).all() for x in found)
    for mine, other in zip(found, expected, strict=True):
        assert relative_error(mine, other.double()) <= 2**-6 if count else (mine == 0).all()


@pytest.mark.parametrize("sizes", [(1.0, 2.0**-20), (2.0**-20, 1.0), (2.0**-10, 2.0**10)])
def test_fp16_chunks_whose_gradients_differ_in_size(sizes, monkeypatch):
    """Each chunk's kept dy has its own scale, so that neither chunk's digits are lost."""
    monkeypatch.setattr(ops_inputs, "operand_dtype", lambda weight: weight.dtype)  # as on a GPU
    monkeypatch.setattr(weight_gradient, "KEPT_SLAB_BYTES", 100 * 4 * D)
    factors = torch.tensor(sizes).repeat_interleave(16)

    def loss(h, w, b, **arguments):
        def loss_fn(stats, index):
            return factors[index] * stats.entropy

        return fused_token_loss(h, w, None, loss_fn, bias=b, **arguments)

    inputs = draw(32, D, V, dtype=torch.float16)[:3]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    summed = gradients(loss, inputs, chunk_bytes=16 * V * 4)
    for mine, true in zip(summed, gradients(loss, exact), strict=True):
        assert relative_error(mine, true) <= 4 * torch.finfo(torch.float16).eps
    # The smaller chunk's own gradient of hidden is as exact as the larger one's.
    small = slice(0, 16) if sizes[0] < sizes[1] else slice(16, 32)
    true = gradients(loss, exact)[0][small]
    smallest = torch.finfo(torch.float16).smallest_normal
    assert (summed[0][small].double() - true).abs().max() <= 2**-8 * true.abs().max() + smallest


def test_dy_is_kept_where_it_takes_no_more_than_dweight():
    for dtype, most in ((torch.float32, D), (torch.bfloat16, 2 * D), (torch.float64, D)):
        for count in (most, most + 1):
            head = HeadInputs(torch.empty(count, D, dtype=dtype), torch.empty(V, D, dtype=dtype))
            most = 4 * D // head.operand.itemsize if dtype == torch.bfloat16 else most
            assert head.keeps_dy(GradMask(weight=True)) == (count <= most)
            assert not head.keeps_dy(GradMask(hidden=True, bias=True))
            assert not head._replace(grad_tolerance=0.1).keeps_dy(GradMask(weight=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_six_units_of_work(mask, dtype):
    """The loops themselves are run: inside an op, operations are not counted."""
    hidden, weight, _, _ = (x.detach() for x in draw(N, 2 * D, V, dtype=dtype))
    head = HeadInputs(hidden, weight, mask=mask)
    needs = GradMask(hidden=True, weight=True)

    def loss():
        _, found = chunked.sum_entropy(head, True, needs, keep_dy=True)
        assert found.weight.numel() == 0 and found.dy.numel() > 0
        kept = (found.weight, found.vocab_indices, found.dy, found.dy_scales)
        weight_gradient_of(*kept, hidden, mask, torch.ones(()), V, dtype)

    def stats():
        found = vocab_slabs.token_stats(head, True, may_keep_logits=True)
        saved = SavedStats(found.statistics, found.m, found.log_s, found.logits)
        upstream = torch.ones_like(found.statistics)
        vocab_slabs.token_stats_backward(head, upstream, saved, needs)

    active = N if mask is None else int((mask != 0).sum())
    for function in (loss, stats):
        assert work(function) == pytest.approx(6 * active * 2 * D * V, rel=0.01)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_the_logits_and_a_slab(dtype, monkeypatch):
    """No fp32 dweight: beyond the gradients there are the logits, dhidden and one slab."""
    count, width = 64, 512
    monkeypatch.setattr(weight_gradient, "KEPT_SLAB_BYTES", 32 * width * 4)
    inputs = draw(count, width, V, dtype=dtype)[:2]
    sizes = changes(lambda: fused_entropy_loss(*inputs).backward())
    returned = sum(x.grad.nbytes for x in inputs)
    most = count * V * 4 + returned + count * width * 4 + 32 * width * 4 + 60 * count * 4
    assert max(itertools.accumulate(sizes)) <= most


def test_statistics_without_gradients_keep_nothing():
    hidden, weight, bias, _ = draw(N, D, V)
    with torch.no_grad():
        found = allocations(lambda: fused_token_stats(hidden, weight, bias=bias))
    assert found
    assert torch.ops.em_kernels.token_stats(
        hidden.detach(), weight.detach(), None, None, None, None, [1.0, 0.0, 1.0], None, None,
        [False] * 3, False, -1, 0, None, None,
    )[4].numel() == 0  # fmt: skip
