"""Bugs that other libraries had, each on the input that shows it.

Elsewhere: logits beyond the vocabulary (verl #2656, #2899) and rows of negative logits only (verl
#7439) in test_hard_inputs.py; adapters on the head in test_hf.py.
"""

import itertools

import pytest
import torch
from kernel_params import needs_extension
from test_memory import changes
from torch.testing import assert_close
from truth import draw, entropy_of, leaves, logits_of, relative_error, stats_of

from em_kernels import fused_entropy_loss, fused_token_loss, fused_token_stats

LOSSES = {
    "entropy_loss": lambda h, w, **k: fused_entropy_loss(h, w, reduction="sum", **k),
    "none": lambda h, w, **k: fused_entropy_loss(h, w, reduction="none", **k).sum(),
    "token_stats": lambda h, w, **k: fused_token_stats(h, w, **k).entropy.sum(),
    "token_loss": lambda h, w, **k: fused_token_loss(h, w, None, lambda s, i: s.entropy, **k),
}
ALL_LOSSES = pytest.mark.parametrize("loss", LOSSES)


@pytest.mark.usefixtures("rows")
@ALL_LOSSES
@pytest.mark.parametrize("trained", [(0, 1), (0,), (1,)])
def test_entropy_alone_has_its_gradient(loss, trained):
    """TRL #6625: it was silently zero. Also with hidden or weight frozen."""
    inputs = draw(7, 16, 300)[:2]
    ours = [x.detach().requires_grad_(i in trained) for i, x in enumerate(inputs)]
    wide = leaves(*inputs, dtype=torch.float64)
    LOSSES[loss](*ours).backward()
    truth = torch.autograd.grad(entropy_of(*wide).sum(), wide)
    for i in range(2):
        if i in trained:
            assert relative_error(ours[i].grad, truth[i]) < 3e-6
        else:
            assert ours[i].grad is None


def test_entropy_bonus_is_not_dropped():
    """TRL #5595, #6140: a bonus must change loss and gradient by its own."""
    hidden, weight, _, targets = draw(7, 16, 300)

    def gradients(bonus):
        loss = fused_token_loss(
            hidden, weight, targets, lambda s, i: -s.logprob - bonus * s.entropy
        )
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    wide = leaves(hidden, weight, dtype=torch.float64)
    entropy = entropy_of(*wide).sum()
    truth = entropy, *torch.autograd.grad(entropy, wide)
    for none, some, true in zip(gradients(0.0), gradients(0.25), truth, strict=True):
        assert relative_error((none - some) / 0.25, true) < 1e-5


@ALL_LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_near_uniform_rows(loss, dtype):
    """Cut Cross-Entropy #14: a filter of small probabilities drops a flat row's whole gradient."""
    inputs = draw(16, 32, 30000, dtype=dtype, scale=0.05)[:2]
    wide = leaves(*inputs, dtype=torch.float64)
    ours = torch.autograd.grad(LOSSES[loss](*inputs), inputs)
    truth = torch.autograd.grad(entropy_of(*wide).sum(), wide)
    for mine, true in zip(ours, truth, strict=True):
        assert relative_error(mine, true) < (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.usefixtures("rows")
@ALL_LOSSES
def test_bias_counts(loss):
    """Cut Cross-Entropy #52: the bias must count in the loss and in all three gradients."""
    inputs = draw(7, 16, 300)[:3]
    wide = leaves(*inputs, dtype=torch.float64)
    ours, truth = LOSSES[loss](*inputs[:2], bias=inputs[2]), entropy_of(*wide).sum()
    assert relative_error(ours, truth) < 2e-6
    gradients = torch.autograd.grad(ours, inputs)
    for mine, true in zip(gradients, torch.autograd.grad(truth, wide), strict=True):
        assert relative_error(mine, true) < 3e-6


@ALL_LOSSES
def test_dweight_of_many_chunks_is_summed_in_fp32(loss):
    """Liger #512, #830, #1391: summed in bf16, each of 256 chunks rounds the whole of dweight."""
    inputs = draw(2048, 16, 200, dtype=torch.bfloat16)[:2]
    wide = leaves(*inputs, dtype=torch.float64)
    token_major = loss in ("entropy_loss", "token_loss")
    ours = LOSSES[loss](*inputs, chunk_bytes=8 * 200 * 4 if token_major else 10_000)
    (mine,) = torch.autograd.grad(ours, inputs[1:])
    (true,) = torch.autograd.grad(entropy_of(*wide).sum(), wide[1:])
    # dweight's own rounding to bf16 and dy's, whose errors of 2048 tokens average out
    assert relative_error(mine, true) < 2**-8


@needs_extension
@ALL_LOSSES
def test_memory_is_the_users(loss):
    """The peak follows chunk_bytes. Liger #1414, #1439, #1472: no default suited everybody."""
    n, d, v = 256, 16, 4096
    inputs = draw(n, d, v)[:2]
    needed = sum(x.nbytes for x in inputs) + 40 * n * 4

    def peak(chunk_bytes):
        sizes = changes(lambda: LOSSES[loss](*inputs, chunk_bytes=chunk_bytes).backward())
        for x in inputs:
            x.grad = None
        return max(itertools.accumulate(sizes))

    for rows in (4, 16, 64):
        assert peak(rows * v * 4) <= rows * v * 4 + needed


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("upstream", ["ones", "signs", "zeros", "one token"])
def test_any_upstream_per_token(upstream, frozen):
    """Other libraries assume an upstream of ones, or a head that is trained."""
    *inputs, targets = draw(9, 16, 300)
    inputs = inputs[:2]
    factors = {
        "ones": torch.ones(9),
        "signs": torch.linspace(-2, 2, 9),
        "zeros": torch.zeros(9),
        "one token": torch.eye(9)[4],
    }[upstream]
    wide = leaves(*inputs, dtype=torch.float64)
    trained = slice(0, 1) if frozen else slice(0, 2)
    if frozen:
        inputs[1].requires_grad_(False)
    for name in ("entropy", "logprob"):
        stats = fused_token_stats(*inputs, targets, stats=[name])
        ours = torch.autograd.grad((factors * getattr(stats, name)).sum(), inputs[trained])
        truth = stats_of(logits_of(*wide), targets)[name]
        true = torch.autograd.grad((factors * truth).sum(), wide[trained])
        for a, b in zip(ours, true, strict=True):
            assert (a - b).norm() <= 3e-6 * b.norm()


@pytest.mark.usefixtures("rows")
@ALL_LOSSES
def test_all_tokens_masked(loss):
    inputs = draw(5, 16, 300)[:2]
    value = LOSSES[loss](*inputs, mask=torch.zeros(5))
    assert value == 0
    for gradient in torch.autograd.grad(value, inputs):
        assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_nan_reaches_tokens_that_were_left_out(frozen):
    """Their entropy is 0, whose logarithm has an infinite derivative."""
    hidden, weight, _, targets = draw(6, 16, 300)
    weight.requires_grad_(not frozen)
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    targets[2] = -100
    entropy = fused_token_stats(hidden, weight, mask=mask).entropy
    logprob = fused_token_stats(hidden, weight, targets, stats=["logprob"], mask=mask).logprob
    for loss, left_out in ((entropy.log(), [1, 4]), ((-logprob).sqrt(), [1, 2, 4])):
        upstream = torch.zeros(6).index_fill(0, torch.tensor(left_out), 0) + (mask > 0)
        (dh,) = torch.autograd.grad((upstream * loss.nan_to_num(neginf=0)).sum(), hidden)
        assert (dh[left_out] == 0).all() and dh.isfinite().all()
