"""The most probable entries of each token, and the log of the sum of all others."""

import math

import pytest
import torch
from kernel_params import TRITON
from test_chunked import work
from test_memory import changes
from test_several_targets import opcheck
from torch.testing import assert_close
from truth import compare, draw, floors, leaves, logits_of

from em_kernels import (
    TokenStats,
    fused_token_loss,
    fused_token_stats,
    gradient_report,
    reference,
)
from em_kernels.ops import chosen

N, D, V = 7, 6, 29
TAU = torch.tensor([0.5, 1.0, 2.0, 0.8, 1.1, 0.3, 1.7])
MASK = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.5, 1.0])
TRANSFORMS = [{}, {"temperature": TAU, "softcap": 5.0, "logit_scale": -0.7}]
TOP = ("top_logprobs", "top_indices", "tail_logprob")
# All logits kept; slabs of 4 vocabulary entries, fewer than k, and the last of one.
BUDGETS = {"one": None, "several": 4 * (N + D) * 4}


def of_logits(logits, **arguments):
    """Return the statistics of exactly these logits (N, V)."""
    hidden, weight = torch.eye(len(logits)), logits.t().contiguous()
    return fused_token_stats(hidden, weight, **arguments)


def plain(logits, k):
    """Return the same three from a stable sort."""
    logp = logits.log_softmax(-1)
    ordered, indices = logp.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :k], indices[..., :k], ordered[..., k:].logsumexp(-1)


@pytest.fixture(params=[1 << 21, 50])
def block(request, monkeypatch):
    """Take all rows at once, or one after another."""
    monkeypatch.setattr(chosen, "CPU_BLOCK", request.param)


@pytest.mark.usefixtures("rows", "block")
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("targets", ["none", "one", "several"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss", [False, True])
def test_equals_full_logits(loss, transform, targets, budget):
    """Gradients of the largest and of the targets, some of which are among the largest.

    From statistics, or from inside a loss.
    """
    k, inputs = 6, draw(N, D, V)[:3]
    best = logits_of(*inputs, **transform).argsort(-1, descending=True)
    goals = {"none": None, "one": best[:, 1].clone(), "several": best[:, [0, 9, 2, 0]]}[targets]
    if goals is not None:
        goals[2] = -100
    upstream = torch.randn(N, k).double(), torch.randn(N, 4).double(), torch.randn(N).double()

    def losses(stats, index):
        of_top, of_targets, of_entropy = (g.to(stats.entropy.dtype)[index] for g in upstream)
        found = (of_top * stats.top_logprobs).sum(1) + of_entropy * stats.entropy
        if targets == "one":
            found = found + of_targets[:, 0] * stats.logprob
        elif targets == "several":
            found = found + (of_targets * stats.logprob).sum(1)
        return found

    def results(stats, tensors, total=None):
        found = [stats.top_logprobs, stats.tail_logprob, stats.entropy]
        if goals is not None:
            found.append(stats.logprob)
        total = losses(stats, slice(None)).sum() if total is None else total
        return *found, *torch.autograd.grad(total, tensors)

    def eager(dtype):
        tensors = leaves(*inputs, dtype=dtype)
        logits = logits_of(*tensors, **transform)
        logp = logits.log_softmax(-1)
        top, indices, tail = plain(logits, k)
        assert torch.equal(indices, best[:, :k])
        logprob = None
        if goals is not None:
            logprob = logp.gather(-1, goals.clamp(min=0).view(N, -1)).view(goals.shape)
            logprob = torch.where(goals == -100, 0, logprob)
        entropy = -(logp.exp() * logp).sum(-1)
        stats = TokenStats(
            entropy, logprob, top_logprobs=top, top_indices=indices, tail_logprob=tail
        )
        return results(stats, tensors)

    chunk = {} if BUDGETS[budget] is None else {"chunk_bytes": BUDGETS[budget]}
    hidden, weight, bias = inputs
    head, total = {"bias": bias, "top_k": k, **transform, **chunk}, None
    if loss:
        names = ("entropy", *TOP, *(() if goals is None else ["logprob"]))
        total, stats = fused_token_loss(hidden, weight, goals, losses, return_stats=names, **head)
    else:
        stats = fused_token_stats(hidden, weight, goals, **head)
    assert torch.equal(stats.top_indices, best[:, :k]) and not stats.tail_logprob.requires_grad
    value, *_ = floors(inputs, transform, torch.full((N,), 4.0).double())
    _, *allowed = floors(inputs, transform, sum(g.view(N, -1).abs().sum(1) for g in upstream))
    values = [value] * (3 if goals is None else 4)
    names = ("top", "tail", "entropy", "logprob")[: len(values)]
    names = (*names, "dhidden", "dweight", "dbias")
    truths = eager(torch.float32), eager(torch.float64)
    compare(names, results(stats, inputs, total), *truths, [*values, *allowed])


@pytest.mark.parametrize("rows", [TRITON], indirect=True)
@pytest.mark.parametrize("loss", [False, True])
def test_with_triton(loss, rows):
    test_equals_full_logits(loss, TRANSFORMS[1], "several", "one")


@pytest.mark.usefixtures("rows", "block")
@pytest.mark.parametrize("k", [1, 5, 28, 29])
@pytest.mark.parametrize("chunk_bytes", [None, 4 * 14 * 4, 14 * 4])
@pytest.mark.parametrize("masked", [False, True])
def test_ties(masked, k, chunk_bytes):
    """Logits of three values and -inf: the k-th is in most rows one of many that are equal."""
    logits = torch.randint(3, (N, V)) * 1.0
    logits[1], logits[2] = 0.5, torch.arange(V) // 3
    bias = torch.zeros(V).masked_fill(torch.arange(V) % 3 == 1, -torch.inf if masked else 0)
    arguments = {} if chunk_bytes is None else {"chunk_bytes": chunk_bytes}
    found = of_logits(logits, top_k=k, stats=TOP, bias=bias, **arguments)
    top, indices, tail = plain(logits + bias, k)
    assert torch.equal(found.top_indices, indices) and found.entropy is None
    assert_close(found.top_logprobs, top)
    assert_close(found.tail_logprob, tail)
    if k == V:
        assert found.tail_logprob.isneginf().all()


def test_zeros_of_both_signs_are_equal():
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    for k in (1, 2, 3):
        assert of_logits(logits, top_k=k).top_indices.tolist() == [list(range(k))] * 2


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("gap", [10.0, 17.0, 30.0, 1e4])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_tail_of_a_sure_model(shift, gap):
    """Log(1 - p) would have no digits, or be -inf."""
    logits = (torch.randn(4, 50) * 64).round() / 64  # exact after the shift
    logits[:, 11] += gap
    _, _, tail = plain(logits.double(), 1)
    found = of_logits(logits + shift, top_k=1)
    assert found.top_indices.flatten().tolist() == [11] * 4
    assert_close(found.tail_logprob.double(), tail, rtol=3e-7, atol=1e-6)


def test_broken_rows_and_masked_tokens():
    hidden, weight, _, targets = draw(N, D, V)
    with torch.no_grad():
        hidden[2], hidden[1] = torch.nan, torch.nan
    stats = fused_token_stats(hidden, weight, targets, top_k=3, mask=MASK)
    for name in ("top_logprobs", "tail_logprob"):
        found = getattr(stats, name)
        assert found[2].isnan().all() and (found[MASK == 0] == 0).all()
    assert stats.top_indices[2].tolist() == [0, 1, 2] and (stats.top_indices[MASK == 0] == 0).all()
    (dh,) = torch.autograd.grad(stats.top_logprobs.sum(), hidden)
    assert dh[2].isnan().all() and (dh[MASK == 0] == 0).all()
    with torch.no_grad():
        hidden[1:3] = 0.0
    true = fused_token_stats(hidden, weight, targets, top_k=3)
    others = torch.tensor([0, 3, 5, 6])
    for mine, whole in zip(stats[6:], true[6:], strict=True):
        assert torch.equal(mine[others], whole[others])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck(transform):
    inputs = draw(N, D, V, dtype=torch.float64)[:3]
    transform = {k: x.double() if k == "temperature" else x for k, x in transform.items()}

    def top(h, w, b):
        stats = fused_token_stats(h, w, bias=b, top_k=4, stats=("logsumexp",), **transform)
        return stats.top_logprobs, stats.logsumexp

    assert torch.autograd.gradcheck(top, inputs, fast_mode=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck_of_a_loss(transform):
    inputs = draw(N, D, V, dtype=torch.float64)[:3]
    transform = {k: x.double() if k == "temperature" else x for k, x in transform.items()}
    targets = logits_of(*inputs, **transform).argsort(-1, descending=True)[:, 2]

    def total(h, w, b):
        loss_fn = lambda s, i: s.top_logprobs.exp().prod(1) + s.logprob * s.entropy  # noqa: E731
        return fused_token_loss(h, w, targets, loss_fn, bias=b, top_k=4, mask=MASK, **transform)

    assert torch.autograd.gradcheck(total, inputs, fast_mode=True)


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_loss_with_a_tolerance(differentiable):
    """Largest entries without gradient leave the choice of columns alone; with one all count."""
    n, d, v = 512, 32, 4096
    hidden, weight = (x.detach() for x in draw(n, d, v)[:2])
    inputs = (3 * hidden).requires_grad_(), weight.requires_grad_()

    def loss_fn(stats, index):
        top = stats.top_logprobs if differentiable else stats.top_logprobs.detach()
        return stats.entropy * top.exp().sum(1)

    def gradients(tolerance):
        loss = fused_token_loss(*inputs, None, loss_fn, top_k=20, grad_tolerance=tolerance)
        return gradient_report(loss), torch.autograd.grad(loss, inputs)

    (exact, truth), (report, found) = gradients(0), gradients(0.05)
    assert exact.active_share == 1 and (report.active_share == 1) == differentiable
    for a, b in zip(found, truth, strict=True):
        assert (a - b).norm() <= (1e-5 if differentiable else 0.2) * b.norm()


def test_a_loss_takes_six_units():
    inputs = draw(N, D, V)[:2]
    loss_fn = lambda s, i: s.top_logprobs.exp().sum(1)  # noqa: E731
    loss = lambda: fused_token_loss(*inputs, None, loss_fn, top_k=5)  # noqa: E731
    assert work(loss) == pytest.approx(6 * N * D * V, rel=0.01)


@pytest.mark.parametrize("mask", [torch.zeros(N), torch.zeros(0)], ids=["masked", "empty"])
def test_a_loss_without_tokens(mask):
    hidden, weight, _, _ = draw(N, D, V)

    def loss_fn(stats, index):
        assert stats.top_logprobs.shape == stats.top_indices.shape == (0, 3)
        return stats.tail_logprob, {"best": stats.top_indices[:, 0]}

    loss, stats, extras = fused_token_loss(
        hidden[: len(mask)], weight, None, loss_fn, mask=mask, top_k=3, return_stats=TOP
    )
    assert loss == 0 and (extras["best"] == 0).all() and extras["best"].shape == mask.shape
    for name in TOP:
        shape = mask.shape if name == "tail_logprob" else (*mask.shape, 3)
        assert getattr(stats, name).shape == shape and (getattr(stats, name) == 0).all()


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("targets", [(), (3,)])
def test_shapes_and_the_twin(shape, targets):
    size = torch.Size(shape).numel()
    hidden, weight, bias, _ = draw(max(1, size), D, V)
    hidden = hidden.detach()[:size].reshape(*shape, D)
    targets = torch.randint(V, (*shape, *targets))
    mask = torch.rand(shape) > 0.2
    arguments = {"bias": bias, "mask": mask, "top_k": 5, "temperature": 0.7}
    found = fused_token_stats(hidden, weight, targets, stats=TokenStats._fields, **arguments)
    true = reference.token_stats(hidden, weight, targets, **arguments)
    assert found.top_logprobs.shape == (*shape, 5) and found.tail_logprob.shape == shape
    assert_close(found, true)


def test_adds_to_the_statistics_asked_for():
    hidden, weight, _, targets = draw(N, D, V)
    asked = {"default": None, "one": ("mean_logit",), "none": TOP[:1], "empty": ()}
    asked["all"] = TokenStats._fields
    expected = {"default": ("entropy", "logprob"), "one": ("mean_logit",), "none": (), "empty": ()}
    expected["all"] = TokenStats._fields[:6]
    for name, stats in asked.items():
        found = fused_token_stats(hidden, weight, targets, stats=stats, top_k=2)._asdict()
        assert {k for k, x in found.items() if x is not None} == {*expected[name], *TOP}
    found = fused_token_stats(hidden, weight, targets, stats=TokenStats._fields)
    assert found[6:] == (None, None, None) and all(x is not None for x in found[:6])


def test_peak_is_small_blocks_beside_the_chunk(monkeypatch):
    n, v, k = 64, 5000, 8
    hidden, weight, _, _ = (x.detach() for x in draw(n, D, v))
    monkeypatch.setattr(chosen, "CPU_BLOCK", 2 * v)

    def peak(**arguments):
        found, most = 0, 0
        for size in changes(lambda: fused_token_stats(hidden, weight, **arguments)):
            found += size
            most = max(most, found)
        return most

    assert peak(top_k=k) - peak() < 8 * 2 * v * 4 + n * k * 100 < n * v * 4 / 2


def test_the_same_bits_again():
    inputs = draw(N, D, V)[:2]
    found = []
    for _ in range(2):
        stats = fused_token_stats(*inputs, top_k=5)
        found.append((*stats[6:], *torch.autograd.grad(stats.top_logprobs.exp().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "top_k, error, text",
    [
        (0, ValueError, "0 is not > 0"),
        (-2, ValueError, "-2 is not > 0"),
        (V + 1, ValueError, "30 is more than the 29"),
        (2.0, TypeError, "float"),
        (True, TypeError, "bool"),
    ],
)
def test_refusals(top_k, error, text):
    hidden, weight, _, _ = draw(N, D, V)
    with pytest.raises(error, match=f"^top_k: .*{text}"):
        fused_token_stats(hidden, weight, top_k=top_k)
    with pytest.raises(error, match=f"^top_k: .*{text}"):
        fused_token_loss(hidden, weight, None, lambda s, i: s.entropy, top_k=top_k)
    with pytest.raises(ValueError, match="^return_stats: top_indices needs top_k"):
        fused_token_loss(
            hidden, weight, None, lambda s, i: s.entropy, return_stats=("top_indices",)
        )
    with pytest.raises(ValueError, match="^stats: tail_logprob needs top_k"):
        fused_token_stats(hidden, weight, stats=("entropy", "tail_logprob"))


@pytest.mark.parametrize("targets", [None, torch.arange(2 * N).view(N, 2)])
def test_opcheck(targets):
    opcheck(targets, 3)


def test_compiled_equals_eager():
    inputs = draw(N, D, V)[:3]
    targets = torch.arange(2 * N).view(N, 2)

    def loss(h, w, b):
        stats = fused_token_stats(h, w, targets, bias=b, top_k=3)
        of_tail = (stats.tail_logprob.exp() * stats.top_logprobs[:, 0]).sum()
        return of_tail + stats.logprob.sum() + math.pi * stats.top_indices.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for function in (compiled, loss):
        found = function(*inputs)
        gradients = torch.autograd.grad(found, inputs)
        if function is compiled:
            first = found, gradients
    assert_close(first, (found, gradients))
