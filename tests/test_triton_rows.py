"""Triton only: splits of a row, 16-bit logits, padding, blocks, and the public functions on it."""

import math

import pytest
import torch
from interpreted import DEFAULT
from kernel_params import TRITON, interpreted_triton
from test_rows import (
    gradient_of,
    in_fp64,
    per_row_of,
    plain,
    problem,
    statistics_of,
    truth_of,
)
from torch.testing import assert_close
from truth import FLOAT_STATS, draw, entropy_of, leaves, relative_error, stats_of

from em_kernels import entropy_from_logits, fused_entropy_loss, fused_token_stats, reference
from em_kernels.reference import Coefficients, TokenStats

pytestmark = list(TRITON.marks)
kernels = interpreted_triton


def entropy_and_gradient(kernels, y, row):
    """Return entropy (rows,) and its gradient in a new buffer, as entropy_from_logits does."""
    parts = kernels.row_statistics(y, row, with_collision_and_argmax=False)
    rows = kernels.finish_rows(parts, y.shape[1], None)
    upstream = TokenStats(entropy=torch.ones_like(rows.m))
    out = torch.empty_like(y)
    kernels.row_gradient(y, row, kernels.gradient_factors(rows, upstream, y.shape[1]), out)
    return rows.stats.entropy, out


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_splits_of_a_row(splits, monkeypatch):
    monkeypatch.setattr(kernels, "_splits", lambda blocks, most, programs: splits)
    v = 4 * 512 + 5
    y, row, _ = problem(v, bias=True)
    y[0, : v // 2] = -torch.inf  # a part without finite logits
    y[1, [3, 600, 2050]] = y.max() + 9  # a tie in three parts
    row.bias[[3, 600, 2050]] = 0.0
    row = row._replace(targets=torch.tensor([v - 1, 600, -100, 0, v]))
    parts, truth = statistics_of(kernels, y, row), truth_of(y, row)
    assert torch.equal(parts.argmax, truth.argmax) and parts.argmax[1] == 3
    for name in ("m", "s1", "t", "q1", "total", "target_logit"):
        assert_close(
            getattr(parts, name).double(), getattr(truth, name), rtol=1e-5,
            atol=1e-2 if name == "total" else 1e-5,
        )  # fmt: skip


def test_splits_of_few_rows_keep_four_blocks_each():
    assert [kernels._splits(rows, 38 // 4, 64) for rows in (1, 8, 63, 64, 1000)] == [9, 8, 2, 1, 1]
    assert kernels._splits(1, 0, 64) == 1


def mass_and_truth(y, row, factors):
    """Return mass and row sums, both also in fp64, and the scale of the row sums."""
    parts, truth = statistics_of(kernels, y, row), truth_of(y, row)
    found = kernels.column_mass(y, row, per_row_of(parts, factors))
    dy = reference.row_gradient(
        y.double(), in_fp64(row), truth.m, truth.s1.log1p(), in_fp64(factors)
    )
    return *found, dy.abs().sum(0), dy.sum(1), dy.abs().sum(1)


@pytest.mark.parametrize("splits", [1, 2, 4])  # of 7 rows
@pytest.mark.parametrize("v", [3, 512, 2 * 512 + 133])  # whole blocks and narrow ones
def test_blocks_of_column_masses(splits, v, monkeypatch):
    monkeypatch.setattr(kernels, "_splits", lambda blocks, most, programs: splits)
    y = torch.randn(7, v) * 4
    row = plain(7)._replace(
        bias=torch.randn(v), targets=torch.tensor([0, v - 1, v // 2, -100, v, v // 3, 1])
    )
    factors = Coefficients(*torch.randn(6, 7))
    mass, row_sums, true_mass, true_sums, scale = mass_and_truth(y, row, factors)
    assert mass.shape == (v,) and row_sums.shape == (7,)
    assert_close(mass.double(), true_mass, rtol=5e-5, atol=1e-7)
    assert ((row_sums.double() - true_sums).abs() <= 2e-5 * scale + 1e-7).all()


def test_masked_words_and_broken_rows_of_column_masses():
    y, row, factors = problem(700, bias=True)
    y[:, 3], row.bias[600] = -torch.inf, -torch.inf
    y[:, 4] = torch.finfo(torch.float32).min  # times logit_scale / temperature it is infinite
    for softcap in (None, 5.0):
        part = row._replace(logit_scale=-1.5 if softcap else 1.5, softcap=softcap)
        mass, row_sums, true_mass, *_ = mass_and_truth(y, part, factors)
        assert (mass[[3, 600]] == 0).all() and mass.isfinite().all() and row_sums.isfinite().all()
        others = [j for j in range(700) if j != 4]
        assert_close(mass[others].double(), true_mass[others], rtol=5e-5, atol=1e-7)
    y[2, 650] = torch.nan
    mass, row_sums, *_ = mass_and_truth(y, row, factors)
    assert mass.isnan().all() and row_sums.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_column_masses_of_nothing(shape):
    per_row = torch.ones(8, shape[0])
    mass, row_sums = kernels.column_mass(torch.empty(shape), plain(shape[0]), per_row)
    assert torch.equal(mass, torch.zeros(shape[1]))
    assert torch.equal(row_sums, torch.zeros(shape[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("v", [512, 531])  # 512 is a multiple of 16, 531 is not
def test_logits_that_exist(dtype, v):
    y = (torch.randn(3, v) * 4).to(dtype)
    row = plain(3)._replace(inv_temperature=torch.tensor([1.0, 0.5, 2.0]))
    entropy, gradient = entropy_and_gradient(kernels, y, row)
    wide = y.double().requires_grad_()
    true_entropy = stats_of(wide * row.inv_temperature[:, None])["entropy"]
    (true_gradient,) = torch.autograd.grad(true_entropy.sum(), wide)
    assert_close(entropy.double(), true_entropy, rtol=2e-6, atol=0)
    # The interpreter truncates to bf16 instead of rounding.
    tolerance = {torch.float32: 5e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert gradient.dtype == dtype and relative_error(gradient, true_gradient) < tolerance
    factors = Coefficients(*torch.randn(6, 3))
    mass, row_sums, true_mass, true_sums, scale = mass_and_truth(y, row, factors)
    assert mass.dtype == row_sums.dtype == torch.float32
    assert_close(mass.double(), true_mass, rtol=5e-5, atol=1e-7)
    assert ((row_sums.double() - true_sums).abs() <= 2e-5 * scale + 1e-7).all()


@pytest.mark.parametrize("start, v", [(0, 500), (0, 512), (80, 517), (115, 525)])
def test_nothing_beside_the_columns_is_read_or_written(start, v):
    """Neither padding between rows, nor memory beyond the last element."""
    buffer = torch.full((3, 640), torch.nan)
    view = buffer[:, start : start + v]
    y, row, factors = problem(v)
    view.copy_(y[:3])
    row = row._replace(inv_temperature=torch.ones(3), targets=None)
    factors = Coefficients(*(factor[:3] for factor in factors))
    parts = statistics_of(kernels, view, row)
    assert not any(field.isnan().any() for field in parts)
    of_view, of_copy = (
        kernels.column_mass(logits, row, per_row_of(parts, factors)) for logits in (view, y[:3])
    )
    assert_close(of_view, of_copy, rtol=1e-5, atol=1e-6)  # unaligned rows take other blocks
    assert not gradient_of(kernels, view, row, parts, factors).isnan().any()
    assert buffer.isnan().sum() == 3 * (640 - v)


def test_strided_bias_temperature_and_targets():
    y, row, factors = problem(530, bias=True)
    strided = row._replace(
        **{
            name: torch.stack([getattr(row, name)] * 2, 1)[:, 0]
            for name in ("bias", "inv_temperature", "targets")
        }
    )
    parts, same = (statistics_of(kernels, y, either) for either in (row, strided))
    for field, other in zip(parts, same, strict=True):
        assert torch.equal(field, other)
    dy = (gradient_of(kernels, y.clone(), either, parts, factors) for either in (row, strided))
    assert torch.equal(*dy)
    (mass, sums), (other_mass, other_sums) = (
        kernels.column_mass(y, either, per_row_of(parts, factors)) for either in (row, strided)
    )
    assert torch.equal(mass, other_mass) and torch.equal(sums, other_sums)


def test_vocabulary_of_qwen_in_the_real_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "config_for", lambda capability: DEFAULT)
    y = torch.randn(2, 151_936)
    y[1] *= 0.01
    y[0, 77_777] = 30.0
    entropy, gradient = entropy_and_gradient(kernels, y, plain(2))
    wide = y.double().requires_grad_()
    truth = stats_of(wide)["entropy"]
    assert_close(entropy.double(), truth, rtol=2e-6, atol=0)
    assert truth[0] < 1e-4 and truth[1] > 0.99 * math.log(151_936)
    (true_gradient,) = torch.autograd.grad(truth.sum(), wide)
    error = (gradient.double() - true_gradient).norm(dim=1)
    # A flat row's gradient is the small difference of H and -log p.
    assert (error <= torch.tensor([1e-5, 1e-4]) * true_gradient.norm(dim=1)).all()


def test_column_masses_of_qwen_in_the_real_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "config_for", lambda capability: DEFAULT)
    y = torch.randn(1, 151_936)
    y[0, 77_777] = 15.0
    upstream = TokenStats(entropy=torch.ones(1, dtype=torch.float64))
    parts = truth_of(y, plain(1))
    factors = reference.coefficients(reference.statistics(parts, 151_936), upstream, 151_936)
    dy = reference.row_gradient(y.double(), in_fp64(plain(1)), parts.m, parts.s1.log1p(), factors)
    mass, row_sums = kernels.column_mass(y, plain(1), per_row_of(parts, factors).float())
    assert relative_error(mass, dy.abs().sum(0)) < 1e-5
    assert row_sums.abs() <= 1e-5 * dy.abs().sum()  # the exact sum is 0


def test_the_same_bits_again():
    y, row, factors = problem(1541, bias=True, softcap=30.0)
    parts, again = (statistics_of(kernels, y, row) for _ in range(2))
    for field, other in zip(parts, again, strict=True):
        assert torch.equal(field, other)
    assert torch.equal(*(gradient_of(kernels, y.clone(), row, parts, factors) for _ in range(2)))
    (mass, sums), (mass_again, sums_again) = (
        kernels.column_mass(y, row, per_row_of(parts, factors)) for _ in range(2)
    )
    assert torch.equal(mass, mass_again) and torch.equal(sums, sums_again)


@pytest.fixture
def in_use(monkeypatch):
    monkeypatch.setattr("em_kernels.kernels.kernels_for", lambda y, *_: kernels)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_entropy_loss(n, in_use):
    hidden, weight, bias, _ = draw(n, 8, 530)
    transform = {"temperature": 0.7, "softcap": 20.0, "logit_scale": -1.1}
    loss = fused_entropy_loss(hidden, weight, bias=bias, **transform)
    inputs = leaves(hidden, weight, bias, dtype=torch.float64)
    truth = entropy_of(*inputs, **transform).sum() / max(n, 1)
    assert_close(loss.double(), truth, rtol=2e-6, atol=0)
    found = torch.autograd.grad(loss, (hidden, weight, bias))
    for mine, true in zip(found, torch.autograd.grad(truth, inputs), strict=True):
        assert (mine.double() - true).norm() <= 1e-5 * true.norm()


def test_sparse_gradient(in_use):
    weight = torch.randn(600, 16, requires_grad=True)
    hidden = (1.5 * weight[:40:5]).detach().requires_grad_()
    found, exact = (
        torch.autograd.grad(
            fused_entropy_loss(
                hidden, weight, temperature=0.5, grad_tolerance=tolerance, chunk_bytes=5 * 600 * 4
            ),
            (hidden, weight),
        )
        for tolerance in (0.01, 0.0)
    )
    assert (found[1] == 0).all(1).sum() > 300
    for mine, true in zip(found, exact, strict=True):
        assert 0 < relative_error(mine, true) < 0.03


def test_token_stats(in_use):
    hidden, weight, bias, targets = draw(4, 8, 530)
    targets[2] = -100
    tau = torch.tensor([0.5, 1.0, 2.0, 1.3])
    names = (*FLOAT_STATS, "argmax")
    stats = fused_token_stats(hidden, weight, targets, bias=bias, temperature=tau, stats=names)
    inputs = leaves(hidden, weight, bias, dtype=torch.float64)
    truth = stats_of(torch.nn.functional.linear(*inputs) / tau[:, None], targets)
    assert torch.equal(stats.argmax, truth["argmax"])
    mine = true = 0
    for factor, name in enumerate(FLOAT_STATS, 1):
        assert_close(getattr(stats, name).double(), truth[name], rtol=5e-6, atol=5e-6)
        mine, true = mine + factor * getattr(stats, name), true + factor * truth[name]
    found = torch.autograd.grad(mine.sum(), (hidden, weight, bias))
    for gradient, expected in zip(found, torch.autograd.grad(true.sum(), inputs), strict=True):
        assert relative_error(gradient, expected) < 1e-5


def test_entropy_from_logits(in_use):
    logits = (torch.randn(3, 700) * 5).requires_grad_()
    entropy = entropy_from_logits(logits, temperature=0.5)
    (wide,) = leaves(logits, dtype=torch.float64)
    truth = stats_of(wide / 0.5)["entropy"]
    assert_close(entropy.double(), truth, rtol=2e-6, atol=0)
    (found,) = torch.autograd.grad(entropy.sum(), logits)
    assert relative_error(found, torch.autograd.grad(truth.sum(), wide)[0]) < 1e-5
