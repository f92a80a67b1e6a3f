"""fused_token_loss against the same losses on full logits."""

import pytest
import torch
from test_chunked import work
from torch.testing import assert_close
from truth import FLOAT_STATS, draw, leaves, logits_of, relative_error, stats_of

from em_kernels import TokenStats, fused_token_loss, fused_token_stats

N, D, V = 24, 16, 300
TAU = torch.linspace(0.5, 1.5, N)


def grpo(stats, index):
    """Return a clipped policy loss with an entropy bonus, as DAPO and GRPO have it."""
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(N, generator=generator) * 0.5 - 6
    advantage = torch.randn(N, generator=generator)
    ratio = torch.exp(stats.logprob - old[index])
    clipped = ratio.clamp(1 - 0.2, 1 + 0.28)
    gain = torch.minimum(ratio * advantage[index], clipped * advantage[index])
    return -(gain + 0.01 * stats.entropy) / N


LOSS_FNS = {
    "GRPO": grpo,
    "cross-entropy": lambda s, i: -s.logprob,
    "z-loss": lambda s, i: 1e-4 * s.logsumexp**2,
    "self-certainty": lambda s, i: -(s.logsumexp - s.mean_logit),
    "collision": lambda s, i: s.log_collision.exp(),
    "entropy": lambda s, i: s.entropy,
    "everything": lambda s, i: sum((k + 1) * s[k] for k in range(5)) * (i % 3),
    "argmax": lambda s, i: s.entropy * (s.argmax % 2),
}


def on_full_logits(loss_fn, hidden, weight, targets, mask=None, **transform):
    found = stats_of(logits_of(hidden, weight, **transform), targets)
    losses = loss_fn(TokenStats(**found), torch.arange(N))
    return (losses if mask is None else mask * losses).sum()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("loss_fn", LOSS_FNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", [{}, {"temperature": TAU, "softcap": 8.0}])
def test_equals_the_loss_on_full_logits(loss_fn, dtype, transform):
    hidden, weight, _, targets = draw(N, D, V, dtype=dtype)
    targets[3] = -100
    chunk_bytes = 5 * V * 8
    function = LOSS_FNS[loss_fn]
    ours = fused_token_loss(hidden, weight, targets, function, chunk_bytes=chunk_bytes, **transform)
    wide = leaves(hidden, weight, dtype=torch.float64)
    truth = on_full_logits(function, *wide, targets, **transform)
    eps = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
    assert_close(ours.double(), truth, rtol=20 * eps, atol=20 * eps)
    gradients = torch.autograd.grad(ours, (hidden, weight))
    tolerance = 2**-7 if dtype == torch.bfloat16 else 100 * eps
    for mine, true in zip(gradients, torch.autograd.grad(truth, wide), strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, true) < tolerance


@pytest.mark.parametrize("mask", [torch.arange(N) % 3, torch.linspace(-1, 2, N)])
def test_mask_weighs_and_leaves_out(mask):
    hidden, weight, _, targets = draw(N, D, V)
    out = (mask == 0).nonzero()[:, 0]
    seen = []

    def loss_fn(stats, index):
        seen.append(index)
        return grpo(stats, index)

    with torch.no_grad():
        clean = hidden.clone()
        hidden[out] = torch.nan
    loss = fused_token_loss(hidden, weight, targets, loss_fn, mask=mask, chunk_bytes=5 * V * 4)
    wide = leaves(clean, weight, dtype=torch.float64)
    truth = on_full_logits(grpo, *wide, targets, mask=mask)
    assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    dh, dw = torch.autograd.grad(loss, (hidden, weight))
    true_dh, true_dw = torch.autograd.grad(truth, wide)
    assert relative_error(dh, true_dh) < 1e-5 and relative_error(dw, true_dw) < 1e-5
    assert (dh[out] == 0).all()
    assert torch.equal(torch.cat(seen), mask.nonzero()[:, 0]) and len(seen) > 2


def test_leading_dimensions_count_flat():
    hidden, weight, _, targets = draw(N, D, V)
    shaped = hidden.detach().view(2, 3, 4, D).requires_grad_()
    flat = fused_token_loss(hidden, weight, targets, grpo)
    ours = fused_token_loss(shaped, weight, targets.view(2, 3, 4), grpo)
    assert torch.equal(ours, flat)
    (dh,) = torch.autograd.grad(ours, shaped)
    assert torch.equal(dh.view(N, D), torch.autograd.grad(flat, hidden)[0])


def test_without_gradients_it_costs_a_forward():
    hidden, weight, _, targets = draw(N, D, V)
    unit = N * D * V
    for grad, units in ((False, 2), (True, 6)):
        with torch.set_grad_enabled(grad):
            found = work(lambda: fused_token_loss(hidden, weight, targets, grpo))
        assert found == pytest.approx(units * unit, rel=0.01)


def test_without_targets_there_is_no_logprob():
    hidden, weight, _, _ = draw(N, D, V)
    given = []

    def loss_fn(stats, index):
        given.append(stats)
        return stats.entropy

    fused_token_loss(hidden, weight, None, loss_fn)
    assert [name for name in FLOAT_STATS if getattr(given[0], name) is None] == ["logprob"]


def test_whatever_the_default_device():
    hidden, weight, _, targets = draw(N, D, V)
    found = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            loss = fused_token_loss(
                hidden, weight, targets, LOSS_FNS["cross-entropy"], grad_tolerance=0.1
            )
            found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_no_tokens():
    hidden, weight, _, _ = draw(N, D, V)
    loss = fused_token_loss(hidden[:0], weight, None, lambda s, i: s.entropy)
    assert loss == 0
    (dw,) = torch.autograd.grad(loss, weight)
    assert (dw == 0).all()


def test_backward_twice_and_not_again_of_itself():
    hidden, weight, _, targets = draw(N, D, V)
    loss = 3 * fused_token_loss(hidden, weight, targets, grpo)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def wrong_shape(stats, index):
    return stats.entropy.mean()


def not_a_tensor(stats, index):
    return 0.0


def of_nothing(stats, index):
    return torch.ones(len(index))


def detached(stats, index):
    return stats.entropy.detach()


def complex_losses(stats, index):
    return stats.entropy.to(torch.complex64)


def with_a_parameter(stats, index):
    return stats.entropy * torch.ones(1, requires_grad=True)


@pytest.mark.parametrize(
    "loss_fn, error, text",
    [
        (None, TypeError, "loss_fn: expected a function, got NoneType"),
        (wrong_shape, ValueError, r"loss_fn: expected one loss per token, \(24,\), got \(\)"),
        (not_a_tensor, TypeError, "loss_fn: expected to return a tensor, got float"),
        (of_nothing, ValueError, "loss_fn: its losses do not depend on the statistics"),
        (detached, ValueError, "loss_fn: its losses do not depend on the statistics"),
        (complex_losses, TypeError, "loss_fn: expected real losses, got torch.complex64"),
        (with_a_parameter, ValueError, r"loss_fn: uses a tensor \(1,\) that requires grad"),
    ],
)
def test_bad_loss_fn(loss_fn, error, text):
    hidden, weight, _, targets = draw(N, D, V)
    with pytest.raises(error, match=text):
        fused_token_loss(hidden, weight, targets, loss_fn)


def test_a_parameter_of_a_loss_of_frozen_inputs():
    hidden, weight, _, targets = (x.detach() for x in draw(N, D, V))
    with pytest.raises(ValueError, match=r"loss_fn: uses a tensor \(1,\) that requires grad"):
        fused_token_loss(hidden, weight, targets, with_a_parameter)
    with torch.no_grad():
        found = fused_token_loss(hidden, weight, targets, with_a_parameter)
    assert_close(found, fused_token_stats(hidden, weight).entropy.sum())


def test_compile_breaks_the_graph_and_says_where():
    hidden, weight, _, targets = draw(N, D, V)

    def loss_of(h, w):
        return 2 * fused_token_loss(3 * h, w, targets, grpo)

    eager = loss_of(hidden, weight)
    compiled = torch.compile(loss_of, backend="aot_eager")(hidden, weight)
    assert_close(compiled, eager)
    gradients = torch.autograd.grad(eager, (hidden, weight))
    assert_close(torch.autograd.grad(compiled, (hidden, weight)), gradients)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fused_token_loss"):
        torch.compile(loss_of, backend="aot_eager", fullgraph=True)(hidden, weight)


def test_what_loss_fn_does_to_its_arguments_stays_there():
    hidden, weight, _, targets = draw(N, D, V)
    mask = torch.arange(N) % 3

    def careful(stats, index):
        return 2 * stats.entropy + stats.logsumexp

    def vandal(stats, index):
        losses = careful(stats, index)
        for x in stats[:5]:
            x.detach().fill_(7)
        index.zero_()
        return losses

    found = []
    for loss_fn in (vandal, careful):
        loss = fused_token_loss(hidden, weight, targets, loss_fn, mask=mask)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for ours, truth in zip(*found, strict=True):
        assert torch.equal(ours, truth)


def test_loss_fn_may_overwrite_a_statistic_that_its_losses_do_not_use():
    hidden, weight, _, targets = draw(N, D, V)

    def loss_fn(stats, index):
        losses = stats.logprob**2
        with torch.no_grad():
            stats.entropy.zero_()
        return losses

    found = []
    for function in (loss_fn, lambda stats, index: stats.logprob**2):
        loss = fused_token_loss(hidden, weight, targets, function)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for ours, truth in zip(*found, strict=True):
        assert torch.equal(ours, truth)


def test_16_bit_losses_are_summed_in_fp32():
    hidden, weight, _, targets = draw(N, D, V)
    rough = fused_token_loss(hidden, weight, None, lambda s, i: (1e4 * s.entropy).half())
    exact = fused_token_loss(hidden, weight, None, lambda s, i: 1e4 * s.entropy)
    assert_close(rough, exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows_in_a_chunk", [4, 100])
def test_chunks_with_nothing_to_score(rows_in_a_chunk):
    """A loss may ignore the statistics of some chunks, though not of all."""
    hidden, weight, _, targets = draw(N, D, V)
    advantage = (torch.arange(N) < 5).float()

    def loss_fn(stats, index):
        scored = advantage[index] > 0
        return advantage[index] * stats.entropy if scored.any() else torch.zeros(len(index))

    loss = fused_token_loss(hidden, weight, None, loss_fn, chunk_bytes=rows_in_a_chunk * V * 4)
    (dh,) = torch.autograd.grad(loss, hidden)
    assert dh.abs().sum(1).gt(0).tolist() == [i < 5 for i in range(N)]


def test_a_function_that_keeps_a_variable():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.variable = torch.ones(1, requires_grad=True)
            return 2 * x

        @staticmethod
        def backward(ctx, upstream):
            return 2 * upstream

    hidden, weight, _, _ = draw(N, D, V)
    ours = fused_token_loss(hidden, weight, None, lambda s, i: Doubled.apply(s.entropy))
    assert_close(ours, 2 * fused_token_loss(hidden, weight, None, lambda s, i: s.entropy))
