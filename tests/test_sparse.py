"""The certified sparse gradient: its bound on hostile inputs, and that all else stays as it was."""

import itertools

import pytest
import torch
from conftest import needs_extension
from test_memory import changes
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from truth import entropy_of, leaves, relative_error

import em_kernels.flops  # noqa: F401  # FlopCounterMode counts the extension's GEMM
from em_kernels import (
    chunked,
    fused_entropy_loss,
    fused_token_loss,
    gradient_report,
    gradients,
    reference,
    sparse,
)
from em_kernels.problem import Needs, Problem
from em_kernels.rows import RowTerms, portable

N, V = 60, 400
TOLERANCES = [2**-9, 0.05, 0.5, 0.999]
TOKENS = torch.arange(N)


def peaked(n=N, v=V, d=24, dtype=torch.float32):
    """hidden (n, d), weight (v, d): each token near one of the first v / 8 words."""
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
    "masked words": lambda: (
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
    """d loss / d logits in fp64."""
    wide = {k: x.double() if torch.is_tensor(x) else x for k, x in arguments.items()}
    weights = wide.pop("mask", 1)
    y = y.double().requires_grad_()
    entropy = entropy_of(y, torch.eye(V).double(), **wide)
    return torch.autograd.grad((weights * entropy).sum(), y)[0]


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("chunk", [N, 17])
def test_certificate(chunk, kind, tolerance, monkeypatch):
    """Of the dy that the results imply, read off where the other operand is the identity."""
    monkeypatch.setattr(gradients, "MOST_COLUMNS", 1.0)  # where it does not pay, too
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
    # every row's sum is put back
    assert (dh.double().sum(1) - dy.sum(1)).abs().sum() <= noise

    report = gradient_report(loss)
    assert 0 <= report.active_share <= 1 and 0 <= report.dropped_share <= tolerance
    if kind in ("masses of 1 to 1e-36", "masked words"):
        assert report.active_share < 0.75
    if kind in ("masses of 1 to 1e-36", "temperatures") and tolerance > 0.01:
        assert report.dropped_share > tolerance / 4 and report.active_share < 0.8


def terms_of(y, arguments):
    """What the loops hand to the choice of columns."""
    row = reference.RowTransform(
        arguments.get("bias"),
        1 / torch.as_tensor(arguments.get("temperature", 1.0)).expand(N),
        arguments.get("logit_scale", 1.0),
        arguments.get("softcap"),
    )
    parts = portable.row_statistics(y, row)
    upstream = reference.TokenStats(entropy=arguments.get("mask", torch.ones(N)))
    factors = reference.coefficients(reference.statistics(parts, V), upstream, V)
    return RowTerms(y, row, parts.m, parts.s1.log1p(), factors)


@pytest.mark.parametrize("tolerance", TOLERANCES[:3])
@pytest.mark.parametrize("kind", [kind for kind in INPUTS if kind not in ("equal", "one-hot")])
def test_few_more_columns_than_sorting_would_keep(kind, tolerance):
    y, arguments = INPUTS[kind]()
    found = sparse.choose(terms_of(y, arguments), tolerance)
    mass = found.mass.double().sort().values
    needed = V - int((mass.cumsum(0) <= tolerance * mass.sum()).sum())
    if kind == "columns of one mass":  # all or none of each kind
        assert found.kept.sum() in (50, 400)
        return
    assert needed <= found.kept.sum() <= 1.1 * needed + 3
    assert_close(found.dropped, found.mass[~found.kept].sum())


@pytest.mark.usefixtures("rows")
def test_mass_that_is_not_finite_keeps_every_column():
    y, arguments = INPUTS["one row dominates"]()
    for bad in (torch.nan, torch.inf):
        factors = terms_of(y, arguments).factors
        factors = factors._replace(alpha=factors.alpha.clone().index_fill_(0, TOKENS[3:4], bad))
        found = sparse.choose(terms_of(y, arguments)._replace(factors=factors), 0.5)
        assert found.kept.all()


def gradients_of(hidden, weight, tolerance, *, bias=None, **arguments):
    hidden, weight = (x.detach().requires_grad_(x.requires_grad) for x in (hidden, weight))
    inputs = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    loss = fused_entropy_loss(hidden, weight, bias=bias, grad_tolerance=tolerance, **arguments)
    return loss, torch.autograd.grad(loss, inputs)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("trained", [(0, 1, 2), (0,), (1,), (2,), (0, 1)])
@pytest.mark.parametrize("chunk", [1000, 40])
def test_gradients_are_near_the_exact_ones(chunk, trained, dtype):
    inputs = [*peaked(200, 3000, dtype=dtype), torch.zeros(3000, dtype=dtype)]
    h, w, b = (x.detach().requires_grad_(i in trained) for i, x in enumerate(inputs))
    arguments = {"temperature": 0.5, "chunk_bytes": chunk * 3000 * 8, "bias": b}
    loss, found = gradients_of(h, w, 2**-9, **arguments)
    expected, exact = gradients_of(h, w, 0.0, **arguments)
    assert torch.equal(loss, expected)
    report = gradient_report(loss)
    assert report.active_share < 0.3 and 0 < report.dropped_share <= 2**-9
    for mine, true in zip(found, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == true.shape
        # two roundings to 16 bits may differ
        rounding = 0 if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
        assert 0 < relative_error(mine, true.double()) < 3 * 2**-9 + rounding


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("flat_from", [0, 1, 3])
@pytest.mark.parametrize("chunk", [32, 256])
def test_flat_distributions_get_the_dense_gradient(chunk, flat_from):
    """From the first chunk on bit by bit; later, what was sparse before is kept. Of 256 tokens 64
    are looked at first.
    """
    hidden, weight = peaked(4 * chunk, 1000)
    hidden.data[flat_from * chunk :] *= 0.01
    arguments = {"chunk_bytes": chunk * 1000 * 4, "temperature": 0.5}
    loss, found = gradients_of(hidden, weight, 2**-9, **arguments)
    _, exact = gradients_of(hidden, weight, 0.0, **arguments)
    share = gradient_report(loss).active_share
    assert share == 1 if flat_from == 0 else 0.1 < share < 1 - 0.15 * flat_from
    for mine, true in zip(found, exact, strict=True):
        assert torch.equal(mine, true) if flat_from == 0 else relative_error(mine, true) < 0.01


def test_union_of_many_chunks_words():
    """Chunks of other words each: dweight grows, and is held whole in the end."""
    v, parts = 640, 8
    weight = torch.randn(v, 64)
    own = torch.arange(v).reshape(parts, -1)
    for kept in (3, 8):  # of 8: less than half the words, and all
        hidden = 3 * weight[own[:kept].reshape(-1)] / 4
        inputs = hidden.requires_grad_(), weight.clone().requires_grad_()
        arguments = {"chunk_bytes": v // parts * v * 4, "reduction": "sum"}
        loss, found = gradients_of(*inputs, 0.01, **arguments)
        report = gradient_report(loss)
        assert report.active_share < 0.3
        for mine, true in zip(found, gradients_of(*inputs, 0.0, **arguments)[1], strict=True):
            assert relative_error(mine, true) < 0.03


@pytest.mark.usefixtures("rows")
def test_token_loss():
    hidden, weight = peaked(90, 2000)
    targets = weight.detach().mm(hidden.detach().t()).argmax(0)
    targets[::3] = torch.randint(2000, (30,))
    targets[5] = -100
    advantage, mask = torch.randn(90), torch.rand(90) * (torch.arange(90) % 4 > 0)

    def loss(tolerance):
        return fused_token_loss(
            hidden,
            weight,
            targets,
            lambda s, i: advantage[i] * s.logprob.exp() + 0.1 * s.entropy,
            mask=mask,
            temperature=torch.linspace(0.3, 0.6, 90),
            chunk_bytes=40 * 2000 * 4,
            grad_tolerance=tolerance,
        )

    sparse_loss, exact_loss = loss(0.01), loss(0.0)
    report = gradient_report(sparse_loss)
    assert report.active_share < 0.5 and 0 < report.dropped_share <= 0.01
    found, exact = (torch.autograd.grad(x, (hidden, weight)) for x in (sparse_loss, exact_loss))
    for mine, true in zip(found, exact, strict=True):
        assert 0 < relative_error(mine, true) < 0.03
    assert (found[0][mask == 0] == 0).all()


def test_statistics_with_a_gradient_in_every_word_are_dense():
    """mean_logit has one of 1 / V each."""
    hidden, weight = peaked()
    loss = fused_token_loss(
        hidden, weight, None, lambda s, i: s.logsumexp - s.mean_logit, grad_tolerance=0.001
    )
    assert gradient_report(loss).active_share == 1


def test_tied_weight():
    _, weight = peaked()
    ids = torch.randint(V, (N,))

    def gradient(tolerance):
        hidden = 1.2 * torch.nn.functional.embedding(ids, weight)
        loss = fused_entropy_loss(hidden, weight, temperature=0.5, grad_tolerance=tolerance)
        return torch.autograd.grad(loss, weight)[0]

    assert 0 < relative_error(gradient(2**-9), gradient(0.0)) < 3 * 2**-9


@pytest.mark.usefixtures("rows")
def test_same_bits_twice_with_any_number_of_threads():
    inputs = peaked(200, 5000, dtype=torch.bfloat16)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 1, 3):
            torch.set_num_threads(count)
            found.append(gradients_of(*inputs, 2**-9, temperature=0.5)[1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    for a, b in zip(found[0], found[2], strict=True):  # the GEMMs split otherwise, the choice not
        assert torch.equal(a == 0, b == 0)


def test_backward_twice():
    inputs = peaked(dtype=torch.bfloat16)
    loss = fused_entropy_loss(*inputs, temperature=0.5, grad_tolerance=0.01)
    first = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    again = torch.autograd.grad(3 * loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_token_and_no_mass():
    inputs = peaked()

    def zero(stats, index):
        return 0 * stats.entropy

    for loss in (
        fused_entropy_loss(*inputs, mask=torch.zeros(N), grad_tolerance=0.1),
        fused_token_loss(*inputs, None, zero, grad_tolerance=0.1),
    ):
        report = gradient_report(loss)
        assert report.active_share == report.dropped_share == 0
        for found, x in zip(torch.autograd.grad(loss, inputs), inputs, strict=True):
            assert found.shape == x.shape and (found == 0).all()


@pytest.mark.parametrize("trained, units", [((0, 1), 4), ((0,), 2), ((1,), 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work(dtype, trained, units):
    n, v, d = 512, 4096, 64
    inputs = peaked(n, v, d, dtype)
    inputs = [x.detach().requires_grad_(i in trained) for i, x in enumerate(inputs)]
    problem = Problem(*(x.detach() for x in inputs), temperature=0.5, grad_tolerance=2**-9)
    needs = Needs(*(x.requires_grad for x in inputs))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, found = chunked.entropy_loss(problem, True, needs)
    share = found.report[0].item()
    assert 0 < share < 0.3
    mean_word = 2 * v * d
    assert counter.get_total_flops() == pytest.approx(
        (2 + units * share) * n * v * d + mean_word, rel=0.01
    )


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_a_chunk_and_the_words_that_are_kept(dtype):
    n, v, d, budget = 256, 8192, 128, 64 * 8192 * 4
    inputs = peaked(n, v, d, dtype)
    loss = fused_entropy_loss(*inputs, temperature=0.5, grad_tolerance=2**-9)
    assert gradient_report(loss).active_share < 0.1

    def run():
        fused_entropy_loss(
            *inputs, temperature=0.5, grad_tolerance=2**-9, chunk_bytes=budget
        ).backward()

    sizes = changes(run)
    returned = sum(x.nbytes for x in inputs)
    few = v * d * 4 / 4  # a quarter of an fp32 dweight
    assert max(itertools.accumulate(sizes)) <= budget + returned + few
    assert v * d * 4 not in sizes or dtype == torch.float32


def test_compiled():
    inputs = peaked(40, 500)

    def loss(hidden, weight):
        return 2 * fused_entropy_loss(hidden, weight, temperature=0.5, grad_tolerance=0.01)

    compiled = torch.compile(loss, fullgraph=True)
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
