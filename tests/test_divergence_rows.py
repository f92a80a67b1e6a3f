"""Kernels of the divergence, one by one: the same logits in fp32 and in fp64."""

import pytest
import torch
from kernel_params import OLDER, ROWS, TRITON
from test_divergence import BETAS
from torch.testing import assert_close

from em_kernels.kernels import portable
from em_kernels.reference import RowTransform
from em_kernels.reference_divergence import DivergenceTerms

TRANSFORMS = [(None, None), ("both", 5.0), ("ref", 30.0)]


def cases(*sizes):
    """Return parameters of kernels, beta and columns; of the interpreter, which is slow, few."""
    return [
        pytest.param(*rows.values, beta, v, id=f"{rows.id}-{beta}-{v}", marks=rows.marks)
        for rows in (*ROWS, *OLDER, TRITON)
        for beta in (BETAS[:3] if rows is TRITON else BETAS)
        for v in ((300,) if rows is TRITON else sizes)
    ]


def run(kernels, y, ref_y, bias, softcap, beta, out_dtype):
    """Return the sums of the rows, and the gradient."""
    rows, columns = y.shape
    tau = torch.linspace(0.5, 2, rows).to(y.dtype)
    biases = torch.randn(2, columns, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    row = RowTransform(biases[0] if bias == "both" else None, tau, -0.7, softcap)
    ref_row = RowTransform(biases[1] if bias else None, tau, -0.6, softcap and 20.0)
    per_row, targets = [], None
    for logits, transform in ((y, row), (ref_y, ref_row)):
        parts = kernels.row_statistics(logits, transform._replace(targets=targets), True)
        stats, m, log_s = kernels.finish_rows(parts, columns, targets)
        targets = stats.argmax
        per_row += [m, log_s]
    per_row = torch.stack([*per_row, -per_row[1] - stats.logprob, tau, 1 / tau])
    terms = DivergenceTerms(y, row, ref_y, ref_row, per_row, beta)
    sums = kernels.divergence_sums(terms)
    per_row[5] = sums[1] + (sums[0] - sums[0])
    out = torch.empty_like(y, dtype=out_dtype)
    kernels.divergence_gradient(terms, out)
    return sums, out


@pytest.mark.parametrize("bias, softcap", TRANSFORMS)
@pytest.mark.parametrize("kernels, beta, v", cases(1, 13, 1025))
def test_kernels(kernels, v, bias, softcap, beta):
    """Rows that are far, near, equal, sure of other entries, and without a distribution."""
    generator = torch.Generator().manual_seed(v)
    y = torch.randn(7, v, generator=generator) * 4
    ref_y = y + torch.tensor([3.0, 0.1, 1e-3, 0, 5, 1, 1])[:, None] * torch.randn(
        7, v, generator=generator
    )
    y[4, 0], ref_y[4, -1] = -100, -100
    y[5], ref_y[6, 0] = -torch.inf, torch.nan
    sums, dy = run(kernels, y, ref_y, bias, softcap, beta, torch.float32)
    settings = (bias, softcap, beta)
    true_sums, true_dy = run(portable, y.double(), ref_y.double(), *settings, torch.float64)
    _, plain_dy = run(portable, y, ref_y, *settings, torch.float32)
    assert sums[0, 5:].isnan().all() and dy[5:].isnan().all()
    assert true_sums[0, 5:].isnan().all() and true_dy[5:].isnan().all()
    # Rounding the logits of z, up to 40, to fp32 moves log p by 4e-6, and a divergence with it.
    assert_close(sums[:, :5].double(), true_sums[:, :5], rtol=2e-5, atol=4e-6)
    for row in range(5):
        error = (dy[row].double() - true_dy[row]).norm()
        plain = (plain_dy[row].double() - true_dy[row]).norm()
        assert error <= 3 * plain + 4e-6 * (true_dy[row].norm() + 1e-3)


@pytest.mark.parametrize("kernels, beta, v", cases(300))
def test_a_narrower_gradient_is_the_wide_one_rounded(v, beta, kernels):
    y, ref_y = torch.randn(2, 5, v) * 3
    _, wide = run(kernels, y, ref_y, "both", 5.0, beta, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        _, narrow = run(kernels, y, ref_y, "both", 5.0, beta, dtype)
        assert torch.equal(narrow, wide.to(dtype))
