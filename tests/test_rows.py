"""Row kernels, one by one, against the reference in fp64."""

import pytest
import torch
from conftest import ROWS
from torch.testing import assert_close

from em_kernels import reference
from em_kernels.reference import Coefficients
from em_kernels.rows import cpu, kernels_for, portable

ROW_COUNT = 5
TRANSFORMS = [(1.0, None), (0.25, None), (1.0, 5.0), (-2.0, 30.0)]


def problem(v, *, bias, seed=0):
    """Raw logits, bias, inv_temperature, targets, m, log_s and factors, all in fp32."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(ROW_COUNT, v, generator=generator) * 4
    bias = torch.randn(v, generator=generator) if bias else None
    inv_temperature = torch.tensor([2.0, 1.0, 0.7, 1.3, 0.1])
    targets = torch.tensor([0, v - 1, -100, v, v // 2])  # v and -100 are elsewhere
    factors = Coefficients(*torch.randn(5, ROW_COUNT, generator=generator))
    return y, bias, inv_temperature, targets, factors


def truth_of(y, bias, inv_temperature, logit_scale, softcap, targets):
    y = y.double() if bias is None else y.double() + bias.double()
    z = reference.transform(y, inv_temperature.double()[:, None], logit_scale, softcap)
    return y, reference.row_parts(z, targets)


def gradient_truth(y, parts, factors, targets, inv_temperature, logit_scale, softcap):
    return reference.row_gradient(
        y,
        parts.m,
        torch.log1p(parts.s1),
        Coefficients(*(factor.double() for factor in factors)),
        targets,
        inv_temperature.double()[:, None],
        logit_scale,
        softcap,
    )


@pytest.mark.parametrize("kernels", ROWS)
@pytest.mark.parametrize("logit_scale, softcap", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
# 2048: the extension's block; its remainders; 1 and less than a vector
@pytest.mark.parametrize("v", [1, 2, 13, 2047, 2048, 2049, 5003])
def test_statistics_and_gradient(kernels, v, with_bias, logit_scale, softcap):
    y, bias, inv_temperature, targets, factors = problem(v, bias=with_bias)
    arguments = bias, inv_temperature, logit_scale, softcap, targets
    wide_y, truth = truth_of(y, *arguments)
    before = y.clone()
    parts = kernels.row_statistics(y, *arguments)
    assert torch.equal(y, before)  # row_gradient needs them again
    assert torch.equal(parts.argmax, truth.argmax)
    for name in ("m", "s1", "t", "q1", "total", "target_logit"):
        scale = truth.m.abs().max() * v**0.5 if name == "total" else 1
        assert_close(
            getattr(parts, name).double(), getattr(truth, name),
            rtol=2e-5, atol=1e-5 * float(scale), msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip
    expected = gradient_truth(
        wide_y, truth, factors, targets, inv_temperature, logit_scale, softcap
    )
    dy = kernels.row_gradient(y, *arguments, parts.m, parts.s1.log1p(), factors)
    assert dy.data_ptr() == y.data_ptr()
    assert ((dy.double() - expected).norm(dim=1) <= 2e-5 * expected.norm(dim=1) + 1e-9).all()


@pytest.mark.parametrize("kernels", ROWS)
def test_rows_of_a_wider_buffer(kernels):
    y, _, inv_temperature, targets, factors = problem(77, bias=False)
    buffer = torch.full((ROW_COUNT, 100), 1e4)
    view = buffer[:, :77]
    view.copy_(y)
    arguments = None, inv_temperature, 1.0, None, targets
    for found, whole in zip(
        kernels.row_statistics(view, *arguments), kernels.row_statistics(y, *arguments), strict=True
    ):
        assert torch.equal(found, whole)
    _, truth = truth_of(y, *arguments)
    rest = truth.m.float(), truth.s1.log1p().float(), factors
    expected = kernels.row_gradient(y, *arguments, *rest)
    assert torch.equal(kernels.row_gradient(view, *arguments, *rest), expected)
    assert (buffer[:, 77:] == 1e4).all()


@pytest.mark.parametrize("kernels", ROWS)
def test_threads_change_no_bit(kernels):
    y = torch.randn(64, 5000)
    factors = Coefficients(*torch.randn(5, 64))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            parts = kernels.row_statistics(y, None, torch.ones(64), 1.0, None, None)
            rest = parts.m, parts.s1.log1p(), factors
            dy = kernels.row_gradient(y.clone(), None, torch.ones(64), 1.0, None, None, *rest)
            found.append((*parts, dy))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kernels", ROWS)
def test_argmax_is_the_lowest_index_of_a_tie(kernels):
    y = torch.zeros(3, 5000)
    y[0, [7, 8, 4999]] = 2.0
    y[1, [2100, 4500]] = 2.0
    parts = kernels.row_statistics(y, None, torch.ones(3), 1.0, None, None)
    assert parts.argmax.tolist() == [7, 2100, 0]
    assert_close(parts.s1[2], torch.tensor(4999.0))


@pytest.mark.parametrize("kernels", ROWS)
@pytest.mark.parametrize("v", [9, 4100])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_without_a_distribution_are_nan_and_alone(kernels, v, softcap):
    y = torch.randn(5, v)
    clean = y[1:2].clone()
    y[0] = -torch.inf
    y[2, v - 1] = y[3, 0] = torch.nan
    y[4, 3] = torch.inf if softcap is None else torch.nan
    one = torch.ones(5)
    parts = kernels.row_statistics(y, None, one, 1.0, softcap, None)
    stats = reference.statistics(parts, v)
    for value in (stats.entropy, stats.logsumexp, stats.mean_logit, stats.log_collision):
        assert value.isnan().tolist() == [True, False, True, True, True]
    factors = reference.coefficients(stats, reference.TokenStats(entropy=one), v)
    dy = kernels.row_gradient(y, None, one, 1.0, softcap, None, parts.m, parts.s1.log1p(), factors)
    assert dy[[0, 2, 3, 4]].isnan().all()
    alone = kernels.row_statistics(clean, None, one[:1], 1.0, softcap, None)
    expected = kernels.row_gradient(
        clean, None, one[:1], 1.0, softcap, None,
        alone.m, alone.s1.log1p(), Coefficients(*(f[1:2] for f in factors)),
    )  # fmt: skip
    assert torch.equal(dy[1:2], expected)


@pytest.mark.parametrize("kernels", ROWS)
def test_no_rows(kernels):
    y, empty = torch.empty(0, 7), torch.empty(0)
    parts = kernels.row_statistics(y, None, empty, 1.0, None, None)
    assert all(field.shape == (0,) for field in parts) and parts.argmax.dtype == torch.int64
    factors = Coefficients(*[empty] * 5)
    assert kernels.row_gradient(y, None, empty, 1.0, None, None, empty, empty, factors) is y


def test_choice_of_kernels():
    fp32 = torch.empty(1, 1)
    assert kernels_for(fp32) is (portable if cpu._C is None else cpu)
    assert kernels_for(fp32.double()) is portable
    assert kernels_for(fp32.to("meta")) is portable
