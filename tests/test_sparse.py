"""The certified sparse gradient: its bound on hostile inputs, its report, its refusals."""

import pytest
import torch
from torch.testing import assert_close
from truth import entropy_of, leaves

from em_kernels import fused_entropy_loss, fused_token_loss, gradient_report, reference
from em_kernels.kernels import RowTerms, portable
from em_kernels.ops import inputs, sparse

N, V = 60, 400
TOLERANCES = [2**-9, 0.05, 0.5, 0.999]
TOKENS = torch.arange(N)


def peaked(n=N, v=V, d=24, dtype=torch.float32):
    """Return hidden (n, d), weight (v, d): each token is near one of the first v / 8 entries."""
    weight = torch.randn(v, d)
    hidden = 1.2 * weight[torch.randint(v // 8, (n,))] + 0.1 * torch.randn(n, d)
    return [x.to(dtype).requires_grad_() for x in (hidden, weight)]


def random_logits():
    return 4 * torch.randn(N, V)


INPUTS = {  # raw logits (N, V), and arguments of the loss
    "equal": lambda: (torch.full((N, V), 3.0), {}),
    "nearly uniform": lambda: (random_logits() / 4000, {}),
    "one-hot": lambda: (40 * torch.eye(V)[3 * TOKENS], {}),
    "columns of one mass": lambda: (6 * torch.eye(50)[TOKENS % 50].repeat(1, 8), {}),
    "bimodal": lambda: (random_logits() / 8 + 9.0 * (torch.arange(V) % 2), {}),
    "masses of 1 to 1e-36": lambda: (random_logits() / 40 - 0.2 * torch.arange(V), {}),
    "one row dominates": lambda: (random_logits(), {"mask": torch.where(TOKENS == 7, 1e4, 0.01)}),
    "masked entries": lambda: (
        random_logits(),
        {"bias": torch.where(torch.arange(V) % 3 > 0, 0, -torch.inf)},
    ),
    "softcap": lambda: (4 * random_logits(), {"softcap": 9.0, "logit_scale": -0.7}),
    "temperatures": lambda: (
        random_logits(),
        {"temperature": torch.linspace(0.1, 3, N), "bias": torch.randn(V)},
    ),
}


def dy_of(y, arguments):
    """Return d loss / d logits in fp64."""
    wide = {k: x.double() if torch.is_tensor(x) else x for k, x in arguments.items()}
    weights = wide.pop("mask", 1)
    y = y.double().requires_grad_()
    entropy = entropy_of(y, torch.eye(V).double(), **wide)
    return torch.autograd.grad((weights * entropy).sum(), y)[0]


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("chunk, sample", [(N, 2048), (17, 64)])
def test_certificate(chunk, sample, kind, tolerance, monkeypatch):
    """The bound holds for the dy that the gradients imply; an identity operand makes it visible."""
    monkeypatch.setattr(sparse, "MAX_COLUMN_SHARE", 1.0)  # sparse even where dense is faster
    monkeypatch.setattr(sparse, "SAMPLE", sample)
    y, arguments = INPUTS[kind]()
    settings = {"grad_tolerance": tolerance, "chunk_bytes": chunk * V * 4, "reduction": "sum"}
    dy = dy_of(y, arguments)
    mass = dy.abs().sum()
    noise = 1e-5 * mass + 1e-5

    weight = y.t().clone().requires_grad_()
    loss = fused_entropy_loss(torch.eye(N), weight, **settings, **arguments)
    (dw,) = torch.autograd.grad(loss, weight)
    assert (dw.t() - dy).abs().sum() <= tolerance * mass + noise

    hidden = y.clone().requires_grad_()
    loss = fused_entropy_loss(hidden, torch.eye(V), **settings, **arguments)
    (dh,) = torch.autograd.grad(loss, hidden)
    assert (dh - dy).abs().sum() <= 2 * tolerance * mass + noise
    # Every row's sum is put back.
    assert (dh.double().sum(1) - dy.sum(1)).abs().sum() <= noise

    report = gradient_report(loss)
    assert 0 <= report.active_share <= 1 and 0 <= report.dropped_share <= tolerance
    if kind in ("masses of 1 to 1e-36", "masked entries"):
        assert report.active_share < 0.75
    if kind in ("masses of 1 to 1e-36", "temperatures") and tolerance > 0.01:
        assert report.dropped_share > tolerance / 4 and report.active_share < 0.8


@pytest.mark.parametrize("tolerance", TOLERANCES[1:])
@pytest.mark.parametrize("kind", ["bimodal", "masses of 1 to 1e-36", "softcap", "temperatures"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_certificate_in_16_bits(dtype, kind, tolerance, monkeypatch):
    """16 bits add one rounding of dy, as a GPU's GEMM wants it, and one of the result."""
    monkeypatch.setattr(inputs, "operand_dtype", lambda weight: weight.dtype)
    monkeypatch.setattr(sparse, "MAX_COLUMN_SHARE", 1.0)
    y, arguments = INPUTS[kind]()
    y = y.to(dtype)
    arguments = {k: x.to(dtype) if k == "bias" else x for k, x in arguments.items()}
    dy = dy_of(y, arguments)
    mass = dy.abs().sum()
    noise = 2 * torch.finfo(dtype).eps * mass + 1e-5
    settings = {"grad_tolerance": tolerance, "chunk_bytes": 17 * V * 4, "reduction": "sum"}

    weight = y.t().clone().requires_grad_()
    loss = fused_entropy_loss(torch.eye(N, dtype=dtype), weight, **settings, **arguments)
    (dw,) = torch.autograd.grad(loss, weight)
    assert (dw.t().double() - dy).abs().sum() <= tolerance * mass + noise

    hidden = y.clone().requires_grad_()
    loss = fused_entropy_loss(hidden, torch.eye(V, dtype=dtype), **settings, **arguments)
    (dh,) = torch.autograd.grad(loss, hidden)
    assert (dh.double() - dy).abs().sum() <= 2 * tolerance * mass + noise
    assert gradient_report(loss).dropped_share > tolerance / 4


def terms_of(y, arguments):
    """Return the terms that the loops pass to the choice of columns."""
    row = reference.RowTransform(
        arguments.get("bias"),
        1 / torch.as_tensor(arguments.get("temperature", 1.0)).expand(N),
        arguments.get("logit_scale", 1.0),
        arguments.get("softcap"),
    )
    rows = portable.finish_rows(portable.row_statistics(y, row), V, None)
    upstream = reference.TokenStats(entropy=arguments.get("mask", torch.ones(N)))
    return RowTerms(y, row, portable.gradient_factors(rows, upstream, V))


def choice_of(terms, tolerance):
    row_of = torch.full((V,), -1)
    return sparse.choose_columns(terms, tolerance, row_of, torch.float32)[0]


@pytest.mark.parametrize("tolerance", TOLERANCES[:3])
@pytest.mark.parametrize("kind", [kind for kind in INPUTS if kind not in ("equal", "one-hot")])
def test_few_more_columns_than_sorting_would_keep(kind, tolerance):
    y, arguments = INPUTS[kind]()
    terms = terms_of(y, arguments)
    found = choice_of(terms, tolerance)
    masses = portable.column_mass(*terms)[0].double()
    ordered = masses.sort().values
    needed = V - int((ordered.cumsum(0) <= tolerance * ordered.sum()).sum())
    kept = int(found.counts[0])
    if kind == "columns of one mass":  # all or none of each kind
        assert kept in (50, 400)
        return
    assert needed <= kept <= 1.1 * needed + 3
    masses[found.vocab_indices] = 0
    assert_close(found.masses[0].double(), masses.sum(), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("rows")
def test_mass_that_is_not_finite_keeps_every_column():
    y, arguments = INPUTS["one row dominates"]()
    for bad in (torch.nan, torch.inf):
        terms = terms_of(y, arguments)
        terms.per_row[2, 3] = bad  # alpha
        assert choice_of(terms, 0.5).counts.tolist() == [V, V]


def test_compiled():
    inputs = peaked(40, 500)

    def loss(hidden, weight):
        return 2 * fused_entropy_loss(hidden, weight, temperature=0.5, grad_tolerance=0.01)

    # test_ops.py compiles the same ops with inductor.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (40, 33):
        few = inputs[0][:n].detach().requires_grad_(), inputs[1]
        found, expected = (torch.autograd.grad(f(*few), few) for f in (compiled, loss))
        for mine, true in zip(found, expected, strict=True):
            assert_close(mine, true)
    flat = leaves(0 * inputs[0] + torch.randn(40, 24) / 100, inputs[1])  # dense
    found, expected = (torch.autograd.grad(f(*flat), flat) for f in (compiled, loss))
    for mine, true in zip(found, expected, strict=True):
        assert_close(mine, true)


def test_report_of_what_has_none():
    hidden, weight = peaked()
    exact = gradient_report(fused_entropy_loss(hidden, weight))
    assert exact.active_share == 1 and exact.dropped_share == 0
    with torch.no_grad():
        frozen = fused_entropy_loss(hidden, weight)
    for loss in (frozen, fused_entropy_loss(hidden, weight) / 2, hidden.sum()):
        with pytest.raises(ValueError, match="loss: carries no report"):
            gradient_report(loss)


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 2, float("nan")])
def test_tolerance_out_of_range(wrong):
    hidden, weight = peaked()
    for call in (
        lambda: fused_entropy_loss(hidden, weight, grad_tolerance=wrong),
        lambda: fused_token_loss(
            hidden, weight, None, lambda s, i: s.entropy, grad_tolerance=wrong
        ),
    ):
        with pytest.raises(ValueError, match="grad_tolerance: .* is not in"):
            call()
