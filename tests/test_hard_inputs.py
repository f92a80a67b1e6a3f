"""Inputs that broke other libraries, or whose digits fp32 loses."""

import math

import pytest
import torch
from kernel_params import CUDA, DWEIGHT, OLDER, ROWS, TRITON
from torch.testing import assert_close
from truth import (
    assert_no_worse_than_eager,
    draw,
    entropy_of,
    floors,
    leaves,
    logits_of,
    relative_error,
    stats_of,
)

from em_kernels import entropy_from_logits, fused_entropy_loss, fused_token_stats, ops

pytestmark = pytest.mark.usefixtures("rows")
both_ways = pytest.mark.usefixtures("dweight")  # a mean or sum keeps dy, or does not
WITH_TRITON = [*ROWS, *OLDER, TRITON, CUDA]
on_triton_too = pytest.mark.parametrize("rows", WITH_TRITON, indirect=True)


def in_one_way(rows, way):
    """Combine the parameters; the interpreter takes most of the time, so its second way is slow."""
    marks = [pytest.mark.slow] if rows is TRITON and way == "accumulated" else []
    return pytest.param(*rows.values, way, id=f"{rows.id}-{way}", marks=[*rows.marks, *marks])


def both_ways_on_triton_too(test):
    pairs = [in_one_way(rows, way) for rows in WITH_TRITON for way in DWEIGHT]
    return pytest.mark.parametrize("rows, dweight", pairs, indirect=True)(both_ways(test))


def heads(logits):
    """Return hidden and weight whose product is exactly these logits (N, V)."""
    return torch.eye(len(logits)), logits.t().contiguous()


def entropy_and_gradient(logits, **transform):
    """Yield entropy (N,) and dlogits (N, V) from each of three public functions."""
    hidden, weight = (x.requires_grad_() for x in heads(logits))
    summed = fused_entropy_loss(hidden, weight, reduction="sum", **transform)
    each = fused_entropy_loss(hidden, weight, reduction="none", **transform)
    assert_close(summed, each.sum())
    yield each, torch.autograd.grad(summed, weight)[0].t()
    yield each, torch.autograd.grad(each.sum(), weight)[0].t()
    if not transform:
        logits = logits.clone().requires_grad_()
        entropy = entropy_from_logits(logits)
        yield entropy, torch.autograd.grad(entropy.sum(), logits)[0]


def truth_of(logits):
    wide = logits.double().requires_grad_()
    entropy = stats_of(wide)["entropy"]
    return entropy, torch.autograd.grad(entropy.sum(), wide)[0]


def assert_rows_close(gradient, truth):
    error = (gradient.double() - truth).norm(dim=1)
    assert (error <= 2e-6 * truth.norm(dim=1)).all(), error / truth.norm(dim=1)


@both_ways_on_triton_too
@pytest.mark.parametrize("shift", [-1e4, -300.0, 300.0, 1e4])
def test_shift_invariance(shift):
    """Also for rows of negative logits only: verl #7439 starts the running maximum at 0."""
    logits = (torch.randn(3, 50) * 32).round() / 8  # exact after the shift
    true_entropy, true_gradient = truth_of(logits)
    for entropy, gradient in entropy_and_gradient(logits + shift):
        assert_close(entropy.double(), true_entropy, rtol=2e-6, atol=0)
        assert_rows_close(gradient, true_gradient)


@on_triton_too
@pytest.mark.parametrize("v", [1, 2, 29, 5000])
@pytest.mark.parametrize("value", [0.0, -7.3, 1e4])
def test_equal_logits(v, value):
    for entropy, gradient in entropy_and_gradient(torch.full((2, v), value)):
        assert_close(entropy, torch.full((2,), math.log(v)), rtol=3e-7, atol=0)
        assert gradient.abs().max() <= 1e-7 / v


@on_triton_too
@pytest.mark.parametrize("v", [50, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_words_masked_by_the_least_number(dtype, v):
    """Entries masked by the dtype's lowest number, not -inf: in fp32 two of them overflow."""
    logits = torch.randn(4, v).masked_fill(torch.rand(4, v) < 0.5, torch.finfo(dtype).min)
    true_entropy, true_gradient = truth_of(logits)
    for entropy, gradient in entropy_and_gradient(logits):
        assert_close(entropy.double(), true_entropy, rtol=2e-6, atol=0)
        assert_rows_close(gradient, true_gradient)


@both_ways_on_triton_too
@pytest.mark.parametrize("gap", [200.0, 1e4, 1e30])
def test_one_hot_rows(gap):
    logits = torch.zeros(3, 40)
    logits[[0, 1, 2], [0, 39, 7]] = gap
    for entropy, gradient in entropy_and_gradient(logits):
        assert (entropy == 0).all() and (gradient == 0).all()


@both_ways_on_triton_too
@pytest.mark.parametrize("gap", [10.0, 14.0, 17.0, 20.0])
def test_entropy_of_a_sure_model(gap):
    """For H of 2e-2 to 2e-6, log(1 + s') in fp32 would lose three digits and more."""
    logits = torch.randn(4, 50)
    logits[:, 11] += gap
    true_entropy, true_gradient = truth_of(logits)
    for entropy, gradient in entropy_and_gradient(logits):
        assert_close(entropy.double(), true_entropy, rtol=2e-6, atol=0)
        assert_close(gradient.double(), true_gradient, rtol=2e-5, atol=0)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("slab", [300, 5000])
def test_gradient_of_sure_tokens_by_recomputation(slab):
    """If the backward's logits rounded unlike the forward's, the error would be 1e-2, not 1e-5."""
    n, d, v = 64, 512, 5000
    weight = torch.randn(v, d) / d**0.5
    hidden = 20 * weight[torch.randint(v, (n,))] + torch.randn(n, d)
    upstream = torch.rand(n)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        h = hidden.to(dtype, copy=True).requires_grad_()
        arguments = {"reduction": "none", "chunk_bytes": slab * d * dtype.itemsize}
        entropy = fused_entropy_loss(h, weight.to(dtype), **arguments)
        (upstream * entropy).sum().backward()
        gradients.append(h.grad.double())
    true, ours = gradients
    assert entropy.mean() < 1e-2 and (ours - true).norm() <= 1e-4 * true.norm()


@on_triton_too
def test_gradient_of_a_sure_logprob():
    """d logprob / dz_target = 1 - p, where p rounds to 1."""
    logits = torch.randn(4, 50)
    logits[:, 11] += 20
    hidden, weight = (x.requires_grad_() for x in heads(logits))
    stats = fused_token_stats(hidden, weight, torch.full((4,), 11))
    gradient = torch.autograd.grad(stats.logprob.sum(), weight)[0].t()
    wide = logits.double().requires_grad_()
    logprob = wide.log_softmax(-1)[:, 11]
    (expected,) = torch.autograd.grad(logprob.sum(), wide)
    assert_close(stats.logprob.double(), logprob, rtol=2e-6, atol=0)
    assert_close(gradient.double(), expected, rtol=2e-5, atol=0)


@both_ways_on_triton_too
def test_logits_of_ten_thousand():
    logits = torch.linspace(-1e4, 1e4, 63).repeat(2, 1)
    logits[:, -2] = 1e4 - 0.5
    true_entropy, true_gradient = truth_of(logits)
    for entropy, gradient in entropy_and_gradient(logits):
        assert_close(entropy.double(), true_entropy, rtol=2e-6, atol=0)
        assert_rows_close(gradient, true_gradient)


@both_ways_on_triton_too
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_words_masked_by_the_bias(softcap):
    """Masked entries count as absent, with a softcap too (which would turn -inf into -softcap)."""
    hidden, weight, bias, targets = draw(5, 8, 30)
    keep = torch.arange(30) % 3 > 0
    fewer = leaves(hidden, weight[keep], bias[keep])
    position = keep.cumsum(0) - 1
    targets = torch.where(keep[targets], targets, 1)
    with torch.no_grad():
        bias[~keep] = -torch.inf
    names = ("entropy", "logprob", "logsumexp", "log_collision", "mean_logit", "argmax")
    found = []
    for (h, w, b), goals in (
        ((hidden, weight, bias), targets),
        (fewer, position[targets]),
    ):
        stats = fused_token_stats(h, w, goals, bias=b, stats=names, softcap=softcap)
        loss = fused_entropy_loss(h, w, bias=b, softcap=softcap)
        total = loss + sum(s.sum() for s in (stats.entropy, stats.logprob, stats.log_collision))
        found.append((stats, torch.autograd.grad(total, (h, w, b))))
    (stats, (dh, dw, db)), (plain, (true_dh, true_dw, true_db)) = found
    assert_close(stats[:3], plain[:3])
    assert_close(stats.log_collision, plain.log_collision)
    assert (stats.mean_logit == -torch.inf).all()
    assert torch.equal(position[stats.argmax], plain.argmax)
    assert_close((dh, dw[keep], db[keep]), (true_dh, true_dw, true_db), rtol=2e-6, atol=2e-6)
    assert (dw[~keep] == 0).all() and (db[~keep] == 0).all()


@on_triton_too
def test_target_that_is_masked():
    hidden, weight, bias, _ = draw(3, 8, 30)
    with torch.no_grad():
        bias[4] = -torch.inf
    logprob = fused_token_stats(hidden, weight, torch.tensor([4, 5, 6]), bias=bias).logprob
    assert logprob.isneginf().tolist() == [True, False, False]


@both_ways_on_triton_too
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_broken_rows_stay_alone(poison, reduction):
    """The token itself gets NaN; the other tokens' loss and dhidden are as without it."""
    hidden, weight, _, targets = draw(6, 4, 30)
    hidden.data[:, 0], weight.data[:, 0] = 0, 1  # -inf: no logit is finite
    (clean,) = leaves(hidden)
    hidden.data[2, 0] = poison
    others = torch.tensor([0, 1, 3, 4, 5])

    def run(h):
        stats = fused_token_stats(h, weight, targets)
        loss = fused_entropy_loss(h, weight, reduction=reduction)
        return *stats[:2], *torch.autograd.grad(loss.sum() + stats.logprob.sum(), h)

    for broken, whole in zip(run(hidden), run(clean), strict=True):
        assert broken[2].isnan().all()
        assert torch.equal(broken[others], whole[others])


@pytest.mark.parametrize("v", [640, 2049, 4095])
def test_no_phantom_words(v):
    """verl #2656, #2899 read logits of 0 beyond V, which only very negative logits show."""
    logits = torch.randn(2, v) - 300
    true_entropy, true_gradient = truth_of(logits)
    for entropy, gradient in entropy_and_gradient(logits):
        assert_close(entropy.double(), true_entropy, rtol=2e-6, atol=0)
        assert_rows_close(gradient, true_gradient)


@both_ways
def test_vocabulary_of_qwen():
    """V = 151936 would have 640 phantom entries in blocks of 1024."""
    hidden, weight, _, targets = draw(3, 8, 151936)
    hidden.data[:, 0] = 1
    weight.data[:, 0] -= 50
    wide = leaves(hidden, weight, dtype=torch.float64)
    truth = stats_of(logits_of(*wide, temperature=0.5), targets)
    stats = fused_token_stats(hidden, weight, targets, temperature=0.5)
    assert_close(stats.entropy.double(), truth["entropy"], rtol=2e-5, atol=0)
    assert_close(stats.logprob.double(), truth["logprob"], rtol=2e-5, atol=0)
    loss = fused_entropy_loss(hidden, weight, temperature=0.5, reduction="sum")
    ours = torch.autograd.grad(loss + stats.logprob.sum(), (hidden, weight))
    true = torch.autograd.grad(truth["entropy"].sum() + truth["logprob"].sum(), wide)
    plain = leaves(hidden, weight)
    eager = stats_of(logits_of(*plain, temperature=0.5), targets)
    theirs = torch.autograd.grad(eager["entropy"].sum() + eager["logprob"].sum(), plain)
    for a, b, exact in zip(ours, theirs, true, strict=True):
        assert_no_worse_than_eager(a, b, exact, floor=1e-5 * exact.norm().item())


@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bit_inputs_are_fp32(dtype):
    """Rounded to 16 bits, logits of size 20 put the entropy's second digit wrong."""
    inputs = draw(32, 64, 500, dtype=dtype, scale=10.0)[:3]
    wide = leaves(*inputs, dtype=torch.float64)
    upcast = entropy_of(*leaves(*inputs, dtype=torch.float32))
    (floor, *_) = floors(leaves(*inputs, dtype=torch.float32), {}, torch.ones(len(inputs[0])))
    for reduction in ("sum", "none"):
        h, w, b = inputs
        ours = fused_entropy_loss(h, w, bias=b, reduction=reduction)
        truth, plain = entropy_of(*wide), upcast
        if reduction == "sum":
            truth, plain = truth.sum(), plain.sum()
        assert_no_worse_than_eager(ours, plain, truth, floor)
        gradients = torch.autograd.grad(ours.sum(), inputs)
        expected = torch.autograd.grad(truth.sum(), wide)
        for mine, true in zip(gradients, expected, strict=True):
            assert mine.dtype == dtype
            # Only the result is rounded.
            assert relative_error(mine, true) <= torch.finfo(dtype).eps


@both_ways
def test_fp16_mean_over_many_tokens():
    """1/N is applied after dy is rounded to 16 bits; before, dhidden would be 2 % off here."""
    n = 4096
    inputs = draw(n, 8, 100, dtype=torch.float16, scale=4.0)[:2]
    summed, averaged = (
        torch.autograd.grad(scale * fused_entropy_loss(*inputs, reduction=reduction), inputs)
        for reduction, scale in (("sum", 1.0), ("mean", float(n)))
    )
    for mine, true in zip(averaged, summed, strict=True):
        assert relative_error(mine, true.double()) < 1e-5
    tiny = torch.full((n,), 1e-6)  # a mask as small as 1 / N, or smaller
    masked = torch.autograd.grad(
        1e6 * fused_entropy_loss(*inputs, mask=tiny, reduction="sum"), inputs
    )
    for mine, true in zip(masked, summed, strict=True):
        assert relative_error(mine, true.double()) < 1e-3


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_mean_of_statistics_over_many_tokens(dtype, monkeypatch):
    """The same for fused_token_stats, where only 16-bit GEMMs show it."""
    n = 4096
    *inputs, _ = draw(n, 8, 4000, dtype=dtype, scale=0.3)
    exact = [x.detach().double().requires_grad_() for x in inputs]

    def gradients(hidden, weight, bias):
        entropy = fused_token_stats(hidden, weight, bias=bias).entropy
        return torch.autograd.grad(entropy.mean(), (hidden, weight, bias))

    true = gradients(*exact)
    monkeypatch.setattr(ops.inputs, "operand_dtype", lambda weight: weight.dtype)  # as on a GPU
    for mine, reference in zip(gradients(*inputs), true, strict=True):
        assert relative_error(mine, reference) < 1e-2  # else 0.08 and more in fp16


@pytest.mark.usefixtures("rows")
def test_argmax_of_a_broken_row_is_a_word():
    """It is 0 in all kernels: -1 would index the last entry."""
    hidden = torch.full((2, 4), torch.nan)
    assert fused_token_stats(hidden, torch.ones(5, 4), stats=["argmax"]).argmax.tolist() == [0, 0]


def test_entropy_bonus_has_a_gradient():
    """TRL #6625, #5595 had a per-token entropy whose gradient was silently zero."""
    hidden, weight, _, targets = draw(4, 8, 30)
    for stats in (None, ("entropy",)):
        entropy = fused_token_stats(hidden, weight, targets, stats=stats).entropy
        for gradient in torch.autograd.grad(entropy[1], (hidden, weight)):
            assert gradient.norm() > 1e-3
    (dh,) = torch.autograd.grad(fused_token_stats(hidden, weight).entropy[1], hidden)
    assert dh.count_nonzero(dim=1).tolist() == [0, 8, 0, 0]
