"""The public functions against eager in fp64: values, gradients, masks, reductions, layouts."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from truth import FLOAT_STATS, compare, draw, entropy_of, floors, leaves, logits_of, stats_of

from em_kernels import TokenStats, entropy_from_logits, fused_entropy_loss, fused_token_stats
from em_kernels.kernels import row_stride
from em_kernels.ops.inputs import HeadInputs

N, D, V = 7, 6, 29
TAU = torch.tensor([0.5, 1.0, 2.0, 0.8, 1.1, 0.3, 1.7])
TRANSFORMS = [
    {},
    {"temperature": 0.5},
    {"temperature": torch.tensor(0.5)},
    {"temperature": TAU},
    {"softcap": 5.0, "logit_scale": 0.7},
    {"temperature": TAU.to(torch.bfloat16), "softcap": 4.0, "logit_scale": -1.5},
]
MASKS = {
    "none": None,
    "bool": torch.tensor([1, 0, 1, 1, 0, 0, 1]).bool(),
    "all": torch.ones(N).bool(),
    "int": torch.tensor([1, 0, 2, 0, 3, 1, 0]),
    "uint8": torch.tensor([1, 0, 2, 0, 3, 1, 0], dtype=torch.uint8),
    "float": torch.tensor([0.5, 0.0, 1.5, 0.1, 0.0, 2.0, 1.0]),
    "bf16": torch.tensor([0.5, 0.0, 1.5, 0.25, 0.0, 2.0, 1.0], dtype=torch.bfloat16),
    "tiny": torch.tensor([0.5, 0.0, 1.5, 0.1, 0.0, 2.0, 1.0]) * 1e-8,
    "negative": torch.tensor([0.5, -1.0, 0.0, 0.1, 0.0, -2.0, 1.0]),
    "cancelling": torch.tensor([1, -1, 2, -2, 0, 0, 0]),
    "zeros": torch.zeros(N),
}


GRADIENTS = ("dhidden", "dweight", "dbias")


def assert_all_close(ours, truth, tolerance=3e-6):
    """Compare by norms: single fp32 elements that nearly cancel are less exact."""
    for mine, true in zip(ours, truth, strict=True):
        assert mine.shape == true.shape
        error, size = (mine.double() - true).norm(), true.double().norm()
        assert error <= tolerance * (1 + size), f"{error:.2e} of {size:.2e}"


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "mask, reduction",
    [
        (mask, reduction)
        for mask, reduction in itertools.product(MASKS, ["mean", "sum", "none"])
        if reduction != "mean" or mask not in ("negative", "cancelling")  # refused
    ],
)
def test_entropy_loss(mask, reduction, transform):
    mask = MASKS[mask]
    inputs = draw(N, D, V)[:3]
    weights = torch.ones(N).double() if mask is None else mask.double()
    total = weights.sum() if reduction == "mean" and weights.any() else 1
    upstream = torch.randn(N if reduction == "none" else ()).double()

    def plain(dtype):
        tensors = leaves(*inputs, dtype=dtype)
        loss = (weights / total).to(dtype) * entropy_of(*tensors, **transform)
        loss = loss if reduction == "none" else loss.sum()
        return loss, *torch.autograd.grad(loss, tensors, upstream.to(dtype))

    truth, eager = plain(torch.float64), plain(torch.float32)
    value, _, _, _ = floors(inputs, transform, weights / total)
    allowed = (value, *floors(inputs, transform, upstream * weights / total)[1:])
    with torch.no_grad():
        inputs[0][weights == 0] = torch.nan  # tokens of weight 0 may hold anything
    hidden, weight, bias = inputs
    loss = fused_entropy_loss(
        hidden, weight, bias=bias, mask=mask, reduction=reduction, **transform
    )
    assert loss.dtype == torch.float32 and loss.shape == upstream.shape
    ours = loss, *torch.autograd.grad(loss, inputs, upstream.float())
    compare(("loss", *GRADIENTS), ours, eager, truth, allowed)
    assert (ours[1][weights == 0] == 0).all()


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mask", ["none", "bool", "zeros"])
@pytest.mark.parametrize("names", [*[(name,) for name in FLOAT_STATS], FLOAT_STATS])
def test_token_stats(names, mask, transform):
    mask = MASKS[mask]
    *inputs, targets = draw(N, D, V)
    targets[3] = -100
    kept = torch.ones(N).bool() if mask is None else mask.bool()
    upstream = torch.randn(len(names), N, dtype=torch.float64)

    def plain(dtype):
        tensors = leaves(*inputs, dtype=dtype)
        stats = stats_of(logits_of(*tensors, **transform), targets)
        stats = {name: torch.where(kept, value, 0) for name, value in stats.items()}
        kind = [stats[name] for name in names]
        return stats, torch.autograd.grad(kind, tensors, [*upstream.to(dtype)])

    (truth, true), (eager, theirs) = plain(torch.float64), plain(torch.float32)
    value, *_ = floors(inputs, transform, kept.double())
    _, *allowed = floors(inputs, transform, upstream * kept)
    with torch.no_grad():
        inputs[0][~kept] = torch.nan
    hidden, weight, bias = inputs
    found = fused_token_stats(
        hidden, weight, targets, bias=bias, stats=(*names, "argmax"), mask=mask, **transform
    )
    assert torch.equal(found.argmax, truth["argmax"])
    assert {f for f, value in found._asdict().items() if value is not None} == {*names, "argmax"}
    ours = [getattr(found, name) for name in names]
    eager, truth = ([of[name] for name in names] for of in (eager, truth))
    compare(names, ours, eager, truth, [value] * len(names))
    gradients = torch.autograd.grad(ours, inputs, [*upstream.float()])
    compare(GRADIENTS, gradients, theirs, true, allowed)
    assert (gradients[0][~kept] == 0).all()


@pytest.mark.parametrize("transform", [{}, {"temperature": 0.6, "softcap": 3.0, "logit_scale": -2}])
def test_gradcheck(transform):
    hidden, weight, bias, targets = draw(4, 3, 7, dtype=torch.float64)
    targets[1] = -100
    mask = torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.float64)
    inputs = hidden, weight, bias

    def loss(h, w, b, reduction):
        return fused_entropy_loss(h, w, bias=b, mask=mask, reduction=reduction, **transform)

    def stats(h, w, b):
        return fused_token_stats(h, w, targets, bias=b, stats=FLOAT_STATS, **transform)[:5]

    assert torch.autograd.gradcheck(lambda *x: loss(*x, "mean"), inputs)
    assert torch.autograd.gradcheck(lambda *x: loss(*x, "none"), inputs)
    assert torch.autograd.gradcheck(stats, inputs)
    tau = transform.get("temperature", 1.0)
    assert torch.autograd.gradcheck(lambda x: entropy_from_logits(x, temperature=tau), hidden)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_inputs(reduction, needs):
    inputs = draw(N, D, V)[:3]

    def run(needs):
        h, w, b = (x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True))
        loss = fused_entropy_loss(h, w, bias=b, reduction=reduction).sum()
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward()
        return h.grad, w.grad, b.grad

    for mine, full, need in zip(run(needs), run((True,) * 3), needs, strict=True):
        assert torch.equal(mine, full) if need else mine is None


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("shape", [(), (5,), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_leading_dimensions(reduction, shape):
    hidden, weight, bias, targets = draw(max(1, torch.Size(shape).numel()), D, V)
    count = torch.Size(shape).numel()
    hidden = hidden.detach()[:count].reshape(*shape, D).requires_grad_()
    tau, mask = torch.rand(shape) + 0.5, torch.ones(shape)
    targets = targets[:count].reshape(shape)
    wide = leaves(hidden, weight, bias, dtype=torch.float64)
    truth = stats_of(logits_of(*wide, temperature=tau), targets)
    loss = fused_entropy_loss(
        hidden, weight, bias=bias, temperature=tau, mask=mask, reduction=reduction
    )
    entropy = truth["entropy"]
    true_loss = {"sum": entropy.sum(), "none": entropy}.get(
        reduction, entropy.sum() / max(1, count)
    )
    stats = fused_token_stats(
        hidden, weight, targets, bias=bias, temperature=tau, stats=TokenStats._fields
    )
    assert_all_close((loss, *stats[:5]), (true_loss, *(truth[name] for name in FLOAT_STATS)))
    assert torch.equal(stats.argmax, truth["argmax"])
    ours = torch.autograd.grad(loss.sum() + stats.logprob.sum(), (hidden, weight, bias))
    true = torch.autograd.grad(true_loss.sum() + truth["logprob"].sum(), wide)
    assert ours[0].shape == hidden.shape
    assert_all_close(ours, true)


LAYOUTS = {
    "column-major": lambda x: x.t().contiguous().t(),
    "padded": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "part of a longer one": lambda x: torch.cat([x, x, x])[len(x) : 2 * len(x)],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [torch.ones(N), torch.tensor([1.0, 0, 0, 1, 2, 1, 1])])
def test_strides_change_nothing(mask, layout):
    *inputs, targets = draw(N, D, V)

    def run(view):
        h, w, b = (view(x.detach()).requires_grad_() for x in inputs)
        arguments = {"bias": b, "mask": view(mask), "temperature": view(TAU)}
        loss = fused_entropy_loss(h, w, **arguments)
        stats = fused_token_stats(h, w, view(targets), **arguments)
        gradients = torch.autograd.grad(loss + stats.entropy.sum() + stats.logprob.sum(), (h, w, b))
        return loss, *stats[:2], *gradients

    assert_all_close(run(LAYOUTS[layout]), run(torch.clone))


@pytest.mark.usefixtures("rows")
def test_transposed_batch():
    hidden, weight, _, _ = draw(6, D, V)
    hidden = hidden.detach().reshape(2, 3, D).transpose(0, 1).requires_grad_()
    mask = torch.tensor([[1, 0], [1, 1], [0, 1]])
    for reduction in ("mean", "none"):
        loss = fused_entropy_loss(hidden, weight, mask=mask, reduction=reduction)
        wide = leaves(hidden, weight, dtype=torch.float64)
        truth = mask * entropy_of(*wide) / (4 if reduction == "mean" else 1)
        assert_all_close(torch.autograd.grad(loss.sum(), (hidden, weight)),
              torch.autograd.grad(truth.sum(), wide))  # fmt: skip


@pytest.mark.usefixtures("rows")
def test_head_sliced_from_a_larger_vocabulary():
    hidden, weight, bias, _ = draw(N, D, V)
    padding = torch.full((5, D), 1e4)
    large = torch.cat([weight.detach(), padding]).requires_grad_()
    for reduction in ("sum", "none"):
        whole = fused_entropy_loss(hidden, weight, bias=bias, reduction=reduction)
        sliced = fused_entropy_loss(hidden, large[:V], bias=bias, reduction=reduction)
        assert torch.equal(sliced, whole)
        sliced.sum().backward()
        assert (large.grad[V:] == 0).all()
        assert torch.equal(large.grad[:V], torch.autograd.grad(whole.sum(), weight)[0])
        large.grad = None


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("tokens_in_a_chunk", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(tokens_in_a_chunk, dtype):
    *inputs, targets = draw(N, D, V, dtype=dtype)
    mask = torch.tensor([1.0, 1, 0, 1, 2, 1, 1])

    def run(chunk_bytes):
        h, w, b = leaves(*inputs)
        arguments = {"bias": b, "mask": mask, "chunk_bytes": chunk_bytes, "temperature": TAU}
        loss = fused_entropy_loss(h, w, **arguments)
        stats = fused_token_stats(h, w, targets, stats=FLOAT_STATS, **arguments)
        upstream = torch.arange(1.0, N + 1)
        total = loss + sum((upstream * x).sum() for x in stats[:5])
        return loss, *stats[:5], *torch.autograd.grad(total, (h, w, b))

    row_bytes = row_stride(V, inputs[0].device) * HeadInputs(*inputs[:2]).logit_bytes
    chunked, whole = run(tokens_in_a_chunk * row_bytes), run(None)
    assert_all_close(chunked[:6], whole[:6])
    assert_all_close(chunked[6:], whole[6:], 3e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_again(reduction):
    """Backward twice (retain_graph) gives the same gradient; the same call gives the same bits."""
    inputs = draw(40, 16, 300)[:3]
    arguments = {"reduction": reduction, "chunk_bytes": 7 * 300 * 4}

    def loss_of(h, w, b):
        return 3 * fused_entropy_loss(h, w, bias=b, **arguments).sum()

    loss = loss_of(*inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    again = loss_of(*inputs)
    assert torch.equal(loss, again)
    for a, b, c in zip(first, second, torch.autograd.grad(again, inputs), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.usefixtures("rows")
def test_inputs_are_left_alone():
    *inputs, targets = draw(N, D, V)
    before = [x.detach().clone() for x in inputs]
    h, w, b = inputs
    (fused_entropy_loss(h, w, bias=b) + fused_token_stats(h, w, targets).logprob.sum()).backward()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("names", [["entropy"], ["entropy", "logprob"]])
def test_outputs_may_be_written_into(names):
    """A frozen head may be overwritten too, before the backward of a single statistic."""
    hidden, weight, _, targets = draw(N, D, V)
    weight = weight.detach()
    (expected,) = torch.autograd.grad(fused_token_stats(hidden, weight).entropy.sum(), hidden)
    entropy = fused_token_stats(hidden, weight, targets, stats=names).entropy
    entropy *= 2
    if names == ["entropy"]:
        weight.zero_()
    assert torch.equal(torch.autograd.grad(entropy.sum(), hidden)[0], 2 * expected)
    logits = torch.randn(N, V, requires_grad=True)
    (expected,) = torch.autograd.grad(entropy_from_logits(logits).sum(), logits)
    entropy = entropy_from_logits(logits)
    entropy *= 2
    assert torch.equal(torch.autograd.grad(entropy.sum(), logits)[0], 2 * expected)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_mask_weighs_as_the_same_numbers_in_fp32(dtype):
    hidden, weight, *_ = draw(N, D, V)
    mask = (0.9 / torch.randint(1, 300, (N,))).to(dtype)
    found, expected = (
        torch.autograd.grad(fused_entropy_loss(hidden, weight, mask=m), hidden)[0]
        for m in (mask, mask.float())
    )
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(V,), (5, V), (2, 3, V), (0, V), (5, 1)])
def test_entropy_from_logits(shape, dtype):
    logits = (3 * torch.randn(shape)).to(dtype)
    if V in shape:
        logits[..., 3] = -torch.inf
    tau = torch.rand(shape[:-1]) + 0.5
    for temperature in (0.7, tau):
        ours, wide = leaves(logits)[0], leaves(logits, dtype=torch.float64)[0]
        divisor = temperature[..., None] if temperature is tau else temperature
        truth = stats_of(wide / divisor)["entropy"]
        entropy = entropy_from_logits(ours, temperature=temperature)
        assert entropy.dtype == torch.promote_types(dtype, torch.float32)
        upstream = torch.randn_like(truth)
        (gradient,) = torch.autograd.grad(entropy, ours, upstream.to(entropy.dtype))
        (expected,) = torch.autograd.grad(truth, wide, upstream)
        assert_close(entropy.double(), truth, rtol=3e-6, atol=3e-6)
        assert gradient.dtype == dtype
        assert_close(gradient, expected.to(dtype), atol=3e-6, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_entropy_from_strided_logits(layout):
    logits, upstream = torch.randn(N, V), torch.randn(N)
    found = []
    for view in (LAYOUTS[layout], torch.clone):
        x = view(logits).requires_grad_()
        entropy = entropy_from_logits(x)
        found.append((entropy, *torch.autograd.grad(entropy, x, upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
