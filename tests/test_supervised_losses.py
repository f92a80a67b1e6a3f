"""cross_entropy, dft_loss and eaft_loss against torch's on full logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_losses import SHIFT, B, T, V, assert_same_gradients, by_docstring, inputs
from torch.testing import assert_close
from truth import assert_no_worse_than_eager, leaves, logits_of, stats_of

from benchmarks.measure import gemm_flops
from em_kernels.losses import cross_entropy, dft_loss, eaft_loss

IGNORED = torch.tensor([[1, 0, 0, 1, 0], [0] * 5, [1] * 5, [0, 0, 0, 0, 1]]).bool()
FACTORS = torch.linspace(0, 2, B * T, dtype=torch.float64).view(B, T)
CLASS_WEIGHTS = torch.linspace(0.1, 3, V, dtype=torch.float64)
SMOOTH = {"label_smoothing": 0.1, "z_loss": 1e-2}


def gate(logits, k=20):
    """Return the entropy of the k likeliest entries (..., V) alone, over its maximum."""
    with torch.no_grad():
        likeliest = logits.topk(k).values.softmax(-1)
        return torch.distributions.Categorical(probs=likeliest).entropy() / math.log(k)


def torch_losses(hidden, head, targets, ignore_index=-100, **settings):
    """Return F.cross_entropy's losses per token, weighted, and what torch divides their sum by."""
    logits, flat = logits_of(hidden, head).flatten(0, -2), targets.flatten().long()
    z_loss, named = settings.pop("z_loss", 0), {"ignore_index": ignore_index}
    losses = F.cross_entropy(logits, flat, reduction="none", **named, **settings)
    mean = F.cross_entropy(logits, flat, **named, **settings)
    valid = flat != ignore_index
    counts = settings.get("weight", torch.ones(V).double())[flat.where(valid, 0)] * valid
    assert_close(losses.sum() / counts.sum(), mean)
    losses = losses + z_loss * counts * logits.logsumexp(-1) ** 2
    return losses.view(targets.shape), counts.view(targets.shape)


@pytest.mark.parametrize("ignore_index", [-100, 0, V - 1, -1, 255])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize(
    "settings", [{}, SMOOTH, {"weight": CLASS_WEIGHTS}, {"weight": CLASS_WEIGHTS, "z_loss": 1e-2}]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch(ignore_index, dtype, settings, reduction):
    hidden, weight, targets = inputs()
    targets = targets.masked_fill(IGNORED, ignore_index).to(dtype)
    ours = leaves(hidden, weight)
    names = {k.replace("weight", "class_weights"): x for k, x in settings.items()}
    names |= {"ignore_index": ignore_index, "reduction": reduction, "chunk_bytes": 5 * V * 8}
    loss = cross_entropy(*ours, targets, **names)
    losses, counts = torch_losses(hidden, weight, targets, ignore_index, **settings)
    if reduction == "none":
        assert loss.shape == targets.shape and (loss[targets == ignore_index] == 0).all()
        assert_same_gradients(
            (FACTORS * loss).sum(), ours, (FACTORS * losses).sum(), (hidden, weight)
        )
        return
    truth = losses.sum() / (counts.sum() if reduction == "mean" else 1)
    assert_same_gradients(loss, ours, truth, (hidden, weight))


RELATIVES = {
    "": (cross_entropy, SMOOTH),
    "dft": (dft_loss, {}),
    "eaft": (eaft_loss, {"alpha": 0.5, "top_k": 6}),
}


@pytest.mark.parametrize("kind", RELATIVES)
@pytest.mark.parametrize("given", ["", "mask", "count", "tensor", "shift", "statistics", "none"])
def test_what_the_losses_share(kind, given):
    function, settings = RELATIVES[kind]
    hidden, weight, targets = inputs()
    ours = leaves(hidden, weight)
    names = {"hidden": hidden, "weight": weight, "targets": targets, "mask": torch.ones(B, T)}
    names |= {"class_weights": torch.ones(V), **settings}
    extra, share = {}, 1.0
    if given == "mask":
        extra["mask"] = names["mask"] = FACTORS
    elif given in ("count", "tensor"):
        share = B * T / 13
        extra["num_items_in_batch"] = 13 if given == "count" else torch.tensor(13)
    elif given == "shift":
        extra["shift"] = True
        names |= {"hidden": hidden[:, :-1], "targets": targets[:, 1:], "mask": torch.ones(B, T - 1)}
    elif given == "statistics":
        extra["return_stats"] = ("entropy", "argmax")
    elif given == "none":
        extra["reduction"] = "none"
    loss = function(*ours, targets, **settings, **extra)
    if given == "statistics":
        loss, stats = loss
        truth = stats_of(logits_of(hidden, weight), targets)
        assert torch.equal(stats.argmax, truth["argmax"]) and stats.logprob is None
        assert_close(stats.entropy, truth["entropy"].detach())
    if given == "mask" and kind:  # the docstrings of these show plain means
        losses = function(*ours, targets, reduction="none", **settings)
        truth = (FACTORS * losses).sum() / FACTORS.sum()
        assert_same_gradients(loss, ours, truth, ours)
        return
    truth = by_docstring(function, "loss", **names) * share
    assert_same_gradients(loss.mean(), ours, truth, (hidden, weight))


@pytest.mark.parametrize("kind", RELATIVES)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3)])
def test_nothing_to_learn(kind, shape):
    function, settings = RELATIVES[kind]
    hidden = torch.full((*shape, 4), torch.nan, requires_grad=True)
    weight = torch.ones(V, 4, requires_grad=True)
    targets = torch.full(shape, -100)
    loss, stats = function(hidden, weight, targets, return_stats=("argmax",), **settings)
    assert loss == 0 and stats.argmax.shape == shape
    assert all((x == 0).all() for x in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("kind", RELATIVES)
@pytest.mark.parametrize("case", [*SHIFT, "masked entries"])
def test_hard_inputs(kind, case):
    function, settings = RELATIVES[kind]
    head, logits_bias = {}, torch.zeros(V, dtype=torch.float64)
    if case == "masked entries" or kind == "eaft":
        settings = {}  # smoothing would be inf; a root needs more digits than the truth has
    if case == "masked entries":
        logits_bias[:9] = -torch.inf
        head["bias"] = logits_bias
    hidden, weight, targets = inputs("plain" if head else case)
    targets = targets.clamp(min=9)
    ours = leaves(hidden, weight)
    loss = function(*ours, targets, **settings, **head)
    stats = stats_of(logits_of(hidden, weight, logits_bias), targets)
    losses = -stats["logprob"]
    if kind == "dft":
        losses = losses * stats["logprob"].exp().detach()
    elif kind == "eaft":
        losses = losses * gate(logits_of(hidden, weight, logits_bias))
    elif settings:
        smooth = stats["logsumexp"] - stats["mean_logit"]
        losses = 0.9 * losses + 0.1 * smooth + 1e-2 * stats["logsumexp"] ** 2
    assert_same_gradients(loss, ours, losses.mean(), (hidden, weight))


def test_gates():
    """A model sure of another token, by 1e4 and by 30, and one that knows nothing."""
    sure, targets = torch.zeros(3, V, dtype=torch.float64), torch.tensor([1, 1, 1])
    sure[0, 0], sure[1, 0] = 1e4, 30.0
    weight = torch.eye(V, dtype=torch.float64)
    settings = {"reduction": "none"}
    plain = -sure.log_softmax(-1)[:, 1]
    found = eaft_loss(sure, weight, targets, **settings)
    assert_close(found, gate(sure) * plain)
    assert found[0] == 0 and found[2] == plain[2]
    assert_close(eaft_loss(sure, weight, targets, alpha=0, **settings), plain)
    assert_close(dft_loss(sure, weight, targets, **settings), plain * (-plain).exp())


@pytest.mark.parametrize("kind", RELATIVES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_no_worse_than_eager_in_bf16(kind, scale):
    function, settings = RELATIVES[kind]
    hidden, weight, targets = inputs()
    narrow = [x.detach().bfloat16() for x in (hidden * scale, weight)]
    losses = [function(*narrow, targets, **settings)]
    for x in (narrow, [x.double() for x in narrow]):
        names = {"hidden": x[0], "weight": x[1], "targets": targets}
        names |= {"mask": torch.ones(B, T), "class_weights": torch.ones(V), **settings}
        losses.append(by_docstring(function, "loss", **names))
    assert losses[0].dtype == torch.float32
    assert_no_worse_than_eager(*losses, floor=1e-6 * (1 + losses[2].abs().item()))


@pytest.mark.parametrize("reduction, units", [("mean", 6), ("none", 6)])
def test_work(reduction, units):
    hidden, weight, targets = inputs()

    def run():
        loss = cross_entropy(hidden, weight, targets, reduction=reduction, **SMOOTH)
        torch.autograd.grad(loss.sum(), (hidden, weight))

    assert gemm_flops(run) == pytest.approx(units * hidden.numel() * V, rel=0.05)


def ce(function=cross_entropy, **changes):
    hidden, weight, targets = inputs()
    return function(hidden, weight, changes.pop("targets", targets), **changes)


BAD = {
    "label_smoothing: not together with class_weights": lambda: ce(
        label_smoothing=0.1, class_weights=CLASS_WEIGHTS
    ),
    r"label_smoothing: 2 is not in \[0, 1\]": lambda: ce(label_smoothing=2),
    "z_loss: expected a number": lambda: ce(z_loss=torch.ones(())),
    r"class_weights: expected \(37,\), got \(3,\)": lambda: ce(class_weights=torch.ones(3)),
    "class_weights: must not require grad": lambda: ce(
        class_weights=torch.ones(V, requires_grad=True)
    ),
    "reduction: 'max' is unknown": lambda: ce(reduction="max"),
    "num_items_in_batch: is for reduction=.mean.": lambda: ce(
        num_items_in_batch=3, reduction="sum"
    ),
    "num_items_in_batch: is 0": lambda: ce(num_items_in_batch=0),
    "targets: expected integers, got torch.float32": lambda: ce(targets=torch.ones(B, T)),
    r"targets: expected exactly \(4, 5\)": lambda: ce(targets=torch.ones(B).long()),
    "targets: 1 values out of range": lambda: ce(
        targets=torch.tensor([[V] + [0] * 4] * 1 + [[0] * 5] * 3)
    ),
    "targets: 20 values out of range": lambda: ce(
        targets=torch.full((B, T), -100), ignore_index=0, class_weights=CLASS_WEIGHTS
    ),
    "ignore_index: expected an int": lambda: ce(ignore_index=1.5),
    "shift: needs hidden": lambda: cross_entropy(
        torch.ones(3), torch.ones(V, 3), torch.tensor(1), shift=True
    ),
    "alpha: -1 is not >= 0": lambda: ce(eaft_loss, alpha=-1),
    "top_k: 1 is not > 1": lambda: ce(eaft_loss, top_k=1),
    "top_k: 38 is more than the 37": lambda: ce(eaft_loss, top_k=38),
    "label_smoothing: dft_loss has no such argument": lambda: ce(dft_loss, label_smoothing=0.1),
    "stats: 'perplexity' is unknown": lambda: ce(return_stats=["perplexity"], reduction="none"),
    "return_stats: 'perplexity' is unknown": lambda: ce(return_stats=["perplexity"]),
}


@pytest.mark.parametrize("text", BAD)
def test_errors(text):
    with pytest.raises((ValueError, TypeError), match=f"^{text}"):
        BAD[text]()
