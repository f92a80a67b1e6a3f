"""Several targets a token: logprob (..., K) and its gradient, in statistics and in losses."""

import pytest
import torch
from kernel_params import TRITON
from test_chunked import work
from torch.testing import assert_close
from truth import compare, draw, floors, leaves, logits_of

from em_kernels import fused_token_loss, fused_token_stats, reference
from em_kernels.ops import chunked, torch_library
from em_kernels.ops import inputs as ops_inputs
from em_kernels.ops.inputs import GradMask, HeadInputs

N, D, V, K = 7, 6, 29, 4
TARGETS = torch.tensor(
    [
        [0, 28, 3, 5],
        [9, 9, 9, 9],
        [-100, -100, -100, -100],
        [7, -100, 7, 0],
        [0, -100, 0, 0],
        [28, 27, 28, -100],
        [14, 1, 2, 14],
    ]
)
TAU = torch.tensor([0.5, 1.0, 2.0, 0.8, 1.1, 0.3, 1.7])
TRANSFORMS = [{}, {"temperature": TAU, "softcap": 5.0, "logit_scale": -0.7}]
# All logits kept; a slab of vocabulary entries at a time, of which the last has one. In the loss:
# one chunk, or some tokens at a time.
BUDGETS = {"one": None, "several": 4 * (N + D) * 4}
MASKS = {"all": None, "some": torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.5, 1.0])}
NAMES = ("logprob", "entropy", "dhidden", "dweight", "dbias")


def plain(inputs, targets, upstream, kept, transform, dtype):
    """Return logprob, entropy and the gradients on full logits; masked tokens are 0."""
    tensors = leaves(*inputs, dtype=dtype)
    logp = logits_of(*tensors, **transform).log_softmax(-1)
    logprob = torch.where(targets == -100, 0, logp.gather(-1, targets.clamp(min=0)))
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    found = [torch.where(kept[:, None], logprob, 0), torch.where(kept, entropy, 0)]
    total = sum((g.to(dtype) * x).sum() for g, x in zip(upstream, found, strict=True))
    return *found, *torch.autograd.grad(total, tensors)


def run(inputs, targets, upstream, loss, chunk_bytes, **head):
    """Return the same of ours, from statistics or from inside a loss."""
    hidden, weight, bias = inputs
    of_logprob, of_entropy = (
        g.to(torch.promote_types(bias.dtype, torch.float32)) for g in upstream
    )
    head |= {"bias": bias}
    if chunk_bytes is not None:
        head["chunk_bytes"] = chunk_bytes * bias.element_size() // 4
    if not loss:
        stats = fused_token_stats(hidden, weight, targets, **head)
        total = (of_logprob * stats.logprob).sum() + (of_entropy * stats.entropy).sum()
        found = stats.logprob, stats.entropy
    else:
        weights = head.pop("mask", None)
        head["mask"] = None if weights is None else weights != 0
        found = torch.zeros_like(of_logprob), torch.zeros_like(of_entropy)

        def loss_fn(stats, index):
            found[0][index], found[1][index] = stats.logprob.detach(), stats.entropy.detach()
            losses = (of_logprob[index] * stats.logprob).sum(1) + of_entropy[index] * stats.entropy
            stats.logprob.data.zero_()  # a copy of its own, which may be overwritten
            return losses

        total = fused_token_loss(hidden, weight, targets, loss_fn, **head)
    return *found, *torch.autograd.grad(total, inputs)


def upstreams(*shape):
    return torch.randn(*shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss", [False, True])
def test_equals_full_logits(loss, transform, mask, budget):
    mask, chunk_bytes = MASKS[mask], BUDGETS[budget]
    inputs = draw(N, D, V)[:3]
    inputs[2].data[3] = -torch.inf  # a target of probability 0
    upstream = upstreams(N, K)
    kept = torch.ones(N).bool() if mask is None else mask != 0
    truth, eager = (
        plain(inputs, TARGETS, upstream, kept, transform, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    with torch.no_grad():
        inputs[0][~kept] = torch.nan
    ours = run(inputs, TARGETS, upstream, loss, chunk_bytes, mask=mask, **transform)
    assert ours[0].shape == (N, K) and (ours[2][~kept] == 0).all()
    assert torch.equal(ours[0].isneginf(), truth[0].isneginf()) and ours[0][0, 2].isneginf()
    finite = [[of[0].masked_fill(of[0] == -torch.inf, 0), *of[1:]] for of in (ours, eager, truth)]
    with torch.no_grad():
        sound = inputs[0].masked_fill(~kept[:, None], 0), inputs[1], inputs[2].clamp(min=-9)
    size = upstream[0].abs().sum(1) + upstream[1].abs()
    value, *allowed = floors(sound, transform, torch.full((N,), K).double())
    _, *allowed = floors(sound, transform, size)
    compare(NAMES, *finite, (value, value, *allowed))


@pytest.mark.parametrize("rows", [TRITON], indirect=True)
@pytest.mark.parametrize("loss", [False, True])
def test_with_triton(loss, rows):
    test_equals_full_logits(loss, TRANSFORMS[1], "some", "one")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss", [False, True])
def test_gradcheck(loss, transform):
    inputs = draw(N, D, V, dtype=torch.float64)[:3]
    upstream = upstreams(N, K)
    transform = {k: x.double() if k == "temperature" else x for k, x in transform.items()}

    def total(h, w, b):
        if not loss:
            stats = fused_token_stats(h, w, TARGETS, bias=b, **transform)
            return stats.logprob, stats.entropy
        loss_fn = lambda s, i: (upstream[0][i] * s.logprob.exp()).sum(1) + s.entropy  # noqa: E731
        return fused_token_loss(h, w, TARGETS, loss_fn, bias=b, **transform)

    assert torch.autograd.gradcheck(total, inputs, fast_mode=True)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("gap", [12.0, 20.0, 1e4])
@pytest.mark.parametrize("targets", [[11, 11, 30], [11, -100, 11], [30, 31, 11]])
def test_sure_targets(gap, targets):
    """d logprob / dz_target = 1 - p, where p rounds to 1: expm1 keeps its digits.

    So does the sum of the other targets' upstream gradients, which are small.
    """
    logits = torch.randn(3, 50)
    logits[:, 11] += gap
    targets = torch.tensor(targets).expand(3, -1)
    hidden, weight = torch.eye(3), logits.t().contiguous().requires_grad_()
    upstream = torch.where(targets == 11, torch.tensor([1.0, 1e-3, 0.5]), 1e-5)
    stats = fused_token_stats(hidden, weight, targets)
    ours = torch.autograd.grad((upstream * stats.logprob).sum(), weight)[0].t()
    wide = logits.double().requires_grad_()
    logprob = wide.log_softmax(-1)
    logprob = logprob.gather(-1, targets.clamp(min=0)).masked_fill(targets == -100, 0)
    (true,) = torch.autograd.grad((upstream * logprob).sum(), wide)
    assert_close(stats.logprob.double(), logprob, rtol=3e-6, atol=1e-30)
    assert_close(ours.double(), true, rtol=2e-5, atol=1e-30)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [False, True])
def test_16_bits(loss, dtype, monkeypatch):
    """Only results are rounded; gradients of size 1e-6 keep their digits in fp16 GEMMs."""
    monkeypatch.setattr(ops_inputs, "operand_dtype", lambda weight: weight.dtype)  # as on a GPU
    inputs = draw(N, D, V, dtype=dtype)[:3]
    upstream = [1e-6 * g for g in upstreams(N, K)]
    kept = torch.ones(N).bool()
    truth = plain(inputs, TARGETS, upstream, kept, {}, torch.float64)
    ours = run(inputs, TARGETS, [g.float() for g in upstream], loss, None)
    assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-5)
    for mine, true in zip(ours[2:], truth[2:], strict=True):
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of fp16 results
        error = (mine.double() - true).abs().max()
        assert mine.dtype == dtype
        assert error <= 4 * torch.finfo(dtype).eps * true.abs().max() + 2 * least


def test_one_of_several_is_one():
    *inputs, targets = draw(N, D, V)
    targets[2] = -100
    upstream = upstreams(N, 1)
    one = run(inputs, targets[:, None], upstream, False, None)
    stats = fused_token_stats(inputs[0], inputs[1], targets, bias=inputs[2])
    total = upstream[0][:, 0].float() * stats.logprob + upstream[1].float() * stats.entropy
    alone = torch.autograd.grad(total.sum(), inputs)
    assert torch.equal(one[0][:, 0], stats.logprob) and torch.equal(one[1], stats.entropy)
    assert_close(one[2:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_shapes(shape, count):
    size = torch.Size(shape).numel()
    hidden, weight, bias, _ = draw(max(1, size), D, V)
    hidden = hidden.detach()[:size].reshape(*shape, D).requires_grad_()
    targets = torch.randint(V, (*shape, count))
    stats = fused_token_stats(hidden, weight, targets, bias=bias)
    true = reference.token_stats(hidden, weight, targets, bias=bias)
    assert stats.logprob.shape == (*shape, count) and stats.entropy.shape == shape
    assert_close(stats.logprob, true.logprob)
    ours, theirs = (
        torch.autograd.grad((s.logprob.exp()).sum() + s.entropy.sum(), (hidden, weight, bias))
        for s in (stats, true)
    )
    assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_frozen_inputs_and_single_statistics(needs):
    inputs = draw(N, D, V)[:3]
    frozen = [x.detach().requires_grad_(n) for x, n in zip(inputs, needs, strict=True)]
    index = needs.index(True)
    for names in (("logprob",), ("entropy",)):
        whole, part = (
            fused_token_stats(h, w, TARGETS, bias=b, stats=names) for h, w, b in (inputs, frozen)
        )
        expected = torch.autograd.grad(getattr(whole, names[0]).sum(), inputs[index])
        found = torch.autograd.grad(getattr(part, names[0]).sum(), frozen[index])
        assert_close(found, expected, rtol=0, atol=0)


def test_a_broken_row_stays_alone():
    hidden, weight, bias, _ = draw(N, D, V)
    (clean,) = leaves(hidden)
    hidden.data[5] = torch.nan
    others = torch.tensor([0, 1, 2, 3, 4, 6])
    upstream = upstreams(N, K)
    broken = run((hidden, weight, bias), TARGETS, upstream, False, None)
    whole = run((clean, weight, bias), TARGETS, upstream, False, None)
    assert broken[0][5].isnan().tolist() == [True, True, True, False]  # the last is ignored
    for a, b in zip(broken[:3], whole[:3], strict=True):
        assert torch.equal(a[others], b[others])


def test_six_units_of_work():
    hidden, weight, _, _ = (x.detach() for x in draw(N, 64, 500))
    head = HeadInputs(hidden, weight, targets=TARGETS)

    def run():
        chunked.sum_custom_loss(head, lambda s, i: s.logprob.sum(1), GradMask(True, True))

    assert work(run) == 6 * N * 64 * 500


def test_the_same_bits_again():
    inputs = draw(N, D, V)[:3]
    upstream = upstreams(N, K)
    first, second = (run(inputs, TARGETS, upstream, True, 3 * V * 4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_tolerance_is_not_used():
    hidden, weight = (x.detach().requires_grad_() for x in draw(512, 64, 2048)[:2])
    targets = torch.arange(3 * 512).view(512, 3)
    for loss_fn in (lambda s, i: s.entropy, lambda s, i: s.logprob.sum(1)):
        loss = fused_token_loss(hidden, weight, targets, loss_fn, grad_tolerance=0.01)
        exact = fused_token_loss(hidden, weight, targets, loss_fn)
        ours, truth = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, exact))
        assert torch.equal(loss, exact) and all(map(torch.equal, ours, truth))


def test_refusals():
    hidden, weight, _, _ = draw(N, D, V)
    for wrong in (TARGETS + V, TARGETS - 101):
        with pytest.raises(ValueError, match=r"^targets: \d+ values out of range"):
            fused_token_stats(hidden, weight, wrong)
    with pytest.raises(TypeError, match="^targets: expected int64"):
        fused_token_stats(hidden, weight, TARGETS.int())
    with pytest.raises(ValueError, match=r"^targets: expected exactly \(7, 3\)"):
        fused_token_stats(hidden, weight, TARGETS[1:, :3])


def opcheck(targets, top_k, support=(None, None), dtype=torch.float32, v=V):
    """Check the ops' schemas, fakes and autograd for these arguments."""
    inputs = draw(N, D, v, dtype=dtype)[:3]
    settings = (targets, None, TAU, [0.7, 5.0, 1.0], None, None)
    needs = [True] * 3
    op, backward = torch_library.token_stats_op, torch_library.token_stats_backward_op
    torch.library.opcheck(op, (*inputs, *settings, needs, False, -1, top_k, *support))
    inputs = [x.detach() for x in inputs]
    found = op(*inputs, *settings, needs, False, -1, top_k, *support)
    statistics, saved, chosen, indices = found[0], found[2:5], found[6], found[7]
    several = indices if targets is None else torch.cat([targets, indices], 1)
    arguments = (statistics, chosen, statistics, *saved, *inputs, several, *settings[1:], needs)
    torch.library.opcheck(backward, (*arguments, *support))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    opcheck(TARGETS, 0, dtype=dtype)
