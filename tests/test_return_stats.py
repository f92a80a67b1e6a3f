"""fused_token_loss(return_stats=...): what the training pass knows beside the loss."""

import pytest
import torch
from test_chunked import work
from torch.testing import assert_close
from truth import draw, logits_of, stats_of

from em_kernels import TokenStats, fused_token_loss, fused_token_stats

N, D, V = 12, 8, 50
NAMES = ("argmax", "entropy", "logprob", "logsumexp", "mean_logit", "log_collision")
MASK = torch.arange(N) % 4 - 1.0  # a quarter is 0, and a quarter negative


def plain(stats, index):
    return stats.entropy * (1 + index) - stats.logprob


def with_extras(stats, index):
    extras = {"rare": stats.logprob < -4, "twice": 2 * stats.entropy, "position": index}
    return plain(stats, index), extras


def inputs():
    hidden, weight, _, targets = draw(N, D, V, dtype=torch.float64)
    targets[3] = -100
    return hidden.detach().view(3, 4, D).requires_grad_(), weight, targets.view(3, 4)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("mask", [None, MASK.view(3, 4)], ids=["all", "mask"])
@pytest.mark.parametrize("grad", [True, False])
def test_statistics_of_all_tokens(mask, grad):
    hidden, weight, targets = inputs()
    with torch.set_grad_enabled(grad):
        _, stats, extras = fused_token_loss(
            hidden,
            weight,
            targets,
            with_extras,
            mask=mask,
            return_stats=NAMES,
            chunk_bytes=5 * V * 8,
        )
    truth = stats_of(logits_of(hidden, weight), targets)
    truth |= {"rare": truth["logprob"] < -4, "twice": 2 * truth["entropy"]}
    truth["position"] = torch.arange(N).view(3, 4)
    for name, found in ({name: getattr(stats, name) for name in NAMES} | extras).items():
        expected = truth[name].detach()
        if mask is not None:
            expected = expected.masked_fill(mask == 0, 0)
        assert not found.requires_grad
        assert_close(found, expected, rtol=1e-11, atol=1e-11)  # of the same dtype and shape


@pytest.mark.usefixtures("dweight")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_and_gradients_keep_their_bits(dtype):
    hidden, weight, _, targets = draw(N, D, V, dtype=dtype)
    settings = {"mask": MASK, "chunk_bytes": 5 * V * 4}
    calls = [(plain, None), (plain, NAMES), (with_extras, ())]
    found = []
    for loss_fn, names in calls:
        returned = fused_token_loss(
            hidden, weight, targets, loss_fn, return_stats=names, **settings
        )
        loss = returned if names is None else returned[0]
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert returned[1] == TokenStats() and returned[2].keys() == {"rare", "twice", "position"}
    assert returned[2]["twice"].dtype == torch.float32
    for others in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], others, strict=True))


def test_a_single_token():
    hidden, weight, targets = inputs()
    given = hidden[0, 0].detach(), weight, targets[0, 0]
    loss, stats, extras = fused_token_loss(*given, with_extras, return_stats=("entropy",))
    assert stats.entropy.shape == extras["twice"].shape == ()
    assert_close(loss, stats.entropy - fused_token_stats(*given).logprob)


def test_no_further_product():
    hidden, weight, targets = inputs()
    loss = lambda: fused_token_loss(hidden, weight, targets, with_extras, return_stats=NAMES)  # noqa: E731
    assert work(loss) == pytest.approx(6 * N * D * V, rel=0.01)
    with torch.no_grad():
        assert work(loss) == pytest.approx(2 * N * D * V, rel=0.01)


@pytest.mark.parametrize("mask", [torch.zeros(3, 4), torch.zeros(0, 4)], ids=["masked", "empty"])
@pytest.mark.parametrize("more", [None, (), (3,)], ids=["none", "one", "several"])
def test_without_tokens_all_is_zero(mask, more):
    hidden, weight, targets = inputs()
    hidden = hidden[: len(mask)]
    targets = None if more is None else targets[: len(mask)].new_zeros(*mask.shape, *more)
    names = ("argmax",) if more is None else ("argmax", "logprob")

    def loss_fn(stats, index):
        assert more is None or stats.logprob.shape == (0, *more)
        return stats.entropy, {"position": index, "rare": stats.entropy < 1}

    loss, stats, extras = fused_token_loss(
        hidden,
        weight,
        targets,
        loss_fn,
        mask=mask,
        return_stats=names,
    )
    assert loss == 0 and (torch.autograd.grad(loss, weight)[0] == 0).all()
    assert_close(stats.argmax, torch.zeros(mask.shape).long())
    if more is not None:
        assert_close(stats.logprob, torch.zeros(*mask.shape, *more).double())
    assert_close(extras["position"], torch.zeros(mask.shape).long())
    assert_close(extras["rare"], torch.zeros(mask.shape).bool())


def test_what_loss_fn_overwrites_is_returned_as_it_was():
    hidden, weight, targets = inputs()

    def vandal(stats, index):
        losses = 2 * stats.entropy
        extra = losses.detach().clone()
        for x in stats[:5]:
            x.detach().zero_()
        return losses, {"extra": extra}

    _, stats, extras = fused_token_loss(
        hidden, weight, targets, vandal, return_stats=("entropy",), chunk_bytes=5 * V * 8
    )
    assert_close(stats.entropy, stats_of(logits_of(hidden, weight))["entropy"].detach())
    assert_close(extras["extra"], 2 * stats.entropy)


BAD = {
    "return_stats: 'entropy' is not a sequence of names": (plain, "entropy"),
    "return_stats: 5 is not a sequence of names": (plain, 5),
    "return_stats: 'perplexity' is unknown; use some of entropy": (plain, ["perplexity"]),
    "loss_fn: returned extras, which nobody gets; pass return_stats": (with_extras, None),
    r"loss_fn: expected losses, or \(losses, a dict of extras\), got a tuple of Tensor, Tensor": (
        lambda stats, index: (stats.entropy, stats.entropy),
        (),
    ),
    r"loss_fn: expected extras\['mean'\] to be \(12,\), got \(\)": (
        lambda stats, index: (stats.entropy, {"mean": stats.entropy.mean()}),
        (),
    ),
    r"loss_fn: expected extras\['one'\] to be \(12,\), got float": (
        lambda stats, index: (stats.entropy, {"one": 1.0}),
        (),
    ),
}


@pytest.mark.parametrize("text", BAD)
def test_errors(text):
    loss_fn, names = BAD[text]
    hidden, weight, targets = inputs()
    with pytest.raises((ValueError, TypeError), match=f"^{text}"):
        fused_token_loss(hidden, weight, targets, loss_fn, return_stats=names)
    if names == ["perplexity"]:
        with pytest.raises(ValueError, match="^return_stats: logprob needs targets"):
            fused_token_loss(hidden, weight, None, plain, return_stats=["logprob"])
