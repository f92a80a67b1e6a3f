"""Kernels on values per row or column: statistics, factors of the gradient, choice of columns."""

import pytest
import torch
from kernel_params import CUDA, ROWS, TRITON, interpreted_triton
from test_rows import in_fp64, per_row_of, problem, statistics_of, truth_of
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map_only
from truth import FLOAT_STATS, relative_error

from em_kernels import kernels as row_kernels
from em_kernels import reference
from em_kernels.kernels import RowTerms, portable
from em_kernels.reference import RowParts, TokenStats


class OnCuda:
    """Triton's kernels on a GPU, for tensors on the CPU."""

    def __getattr__(self, name):
        from em_kernels.kernels import triton

        def run(*given):
            moved = tree_map_only(torch.Tensor, torch.Tensor.cuda, given)
            found = getattr(triton, name)(*moved)
            for tensor, written in zip(tree_leaves(given), tree_leaves(moved), strict=True):
                if torch.is_tensor(tensor):
                    tensor.copy_(written)
            return tree_map_only(torch.Tensor, torch.Tensor.cpu, found)

        return run


ON_CUDA = pytest.param(OnCuda(), id=CUDA.id, marks=CUDA.marks)
ALL = pytest.mark.parametrize("kernels", [*ROWS, TRITON, ON_CUDA])


def parts_of(z, cuts, targets):
    """Return the parts of z (rows, V) between the cuts."""
    edges = [0, *cuts, z.shape[1]]
    parts = []
    for start, end in zip(edges, edges[1:], strict=False):
        part = reference.row_parts(z[:, start:end], targets - start)
        parts.append(part._replace(argmax=part.argmax + start))
    return RowParts(*map(torch.stack, zip(*parts, strict=True)))


def hard_rows():
    """Return z (200, 600), targets, and how many rows have a distribution."""
    z = torch.randn(200, 600) * 4
    z[0, 3] = 60.0  # s' underflows
    z[1] = -2.5  # flat
    z[2, [5, 300, 599]] = z[2].max() + 3  # ties in several parts
    z[3, :200] = -torch.inf  # a part without finite logits
    z[4, 7] = z[4].max() + 16.0  # log s of a few ulp
    z[5] -= 1e4
    z[6] = torch.linspace(0, -900, 600)
    z[197, 599] = torch.nan
    z[198] = -torch.inf
    z[199, 0] = torch.inf
    targets = torch.arange(200) * 3
    targets[8::9] = -100
    return z, targets, 197


@ALL
@pytest.mark.parametrize("cuts", [(), (200,), (1, 130, 400)])
def test_statistics(kernels, cuts):
    z, targets, sound = hard_rows()
    stats, m, log_s = kernels.finish_rows(parts_of(z, cuts, targets), 600, targets)
    truth = reference.row_parts(z.double(), targets)
    expected = reference.statistics(truth, 600, targets)
    assert torch.equal(m[:sound], z.amax(1)[:sound])
    assert torch.equal(stats.argmax[:sound], z.argmax(1)[:sound])
    assert stats.argmax[sound:].tolist() == [0, 0, 0]
    assert_close(log_s[:sound].double(), truth.s1.log1p()[:sound], rtol=2e-6, atol=1e-37)
    for name in FLOAT_STATS:
        found, true = getattr(stats, name), getattr(expected, name)
        assert_close(found[:sound].double(), true[:sound], rtol=2e-6, atol=2e-6)
        ignored = targets[sound:] == -100 if name == "logprob" else torch.zeros(3).bool()
        assert torch.equal(found[sound:].isnan(), ~ignored)
    # A confident row's entropy is far below the tolerance of the others.
    for row in (0, 4):
        assert_close(stats.entropy[row].double(), expected.entropy[row], rtol=1e-4, atol=0)


@ALL
def test_statistics_without_targets_collision_and_argmax(kernels):
    z, targets, sound = hard_rows()
    parts = parts_of(z, (200,), targets)._replace(q1=None, total=None, argmax=None)
    stats = kernels.finish_rows(parts, 600, None).stats
    assert stats[1] is None and stats[3:6] == (None, None, None)
    expected = reference.statistics(reference.row_parts(z.double()), 600)
    for name in ("entropy", "logsumexp"):
        found, true = getattr(stats, name)[:sound], getattr(expected, name)[:sound]
        assert_close(found.double(), true, rtol=2e-6, atol=2e-6)


@ALL
@pytest.mark.parametrize("names", [FLOAT_STATS, ("entropy",), ("logprob", "log_collision"), ()])
def test_factors(kernels, names):
    z, targets, sound = hard_rows()
    z, targets = z[:sound], targets[:sound]
    rows = kernels.finish_rows(parts_of(z, (200,), targets), 600, targets)
    upstream = TokenStats(**{name: torch.randn(sound) for name in names})
    if "logprob" in names:
        upstream.logprob[targets == -100] = 0
    if "log_collision" in names:
        upstream.log_collision[0] = 0
    truth = reference.row_parts(z.double(), targets)
    expected = reference.coefficients(
        reference.statistics(truth, 600, targets), in_fp64(upstream), 600
    )
    m, log_s, *found = kernels.gradient_factors(rows, upstream, 600)
    assert torch.equal(m, rows.m) and torch.equal(log_s, rows.log_s)
    for mine, true in zip(found, expected, strict=True):
        assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)
    # gamma (1 - p) of a confident target keeps its digits.
    if "logprob" in names:
        confident = TokenStats(*(None if x is None else x.clone() for x in rows.stats))
        confident.logprob.copy_(-torch.logspace(-12, 2, sound))
        at_target = kernels.gradient_factors(rows._replace(stats=confident), upstream, 600)[7]
        true = -upstream.logprob.double() * confident.logprob.double().expm1()
        assert_close(at_target.double(), true, rtol=2e-6, atol=0)


@ALL
def test_no_rows(kernels):
    parts = RowParts(*torch.empty(6, 2, 0), torch.empty(2, 0, dtype=torch.int64))
    rows = kernels.finish_rows(parts, 7, None)
    assert rows.stats.entropy.shape == rows.m.shape == (0,)
    assert kernels.gradient_factors(rows, TokenStats(rows.m), 7).shape == (8, 0)


MASSES = {
    "spread": lambda v: torch.rand(v) ** 8,
    "equal": lambda v: torch.ones(v),
    "one": lambda v: (torch.arange(v) == v // 2).float(),
    "none": lambda v: torch.zeros(v),
    "masked": lambda v: torch.rand(v) ** 8 * (torch.arange(v) % 3 > 0),
    "NaN": lambda v: torch.where(torch.arange(v) == v // 3, torch.nan, torch.rand(v)),
    "infinite": lambda v: torch.where(torch.arange(v) == v // 3, torch.inf, torch.rand(v)),
}


@ALL
@pytest.mark.parametrize("v", [1, 100, 2 * 8192 + 77])  # 8192: columns of a Triton program
@pytest.mark.parametrize("kind", MASSES)
def test_choice_of_columns(kernels, kind, v):
    mass, tolerance, old = MASSES[kind](v), 0.01, v // 5
    row_of = torch.full((v,), -1)
    row_of[torch.randperm(v)[:old]] = torch.arange(old)
    found = kernels.choose_columns(mass, row_of, tolerance, 64, torch.float32)
    kept, new = found.counts.tolist()
    chosen, rows = found.vocab_indices[:kept], found.dweight_rows[:kept]
    is_kept = torch.zeros(v).bool().index_fill_(0, chosen, True)
    total, left_out = mass.double().sum(), mass[~is_kept].double().sum()
    assert (chosen.diff() > 0).all() and (mass[chosen] != 0).all()
    assert left_out <= tolerance * total or not total.isfinite()
    if not total.isfinite() or kind == "equal" and tolerance * v < 1:
        assert is_kept.all()
    ordered = mass.double().sort().values
    needed = v - int((ordered.cumsum(0) <= tolerance * total).sum())
    assert kept <= 1.03 * needed + 3 or not total.isfinite()
    # Columns that were chosen before keep their rows, others get the next ones.
    before = row_of[chosen]
    assert new == (before < 0).sum()
    assert torch.equal(rows[before >= 0], before[before >= 0])
    assert rows[before < 0].tolist() == list(range(old, old + new))
    assert torch.equal(found.row_of[chosen], rows)
    assert torch.equal(found.row_of[~is_kept], row_of[~is_kept])
    if total.isfinite():
        assert_close(found.masses.double(), torch.stack([left_out, total]), rtol=1e-5, atol=1e-12)
    # The heaviest of every v / 64 columns that were left out, each with its share.
    size = min(64, v)
    assert found.sample.shape == (size,) and found.shares.shape == (1, size)
    weights = torch.where(is_kept, 0, mass)
    strided = torch.nn.functional.pad(weights, (0, -v % size)).view(-1, size).amax(0)
    if left_out > 0:
        assert torch.equal(weights[found.sample[strided > 0]], strided[strided > 0])
        assert_close(found.shares[0], strided / strided.sum())
    else:
        assert (found.shares == 0).all()


@ALL
@pytest.mark.parametrize("count", [0, 1, 5, 700])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_gradient_of_columns(kernels, count, softcap, bias, monkeypatch):
    monkeypatch.setattr(row_kernels, "kernels_for", lambda y, *_: kernels)
    v = 1300
    y, row, factors = problem(v, bias=bias, softcap=softcap)
    y[:, 40] = -torch.inf
    parts, truth = statistics_of(kernels, y, row), truth_of(y, row)
    indices = torch.randperm(v)[:count]
    if count:
        indices[0] = v // 2  # a target
    indices = indices.unique()
    expected = reference.row_gradient(
        y.double(), in_fp64(row), truth.m, truth.s1.log1p(), in_fp64(factors)
    )[:, indices]
    # Triton's interpreter truncates to bf16 instead of rounding.
    sixteen = torch.float16 if kernels is interpreted_triton else torch.bfloat16
    before, given = y.clone(), torch.randn(len(y))
    for dtype, tolerance in ((sixteen, 2**-8), (torch.float32, 2e-5)):
        residual = given.clone()
        per_row = per_row_of(parts, factors)
        terms = RowTerms(y, row, per_row)
        dy = row_kernels.gradient_of_columns(terms, indices, dtype, residual)
        assert dy.dtype == dtype and dy.shape == expected.shape
        if count:
            assert relative_error(dy, expected) < tolerance
        error = (residual.double() - (given.double() - expected.sum(1))).abs()
        assert (error <= 2e-5 * expected.abs().sum(1) + 1e-6).all()
    assert torch.equal(y, before)


def test_portable_takes_any_floating_dtype():
    mass = torch.rand(100, dtype=torch.float64)
    found = portable.choose_columns(mass, torch.full((100,), -1), 0.1, 8, torch.bfloat16)
    assert found.masses.dtype == torch.float64 and found.shares.dtype == torch.bfloat16
