"""Divergences of hard distributions: sure of one entry, without some entries, without any."""

import pytest
import torch
from test_divergence import BETAS, N, V, draw_pair, truth_of
from torch.testing import assert_close
from truth import leaves

from em_kernels import fused_divergence, reference_divergence


def from_logits(logits, ref_logits, beta, **settings):
    """Return the divergences of these logits, and their gradients for the first."""
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    rows = logits.clone().requires_grad_()
    finite, ref_finite = (x.masked_fill(x == -torch.inf, 0) for x in (rows, ref_logits))
    both = []
    for x in (logits, ref_logits):
        masked = (x == -torch.inf).all(0)
        both.append(torch.zeros(x.shape[1], dtype=x.dtype).masked_fill(masked, -torch.inf))
    each = fused_divergence(
        finite, eye, ref_finite, eye, beta=beta, bias=both[0], ref_bias=both[1], reduction="none"
    )
    (gradient,) = torch.autograd.grad(each.sum(), rows)
    return each.detach(), gradient


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("beta", [1e-50, 1e-40, 1 - 1e-12])
def test_a_beta_that_fp32_rounds_to_0_or_1_is_between_them(beta):
    """A rate that a schedule adds up in steps of 0.1 ends at 1 - 1e-16."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = draw_pair()
    bias[3] = ref_bias[4] = -torch.inf  # KL would be infinite
    hidden.requires_grad_()
    pair = hidden, weight, ref_hidden, ref_weight
    loss = fused_divergence(*pair, bias=bias, ref_bias=ref_bias, beta=beta)
    assert 0 <= loss < 1e-9
    assert (torch.autograd.grad(loss, hidden)[0].abs() < 1e-7).all()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("size", [20.0, 200.0, 1e4])
def test_one_hot_rows_against_flat_and_other_ones(size, beta):
    """Sure of one entry, of another, of none."""
    v = 37
    sure, other, flat = torch.zeros(3, v)
    sure[3], other[5] = size, size
    logits = torch.stack([sure, sure, flat, sure])
    ref_logits = torch.stack([flat, other, sure, sure])
    each, gradient = from_logits(logits, ref_logits, beta)
    true_logits = logits.double().requires_grad_()
    true = truth_of(true_logits, ref_logits.double(), beta)
    (true_gradient,) = torch.autograd.grad(true.sum(), true_logits)
    assert (each >= 0).all() and each[3] == 0 and (gradient[3] == 0).all()
    assert_close(each.double(), true.detach(), rtol=1e-5, atol=1e-7)
    assert_close(gradient.double(), true_gradient, rtol=2e-5, atol=1e-6)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("margin", [5.0, 10.0, 15.0])
def test_a_sure_models_gradient_keeps_its_digits(margin, beta):
    """p (log(p / q) - KL) is the difference of equal numbers where p is 1 but for e^-margin."""
    logits, ref_logits = torch.randn(2, 3, 37)
    logits[:, 4] = margin + 4
    _, gradient = from_logits(logits, ref_logits, beta)
    true_logits = logits.double().requires_grad_()
    true = truth_of(true_logits, ref_logits.double(), beta).sum()
    (true_gradient,) = torch.autograd.grad(true, true_logits)
    error = (gradient.double() - true_gradient).norm(dim=1)
    assert (error <= 1e-5 * true_gradient.norm(dim=1)).all()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("excludes", ["model", "reference", "both", "each another"])
def test_entries_that_a_head_excludes(excludes, beta):
    """A bias of -inf: infinite only where the other one's probability has no counterpart."""
    logits, ref_logits = torch.randn(2, 4, 9) * 2
    if excludes in ("model", "both", "each another"):
        logits[:, 2] = -torch.inf
    if excludes != "model":
        ref_logits[:, 2 if excludes in ("both", "reference") else 6] = -torch.inf
    each, gradient = from_logits(logits, ref_logits, beta)
    infinite = {
        "model": beta == 0,
        "reference": beta == 1,
        "both": False,
        "each another": beta in (0, 1),
    }[excludes]
    if infinite:
        assert (each == torch.inf).all() and gradient[:, 0].isnan().all()
        return
    true_logits = logits.double().requires_grad_()
    true = reference_of(true_logits, ref_logits.double(), beta)
    (true_gradient,) = torch.autograd.grad(true.sum(), true_logits)
    assert_close(each.double(), true.detach(), rtol=1e-5, atol=1e-7)
    assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-6)
    if beta not in (0, 1):
        assert_close(each.double(), truth_of(logits.double(), ref_logits.double(), beta))


def reference_of(logits, ref_logits, beta):
    """Return the divergences by the formulas of reference.py."""
    log_p, log_q = (
        (x - x.amax(1, keepdim=True)) - (x - x.amax(1, keepdim=True)).exp().sum(1, True).log()
        for x in (logits, ref_logits)
    )
    return reference_divergence.divergence_sums(log_p, log_q, log_p[:, 0], beta)[0]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("wrong", ["nan", "infinite", "masked nan"])
def test_what_a_token_breaks_is_its_own(wrong, beta):
    hidden, weight, _, ref_hidden, ref_weight, _ = draw_pair()
    good = fused_divergence(hidden, weight, ref_hidden, ref_weight, beta=beta, reduction="none")
    hidden = hidden.clone()
    hidden[2] = torch.inf if wrong == "infinite" else torch.nan
    mask = torch.ones(N)
    mask[2] = 0 if wrong == "masked nan" else 1
    mine = leaves(hidden, weight)
    each = fused_divergence(
        *mine, ref_hidden, ref_weight, beta=beta, mask=mask, reduction="none", chunk_bytes=4 * V * 8
    )
    others = torch.arange(N) != 2
    assert_close(each[others], good[others])
    dh, dw = torch.autograd.grad(each.sum(), mine)
    if wrong == "masked nan":
        assert each[2] == 0 and (dh[2] == 0).all() and dw.isfinite().all()
    else:
        assert each[2].isnan() and dh[2].isnan().all() and dh[others].isfinite().all()
