"""Row kernels, one by one, against the reference in fp64."""

import numpy as np
import pytest
import torch
from kernel_params import OLDER, ROWS, TRITON, interpreted_triton, needs_extension
from torch.testing import assert_close

from em_kernels import reference
from em_kernels.kernels import cpu, kernels_for, portable
from em_kernels.reference import Coefficients, RowTransform

ROW_COUNT = 5
TRANSFORMS = [(1.0, None), (0.25, None), (1.0, 5.0), (-2.0, 30.0)]
ALL_ROWS = [*ROWS, *OLDER, TRITON]
# Around the blocks: 1024 in the extension, 512 and 256 in Triton here. 1 is less than a vector.
SIZES = [(rows, v) for rows in (*ROWS, *OLDER) for v in (1, 2, 13, 2047, 2048, 2049, 5003)]
SIZES += [(TRITON, v) for v in (1, 13, 512, 1537)]


def problem(v, *, bias=False, logit_scale=1.0, softcap=None, seed=0):
    """Return raw logits, their transform, and the factors of a gradient, all in fp32."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(ROW_COUNT, v, generator=generator) * 4
    row = RowTransform(
        torch.randn(v, generator=generator) if bias else None,
        torch.tensor([2.0, 1.0, 0.7, 1.3, 0.1]),
        logit_scale,
        softcap,
        torch.tensor([0, v - 1, -100, v, v // 2]),  # v and -100 are no columns
    )
    return y, row, Coefficients(*torch.randn(6, ROW_COUNT, generator=generator))


def in_fp64(fields):
    kept = {
        k: x for k, x in fields._asdict().items() if torch.is_tensor(x) and x.is_floating_point()
    }
    return fields._replace(**{name: x.double() for name, x in kept.items()})


def truth_of(y, row):
    return reference.row_parts(reference.transform(y.double(), in_fp64(row)), row.targets)


def assert_parts_close(parts, truth, v):
    assert torch.equal(parts.argmax, truth.argmax)
    for name in ("m", "s1", "t", "q1", "total", "target_logit"):
        scale = truth.m.abs().max() * v**0.5 if name == "total" else 1
        assert_close(
            getattr(parts, name).double(), getattr(truth, name),
            rtol=2e-5, atol=1e-5 * float(scale), msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip


def statistics_of(kernels, y, row, with_collision_and_argmax=True):
    """Return the merged parts."""
    return reference.merge(kernels.row_statistics(y, row, with_collision_and_argmax))


def per_row_of(parts, factors):
    return torch.stack([parts.m, parts.s1.log1p(), *factors])


def gradient_of(kernels, y, row, parts, factors, dtype=torch.float32):
    """Compute dy in y's own memory, as the loops do.

    Triton gets separate memory for a narrower dtype, as its blocks run in any order.
    """
    if y.dtype == dtype:
        out = y
    elif kernels is not interpreted_triton:
        out = y.view(dtype)[:, : y.shape[1]]
    else:
        out = y.new_empty(y.shape, dtype=dtype)
    kernels.row_gradient(y, row, per_row_of(parts, factors), out)
    return out


def plain(rows, device="cpu"):
    return RowTransform(None, torch.ones(rows, device=device))


@pytest.mark.parametrize(
    "kernels, v",
    [pytest.param(*rows.values, v, id=f"{rows.id}-{v}", marks=rows.marks) for rows, v in SIZES],
)
@pytest.mark.parametrize("logit_scale, softcap", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_statistics_and_gradient(kernels, v, with_bias, logit_scale, softcap):
    y, row, factors = problem(v, bias=with_bias, logit_scale=logit_scale, softcap=softcap)
    truth = truth_of(y, row)
    before = y.clone()
    parts = statistics_of(kernels, y, row)
    assert torch.equal(y, before)  # row_gradient needs them again
    assert_parts_close(parts, truth, v)
    expected = reference.row_gradient(
        y.double(), in_fp64(row), truth.m, truth.s1.log1p(), in_fp64(factors)
    )
    # Triton's interpreter truncates to bf16 instead of rounding.
    sixteen = torch.float16 if kernels is interpreted_triton else torch.bfloat16
    for dtype, tolerance in ((sixteen, 2**-8), (torch.float32, 2e-5)):
        dy = gradient_of(kernels, y.clone(), row, parts, factors, dtype)
        error = (dy.double() - expected).norm(dim=1)
        assert (error <= tolerance * expected.norm(dim=1) + 1e-9).all()
    # The last dy is fp32, the very values that the 16 bits are rounded from, ties to even.
    narrow = gradient_of(kernels, y.clone(), row, parts, factors, sixteen)
    assert torch.equal(narrow, dy.to(sixteen))


@pytest.mark.parametrize("kernels", ALL_ROWS)
@pytest.mark.parametrize("v", [3, 13, 1537, 2049])
@pytest.mark.parametrize("logit_scale, softcap", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_column_mass(kernels, v, with_bias, logit_scale, softcap):
    y, row, factors = problem(v, bias=with_bias, logit_scale=logit_scale, softcap=softcap)
    y[:, v // 3] = -torch.inf
    parts, truth = statistics_of(kernels, y, row), truth_of(y, row)
    before = y.clone()
    mass, row_sums = kernels.column_mass(y, row, per_row_of(parts, factors))
    assert torch.equal(y, before)  # row_gradient needs them again
    dy = reference.row_gradient(
        y.double(), in_fp64(row), truth.m, truth.s1.log1p(), in_fp64(factors)
    )
    assert_close(mass.double(), dy.abs().sum(0), rtol=5e-5, atol=1e-7)
    assert mass[v // 3] == 0
    error = (row_sums.double() - dy.sum(1)).abs()  # relative to |dy|, as the sum nearly cancels
    assert (error <= 2e-5 * dy.abs().sum(1) + 1e-7).all()


@pytest.mark.parametrize("kernels", ALL_ROWS)
def test_rows_of_a_wider_buffer(kernels):
    y, row, factors = problem(77)
    buffer = torch.full((ROW_COUNT, 100), 1e4)
    view = buffer[:, :77]
    view.copy_(y)
    parts = statistics_of(kernels, view, row)
    for found, whole in zip(parts, statistics_of(kernels, y, row), strict=True):
        assert torch.equal(found, whole)
    expected = gradient_of(kernels, y, row, parts, factors)
    assert torch.equal(gradient_of(kernels, view, row, parts, factors), expected)
    assert (buffer[:, 77:] == 1e4).all()


@pytest.mark.parametrize("kernels", ROWS)
def test_threads_change_no_bit(kernels):
    y = torch.randn(64, 5000)
    factors = Coefficients(*torch.randn(6, 64))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            parts = statistics_of(kernels, y, plain(64))
            sums = kernels.column_mass(y, plain(64), per_row_of(parts, factors))
            dy = gradient_of(kernels, y.clone(), plain(64), parts, factors)
            found.append((*parts, *sums, dy))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kernels", ALL_ROWS)
def test_argmax_is_the_lowest_index_of_a_tie(kernels):
    y = torch.zeros(3, 5000)
    y[0, [7, 8, 4999]] = 2.0
    y[1, [2100, 4500]] = 2.0
    parts = statistics_of(kernels, y, plain(3))
    assert parts.argmax.tolist() == [7, 2100, 0]
    assert_close(parts.s1[2], torch.tensor(4999.0))


@pytest.mark.parametrize("kernels", ALL_ROWS)
@pytest.mark.parametrize("v", [9, 4100])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_without_a_distribution_are_nan_and_alone(kernels, v, softcap):
    y = torch.randn(5, v)
    clean = y[1:2].clone()
    y[0] = -torch.inf
    y[2, v - 1] = y[3, 0] = torch.nan
    y[4, 3] = torch.inf if softcap is None else torch.nan
    row = plain(5)._replace(softcap=softcap)
    parts = statistics_of(kernels, y, row)
    stats = reference.statistics(parts, v)
    for value in (stats.entropy, stats.logsumexp, stats.mean_logit, stats.log_collision):
        assert value.isnan().tolist() == [True, False, True, True, True]
    factors = reference.coefficients(stats, reference.TokenStats(entropy=torch.ones(5)), v)
    dy = gradient_of(kernels, y, row, parts, factors)
    assert dy[[0, 2, 3, 4]].isnan().all()
    row = plain(1)._replace(softcap=softcap)
    alone = statistics_of(kernels, clean, row)
    factors = Coefficients(*(factor[1:2] for factor in factors))
    assert torch.equal(dy[1:2], gradient_of(kernels, clean, row, alone, factors))


@pytest.mark.parametrize("kernels", ALL_ROWS)
def test_no_rows(kernels):
    y = torch.empty(0, 7)
    parts = statistics_of(kernels, y, plain(0))
    assert all(field.shape == (0,) for field in parts) and parts.argmax.dtype == torch.int64
    gradient_of(kernels, y, plain(0), parts, Coefficients(*torch.empty(6, 0)))


def test_choice_of_kernels():
    fp32 = torch.empty(1, 1)
    assert kernels_for(fp32) is (portable if cpu._C is None else cpu)
    assert kernels_for(fp32.double()) is portable
    assert kernels_for(fp32.to("meta")) is portable


@pytest.mark.parametrize("kernels", [ROWS[1], *OLDER])
def test_x87_works_afterwards(kernels):
    """MMX registers share the x87 stack: left in use, they would make numpy compute NaN."""
    for softcap in (None, 5.0):
        y, row, factors = problem(2049, bias=True, softcap=softcap)
        for values in (y, y.clone().fill_(-torch.inf)):
            parts = statistics_of(kernels, values, row)
            assert np.longdouble(2) * np.longdouble(3) == 6
        kernels.column_mass(y, row, per_row_of(parts, factors))
        assert np.longdouble(2) * np.longdouble(3) == 6
        gradient_of(kernels, y, row, parts, factors)
        assert np.longdouble(2) * np.longdouble(3) == 6


@needs_extension
@pytest.mark.parametrize("number", [-1, 3])
def test_unknown_isa(number, monkeypatch):
    monkeypatch.setattr(cpu, "isa", lambda: number)
    with pytest.raises(RuntimeError, match=f"isa must be 0 .* not {number}"):
        cpu.row_statistics(torch.zeros(2, 3), plain(2))
