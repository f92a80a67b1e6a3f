"""Distributions restricted to each token's support: few logits gathered, or dense ones masked."""

import pytest
import torch
from kernel_params import TRITON
from test_chunked import work
from test_several_targets import opcheck
from torch.testing import assert_close
from truth import compare, draw, floors, leaves, logits_of

from em_kernels import TokenStats, fused_token_stats, reference
from em_kernels.ops import gathered, support
from em_kernels.ops.inputs import GradMask, HeadInputs, SavedStats
from em_kernels.ops.support import Support

N, D, V = 7, 6, 61
TAU = torch.tensor([0.5, 1.0, 2.0, 0.8, 1.1, 0.3, 1.7])
MASK = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.5, 1.0])
TRANSFORMS = [{}, {"temperature": TAU, "softcap": 5.0, "logit_scale": -0.7}]
NAMES = ("entropy", "logprob", "logsumexp")
SIZES = {  # of each token's support
    "few": [3, 1, 8, 2, 1, 4, 3],
    "some whole": [3, 0, 8, 0, 1, 4, 3],
    "many": [30, 61, 8, 2, 60, 4, 45],
    "none": [0] * N,
}


def supports(sizes):
    """Return a support of these sizes, in no order, and the entries that it has, (N, V)."""
    listed = [torch.randperm(V)[:size] for size in sizes]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    inside = torch.zeros(len(sizes), V, dtype=torch.bool)
    for row, entries in zip(inside, listed, strict=True):
        row[entries if len(entries) > 0 else slice(None)] = True
    return (torch.cat(listed), offsets), inside


def some_targets(inside, several):
    """Return targets inside, of which the last token's is -100, (N,) or (N, 3) with equal ones."""
    order = (inside * (1 + torch.rand(inside.shape))).argsort(1, descending=True)
    targets = order[:, [0, 0, 0]]
    targets[::2, 1] = order[:, :2].gather(1, (inside.sum(1, keepdim=True) - 1).clamp(max=1))[::2, 0]
    targets[-1] = -100
    return targets if several else targets[:, 0].clone()


def plain(inputs, inside, targets, upstream, transform, kept, dtype):
    """Return the statistics and their gradients on full logits; masked tokens are 0."""
    tensors = leaves(*inputs, dtype=dtype)
    logits = logits_of(*tensors, **transform).masked_fill(~inside, -torch.inf)
    logp = logits.log_softmax(-1)
    columns = targets.clamp(min=0).view(len(logits), -1)
    logprob = torch.where(targets == -100, 0, logp.gather(-1, columns).view(targets.shape))
    entropy = -(logp.exp() * logp.masked_fill(~inside, 0)).sum(-1)
    found = entropy, logprob, logits.logsumexp(-1)
    found = [x.masked_fill(~kept if x.dim() == 1 else ~kept[:, None], 0) for x in found]
    total = sum((g.to(dtype) * x).sum() for g, x in zip(upstream, found, strict=True))
    return *found, *torch.autograd.grad(total, tensors)


def run(inputs, csr, targets, upstream, **head):
    hidden, weight, bias = inputs
    stats = fused_token_stats(hidden, weight, targets, bias=bias, support=csr, stats=NAMES, **head)
    found = [getattr(stats, name) for name in NAMES]
    total = sum((g.to(x.dtype) * x).sum() for g, x in zip(upstream, found, strict=True))
    return *found, *torch.autograd.grad(total, inputs)


def upstreams(targets):
    shapes = (N,), targets.shape, (N,)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("chunk_bytes", [None, 4 * (N + D) * 4])  # 4 gathered weights, or entries
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_masked_logits(sizes, transform, mask, several, chunk_bytes):
    csr, inside = supports(SIZES[sizes])
    targets = some_targets(inside, several)
    inputs, upstream = draw(N, D, V)[:3], upstreams(targets)
    kept = torch.ones(N).bool() if mask is None else mask != 0
    truth, eager = (
        plain(inputs, inside, targets, upstream, transform, kept, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    with torch.no_grad():
        inputs[0][~kept] = torch.nan
    head = {"mask": mask, "chunk_bytes": chunk_bytes, **transform}
    ours = run(inputs, csr, targets, upstream, **head)
    with torch.no_grad():
        sound = [x.masked_fill(x.isnan(), 0) for x in inputs]
    value, *_ = floors(sound, transform, torch.full((N,), 3.0).double())
    size = sum(g.view(N, -1).abs().sum(1) for g in upstream)
    _, *allowed = floors(sound, transform, size)
    names = (*NAMES, "dhidden", "dweight", "dbias")
    compare(names, ours, eager, truth, (value, value, value, *allowed))
    unused = ~inside[kept].any(0)
    assert (ours[4][unused] == 0).all() and (ours[5][unused] == 0).all()
    assert (ours[3][~kept] == 0).all() and ours[1].shape == targets.shape


@pytest.mark.parametrize("rows", [TRITON], indirect=True)
@pytest.mark.parametrize("sizes", ["few", "some whole"])
def test_with_triton(sizes, rows):
    test_equals_masked_logits(sizes, TRANSFORMS[1], MASK, True, None)


def test_the_two_ways_are_chosen_by_size():
    def is_sparse(sizes):
        (indices, offsets), _ = supports(sizes)
        return Support(indices, offsets).is_sparse(V)

    assert [name for name in SIZES if is_sparse(SIZES[name])] == ["few"]
    most = N * V // 16
    assert is_sparse([most - N + 1, *[1] * (N - 1)])
    assert not is_sparse([most - N + 2, *[1] * (N - 1)])


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("gap", [10.0, 17.0, 1e4])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_sure_tokens(gap, share, monkeypatch):
    """Beside the largest logit of all, which is outside, and the largest inside."""
    monkeypatch.setattr(support, "MAX_SPARSE_SHARE", share)
    logits = torch.randn(4, 50)
    logits[:, 11] += gap
    logits[:, 7] = 3e4
    csr = torch.tensor([3, 11, 20, 5] * 4), torch.arange(5) * 4
    targets = torch.tensor([11, 3, 11, -100])
    hidden, weight = torch.eye(4), logits.t().contiguous().requires_grad_()
    stats = fused_token_stats(hidden, weight, targets, support=csr)
    total = stats.entropy.sum() + stats.logprob.sum()
    ours = torch.autograd.grad(total, weight)[0].t()
    wide = logits.double().requires_grad_()
    listed = wide[:, [3, 5, 11, 20]]
    logp = listed.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    logprob = torch.stack([logp[0, 2], logp[1, 0], logp[2, 2], 0 * logp[3, 0]])
    (true,) = torch.autograd.grad(entropy.sum() + logprob.sum(), wide)
    assert_close(stats.entropy.double(), entropy, rtol=3e-6, atol=1e-30)
    assert_close(stats.logprob.double(), logprob, rtol=3e-6, atol=1e-30)
    assert_close(ours.double(), true, rtol=3e-5, atol=1e-30)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck(transform, sizes):
    csr, inside = supports(SIZES[sizes])
    targets = some_targets(inside, True)
    inputs = draw(N, D, V, dtype=torch.float64)[:3]
    transform = {k: x.double() if k == "temperature" else x for k, x in transform.items()}

    def stats(h, w, b):
        return fused_token_stats(h, w, targets, bias=b, stats=NAMES, support=csr, **transform)[:3]

    assert torch.autograd.gradcheck(stats, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", ["few", "many"])
def test_16_bits_are_rounded_once(sizes, dtype):
    csr, inside = supports(SIZES[sizes])
    targets = some_targets(inside, False)
    inputs, upstream = draw(N, D, V, dtype=dtype)[:3], upstreams(targets)
    truth = plain(inputs, inside, targets, upstream, {}, torch.ones(N).bool(), torch.float64)
    ours = run(inputs, csr, targets, upstream)
    assert_close([x.double() for x in ours[:3]], list(truth[:3]), rtol=1e-5, atol=1e-5)
    for mine, true in zip(ours[3:], truth[3:], strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - true).norm() <= 2 * torch.finfo(dtype).eps * true.norm()


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("sizes", ["few", "many"])
def test_frozen_inputs(sizes, needs):
    csr, inside = supports(SIZES[sizes])
    inputs = draw(N, D, V)[:3]
    frozen = [x.detach().requires_grad_(n) for x, n in zip(inputs, needs, strict=True)]
    index = needs.index(True)
    whole, part = (
        fused_token_stats(h, w, bias=b, support=csr).entropy for h, w, b in (inputs, frozen)
    )
    expected = torch.autograd.grad(whole.sum(), inputs[index])
    assert_close(torch.autograd.grad(part.sum(), frozen[index]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("size", [0, 1, 3])
def test_shapes_and_the_twin(shape, size):
    count = torch.Size(shape).numel()
    hidden, weight, bias, _ = draw(max(1, count), D, V)
    hidden = hidden.detach()[:count].reshape(*shape, D).requires_grad_()
    (indices, offsets), inside = supports([size] * max(1, count))
    csr = indices[: count * size], offsets[: count + 1]
    targets = some_targets(inside, False)[:count].reshape(shape)
    mask = torch.rand(shape) > 0.2
    arguments = {"bias": bias, "mask": mask, "support": csr}
    found = fused_token_stats(hidden, weight, targets, **arguments)
    true = reference.token_stats(hidden, weight, targets, **arguments)
    assert found.entropy.shape == found.logprob.shape == shape
    assert_close(found[:2], true[:2], rtol=2e-6, atol=2e-6)
    ours, theirs = (
        torch.autograd.grad((s.entropy + 2 * s.logprob).sum(), (hidden, weight, bias))
        for s in (found, true)
    )
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_broken_rows_stay_alone():
    csr, inside = supports(SIZES["few"])
    targets = some_targets(inside, False)
    hidden, weight, bias, _ = draw(N, D, V)
    (clean,) = leaves(hidden)
    hidden.data[2] = torch.nan
    bias.data[csr[0][csr[1][3] : csr[1][4]]] = -torch.inf  # no logit of token 3 is finite
    others = torch.tensor([0, 1, 4, 5, 6])
    upstream = upstreams(targets)
    broken = run((hidden, weight, bias), csr, targets, upstream)
    whole = run((clean, weight, bias), csr, targets, upstream)
    for a, b in zip(broken[:4], whole[:4], strict=True):
        assert a[2:4].isnan().all() and torch.equal(a[others], b[others])


def test_work_of_a_small_support_is_no_gemm():
    hidden, weight, _, _ = (x.detach() for x in draw(N, 64, 500))
    head = HeadInputs(hidden, weight)._replace(
        support=Support(torch.arange(3 * N), torch.arange(N + 1) * 3)
    )

    def run():
        found = gathered.token_stats(head, True)
        saved = SavedStats(found.statistics, found.m, found.log_s, found.logits)
        upstream = torch.ones_like(found.statistics)
        gathered.token_stats_backward(head, upstream, saved, GradMask(True, True, True))

    assert work(run) == 0


@pytest.mark.parametrize("sizes", ["few", "many"])
def test_the_same_bits_again(sizes):
    csr, inside = supports(SIZES[sizes])
    targets = some_targets(inside, True)
    inputs, upstream = draw(N, D, V)[:3], upstreams(targets)
    first, second = (run(inputs, csr, targets, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


INDICES, OFFSETS = torch.tensor([3, 1, 5, 5, 0]), torch.tensor([0, 2, 3, 3, 4, 5, 5, 5])
META = torch.zeros(5, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    "csr, error, text",
    [
        (INDICES, TypeError, "two tensors"),
        ((INDICES, OFFSETS, OFFSETS), TypeError, "two tensors"),
        ((INDICES.int(), OFFSETS), TypeError, "indices .* not torch.int32"),
        ((INDICES, OFFSETS.tolist()), TypeError, "offsets .* not list"),
        ((INDICES[None], OFFSETS), TypeError, r"indices .*\(1, 5\)"),
        ((META, OFFSETS), ValueError, "indices .* meta"),
        ((INDICES, OFFSETS[1:]), ValueError, "expected 8 offsets, .* got 7"),
        ((INDICES, OFFSETS.flip(0)), ValueError, "offsets must ascend"),
        ((INDICES, OFFSETS + 1), ValueError, "offsets must ascend"),
        ((INDICES, OFFSETS.clamp(max=4)), ValueError, "number of indices, 5"),
        ((INDICES + V - 5, OFFSETS), ValueError, r"2 indices out of range; .*\[0, 61\)"),
        ((INDICES - 1, OFFSETS), ValueError, "1 indices out of range"),
        ((INDICES, torch.tensor([0, 2, 2, 4, 5, 5, 5, 5])), ValueError, "token 2 lists entry 5"),
    ],
)
def test_refusals(csr, error, text):
    hidden, weight, _, _ = draw(N, D, V)
    with pytest.raises(error, match=f"^support: .*{text}"):
        fused_token_stats(hidden, weight, support=csr)


@pytest.mark.parametrize("sizes", ["few", "many"])
def test_targets_outside(sizes):
    csr, inside = supports(SIZES[sizes])
    hidden, weight, _, _ = draw(N, D, V)
    targets = some_targets(inside, True)
    targets[5, 1] = (~inside[5]).nonzero()[0, 0]
    text = rf"^support: token 5 .* target {targets[5, 1]} outside"
    for arguments in ({}, {"mask": MASK}):
        with pytest.raises(ValueError, match=text):
            fused_token_stats(hidden, weight, targets, support=csr, **arguments)
        with pytest.raises(ValueError, match=text):
            fused_token_stats(hidden, weight, targets[:, 1], support=csr, **arguments)
    mask = torch.ones(N)
    mask[5] = 0  # what does not count may have any target
    found = fused_token_stats(hidden, weight, targets, support=csr, mask=mask)
    assert (found.logprob[5] == 0).all() and found.logprob.isfinite().all()


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"stats": ("entropy", "mean_logit")}, "mean_logit"),
        ({"stats": TokenStats._fields[:6]}, "mean_logit"),
        ({"stats": ("argmax",)}, "argmax"),
        ({"top_k": 2}, "top_k"),
        ({"process_group": "any"}, "a vocabulary split over a process_group"),
    ],
)
def test_what_it_is_not_for(arguments, text):
    hidden, weight, _, targets = draw(N, D, V)
    with pytest.raises(ValueError, match=f"^support: is not for {text}"):
        fused_token_stats(hidden, weight, targets, support=(INDICES, OFFSETS), **arguments)


@pytest.mark.parametrize("sizes", ["few", "many"])
def test_opcheck(sizes):
    csr, inside = supports(SIZES[sizes])
    opcheck(some_targets(inside, True), 0, csr, v=V)
