"""reference.py against fp64 formulas that share no code with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from truth import FLOAT_STATS, draw, entropy_of, logits_of, stats_of

from em_kernels import reference
from em_kernels.reference import TokenStats

TRANSFORMS = [
    {},
    {"temperature": 0.5},
    {"logit_scale": -0.3, "softcap": 4.0},
    {"temperature": torch.tensor([0.3, 1.0, 2.0, 0.7, 1.4, 0.9]), "softcap": 3.0},
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("masked_words", [[], [0, 4]])
def test_token_stats_and_their_gradients(transform, masked_words):
    hidden, weight, bias, _ = draw(6, 5, 11, dtype=torch.float64)
    targets = torch.tensor([1, 10, -100, 3, 5, 1])
    with torch.no_grad():
        bias[masked_words] = -torch.inf
    ours = reference.token_stats(hidden, weight, targets, bias=bias, **transform)
    truth = stats_of(logits_of(hidden, weight, bias, **transform), targets)
    assert torch.equal(ours.argmax, truth["argmax"])
    inputs, upstream = (hidden, weight, bias), torch.randn(6, dtype=torch.float64)
    for name in FLOAT_STATS:
        assert_close(getattr(ours, name), truth[name], rtol=1e-12, atol=1e-12)
        if name == "mean_logit" and masked_words:
            continue  # -inf
        assert_close(
            torch.autograd.grad(getattr(ours, name), inputs, upstream, retain_graph=True),
            torch.autograd.grad(truth[name], inputs, upstream, retain_graph=True),
            rtol=1e-11,
            atol=1e-11,
        )


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("targets", [None, torch.tensor([0, 8, 3, -100, 5, 2])])
def test_row_gradient_is_autograd_of_the_statistics(transform, targets):
    y = torch.randn(6, 9, dtype=torch.float64) * 3
    y[1, 3] = y[4, 0] = -torch.inf
    masked = y == -torch.inf
    y.requires_grad_()
    logit_scale, softcap = transform.get("logit_scale", 1.0), transform.get("softcap")
    tau = torch.as_tensor(transform.get("temperature", 1.0), dtype=y.dtype).expand(6)
    u = y.masked_fill(masked, 0) * logit_scale
    c = u if softcap is None else softcap * torch.tanh(u / softcap)
    truth = stats_of((c / tau[:, None]).masked_fill(masked, -torch.inf), targets)
    g = dict(zip(FLOAT_STATS, torch.randn(5, 6, dtype=y.dtype), strict=True))
    g["mean_logit"][masked.any(1)] = 0
    g["logprob"][3] = 0
    flowing = [name for name in FLOAT_STATS if name in truth]
    (expected,) = torch.autograd.grad(
        [truth[name] for name in flowing], y, [g[name] for name in flowing]
    )

    with torch.no_grad():
        row = reference.RowTransform(None, 1 / tau, logit_scale, softcap, targets)
        parts = reference.row_parts(reference.transform(y, row), targets)
        stats = reference.statistics(parts, y.shape[1], targets)
        factors = reference.coefficients(stats, TokenStats(**{k: g[k] for k in flowing}), 9)
        found = reference.row_gradient(y, row, parts.m, torch.log1p(parts.s1), factors)
    assert_close(found, expected.masked_fill(masked, 0), rtol=1e-11, atol=1e-12)


# Few values make ties; -inf makes entries, parts and rows without a finite logit.
LOGITS = st.sampled_from([-torch.inf, -900.0, -2.0, 0.5, 3.0, 900.0])


@settings(max_examples=80)
@given(
    z=st.lists(st.lists(LOGITS, min_size=7, max_size=7), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 7), max_size=4),
    target=st.integers(0, 6),
)
def test_merged_parts_are_the_whole_row(z, cuts, target):
    z = torch.tensor(z, dtype=torch.float64)
    targets = torch.full((len(z),), target)
    edges = [0, *sorted(cuts), 7]
    parts = []
    for start, end in zip(edges, edges[1:], strict=False):
        part = reference.row_parts(z[:, start:end], targets - start)
        parts.append(part._replace(argmax=part.argmax + start))
    stacked = reference.RowParts(*map(torch.stack, zip(*parts, strict=True)))
    merged = reference.statistics(reference.merge(stacked), 7, targets)
    whole = reference.statistics(reference.row_parts(z, targets), 7, targets)
    finite = z.isfinite().any(1)
    assert torch.equal(merged.argmax[finite], z.argmax(1)[finite])
    assert_close(merged[:5], whole[:5], rtol=1e-12, atol=1e-12, equal_nan=True)
    truth = stats_of(z[finite], targets[finite])
    for name in FLOAT_STATS:
        assert_close(getattr(merged, name)[finite], truth[name], rtol=1e-12, atol=1e-12)
        assert getattr(merged, name)[~finite].isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_entropy_loss(reduction):
    hidden, weight, bias, _ = draw(6, 5, 11, dtype=torch.float64)
    mask = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    entropy = entropy_of(hidden, weight, bias)
    truth = {
        "mean": (mask * entropy).sum() / 4.5,
        "sum": (mask * entropy).sum(),
        "none": mask * entropy,
    }[reduction]
    ours = reference.entropy_loss(hidden, weight, bias=bias, mask=mask, reduction=reduction)
    assert_close(ours, truth)
    with torch.no_grad():
        hidden[0] = torch.nan  # weight 0
    ours = reference.entropy_loss(hidden, weight, bias=bias, mask=mask, reduction=reduction)
    assert_close(ours, truth)
    (dh,) = torch.autograd.grad(ours.sum(), hidden)
    assert not dh.isnan().any() and (dh[[0, 2]] == 0).all()
