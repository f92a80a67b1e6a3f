"""The weight's gradient streamed to a callback: against fused_entropy_loss, its work and memory."""

import itertools

import pytest
import torch
from kernel_params import needs_extension
from other_sums import FAR, other_sums
from test_memory import changes
from test_sparse import peaked
from torch.utils.flop_counter import FlopCounterMode
from truth import assert_no_worse_than_eager, entropy_of, leaves, relative_error

import em_kernels.ops.flops  # noqa: F401  # FlopCounterMode counts the extension's GEMM
from em_kernels import fused_entropy_loss, gradient_report
from em_kernels.ops import chunked, gradients, inputs, sparse, weight_gradient
from em_kernels.streamed_loss import entropy_loss_into

N, V, D, CHUNK = 300, 1000, 24, 100
TOLERANCE = 2**-9
FLAT_FROM = {"peaked": 3, "flat": 0, "mixed": 1}  # index of the first flat chunk, of three


class Total:
    """A callback that adds up the values it gets, and overwrites them with NaN."""

    def __init__(self, weight):
        self.sum = torch.zeros_like(weight, dtype=inputs.accumulation_dtype(weight.dtype))
        self.entries = []

    def __call__(self, entries, values):
        assert isinstance(entries, slice) or entries.dtype == torch.int64
        indices = torch.arange(len(self.sum))[entries]
        assert values.dtype == self.sum.dtype and values.shape == (len(indices), self.sum.shape[1])
        assert len(indices.unique()) == len(indices)
        self.sum[entries] += values
        self.entries.append(entries)
        values.fill_(torch.nan)


@pytest.fixture
def slabs_of(monkeypatch):
    def set_length(count):
        monkeypatch.setattr(weight_gradient, "MIN_SLAB_ENTRIES", count)
        monkeypatch.setattr(weight_gradient, "SLAB_BYTES", 0)

    return set_length


def inputs_of(kind, dtype=torch.float32):
    """Return hidden, weight, bias; the later chunks of hidden have flat distributions."""
    hidden, weight = peaked(N, V, D, dtype)
    hidden.data[CHUNK * FLAT_FROM[kind] :] *= 0.01
    return hidden, weight, (0.1 * torch.randn(V)).to(dtype).requires_grad_()


def both(hidden, weight, bias=None, **arguments):
    """Return loss, gradients, report by the callback, the same by autograd, and the callback."""
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    loss = fused_entropy_loss(hidden, weight, bias=bias, **arguments)
    expected = (loss.detach(), *torch.autograd.grad(loss, inputs), *gradient_report(loss)[:2])
    total = Total(weight)
    loss, dh, db, report = entropy_loss_into(total, hidden, weight, bias=bias, **arguments)
    assert dh.dtype == hidden.dtype and dh.shape == hidden.shape and not dh.requires_grad
    found = [loss, dh, total.sum.to(weight.dtype)]
    if bias is not None:
        assert db.dtype == total.sum.dtype
        found.append(db.to(bias.dtype))
    return (*found, *report[:2]), expected, total


MASKS = {
    "none": None,
    "bool": torch.arange(N) % 3 > 0,
    "float": 17.0 * (torch.arange(N) % 4),
    "zero": torch.zeros(N),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", FLAT_FROM)
@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_of_one_chunk_bit_by_bit(reduction, dtype, tolerance, kind, mask, slabs_of):
    slabs_of(80)
    found, expected, total = both(
        *inputs_of(kind, dtype),
        mask=MASKS[mask],
        temperature=0.5,
        reduction=reduction,
        grad_tolerance=tolerance,
    )
    for mine, same in zip(found, expected, strict=True):
        assert torch.equal(mine, same)
    if mask == "zero":
        assert not total.entries and not any(x.any() for x in found)
    elif tolerance == 0:
        assert sorted(entries.start for entries in total.entries) == list(range(0, V, 80))


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("transform", [{}, {"softcap": 40.0, "logit_scale": 1.1}])
@pytest.mark.parametrize("kind", FLAT_FROM)
@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_of_many_chunks(dtype, tolerance, kind, transform, slabs_of):
    slabs_of(80)
    hidden, weight, bias = inputs_of(kind, dtype)
    mask = MASKS["float"]
    arguments = {"mask": mask, "temperature": torch.linspace(0.4, 0.6, N), **transform}

    def run(tolerance):
        return both(
            hidden,
            weight,
            bias,
            reduction="sum",
            grad_tolerance=tolerance,
            chunk_bytes=CHUNK * V * dtype.itemsize * (2 if dtype == torch.bfloat16 else 1),
            **arguments,
        )

    found, expected, total = run(tolerance)
    assert found[4:] == expected[4:]
    _, dense, _ = run(0.0)
    with other_sums(1):
        _, other, _ = run(0.0)
    for mine, same, one, two in zip(found[:4], expected, dense, other, strict=False):
        spread = relative_error(two, one.double())
        rounding = 2 * torch.finfo(mine.dtype).eps
        assert relative_error(mine, same.double()) <= FAR * spread + rounding
    truth, plain = (leaves(hidden, weight, bias, dtype=t) for t in (torch.float64, dtype))
    of_all = []
    for tensors in (plain, truth):
        named = {k: wide(x) if tensors is truth else x for k, x in arguments.items() if k != "mask"}
        loss = (mask * entropy_of(*tensors, **named)).sum()
        of_all.append((loss.detach(), *torch.autograd.grad(loss, tensors)))
    eager, true = of_all
    for mine, theirs, exact in zip(found, eager, true, strict=False):
        share = 1e-9 if dtype == torch.float64 else 2 * torch.finfo(mine.dtype).eps
        floor = (3 * tolerance + share) * exact.norm().item()
        assert_no_worse_than_eager(mine, theirs, exact, floor)
    kinds = {isinstance(entries, slice) for entries in total.entries}
    if tolerance == 0 or kind == "flat":
        assert kinds == {True}
    else:
        assert kinds == ({False} if kind == "peaked" else {False, True})


def wide(x):
    return x.double() if torch.is_tensor(x) else x


@pytest.mark.parametrize("operand", [torch.float32, torch.float16])
def test_two_chunks_at_a_time_as_on_a_gpu(operand, slabs_of, monkeypatch):
    """An fp16 dy is scaled: a token's weight of 1e-7 would make it 0."""
    slabs_of(80)
    monkeypatch.setattr(inputs, "operand_dtype", lambda weight: operand)
    begun = []

    class Overlapping(gradients.GradAccumulator):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.selector.buffers = 2
            begun.append(self)

    monkeypatch.setattr(chunked, "GradAccumulator", Overlapping)
    hidden, weight, _ = inputs_of("mixed", operand)
    total = Total(weight)
    arguments = {"temperature": 0.5, "chunk_bytes": CHUNK * V * 8, "grad_tolerance": TOLERANCE}
    entropy_loss_into(
        total, hidden, weight, mask=torch.full((N,), 1e-7), reduction="sum", **arguments
    )
    truth = leaves(hidden, weight, dtype=torch.float64)
    (dw,) = torch.autograd.grad(1e-7 * entropy_of(*truth, temperature=0.5).sum(), truth[1])
    assert begun and relative_error(total.sum, dw) < 3 * TOLERANCE + 2 * torch.finfo(operand).eps


def test_autograd_goes_on_below_hidden():
    """Under autocast too, with leading dimensions that no view flattens."""
    _, weight = peaked(1, V, D)
    x, layer = torch.randn(6, 5, 50, 32), torch.nn.Linear(32, D)
    mask = torch.rand(5, 6, 50)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = layer(x).transpose(0, 1)
            loss = fused_entropy_loss(hidden, weight, mask=mask)
            expected = torch.autograd.grad(loss, (layer.weight, weight))
            total = Total(weight)
            hidden = layer(x).transpose(0, 1)
            loss_into, dh, db, _ = entropy_loss_into(total, hidden, weight, mask=mask)
        layer.weight.grad = None
        hidden.backward(dh)
        assert torch.equal(loss_into, loss) and db is None
        assert torch.equal(layer.weight.grad, expected[0])
        assert torch.equal(total.sum.to(dtype).float(), expected[1])


def test_frozen_weight_and_bias():
    hidden, weight, bias = inputs_of("mixed")
    _, dh, _, _ = entropy_loss_into(Total(weight), hidden, weight, bias=bias)
    _, alone, db, _ = entropy_loss_into(None, hidden, weight, bias=bias.detach())
    assert db is None and torch.equal(alone, dh)


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
def test_no_token(tolerance):
    hidden, weight, bias = inputs_of("peaked")
    found, _, total = both(hidden[:0], weight, bias, grad_tolerance=tolerance)
    assert not total.entries and not any(x.any() for x in found[:4])


@pytest.mark.parametrize("trained, units", [(True, 4), (False, 2)])
@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work(dtype, tolerance, trained, units, slabs_of):
    slabs_of(300)
    n, v, d = 512, 4096, 64
    hidden, weight = peaked(n, v, d, dtype)
    with FlopCounterMode(display=False) as counter:
        *_, report = entropy_loss_into(
            (lambda entries, values: None) if trained else None,
            hidden,
            weight,
            temperature=0.5,
            grad_tolerance=tolerance,
        )
    share = report.active_share.item()
    assert share == 1 if tolerance == 0 else 0 < share < 0.3
    mean_weight = 2 * sparse.SAMPLE * d if tolerance else 0
    expected = (2 + units * share) * n * v * d + mean_weight
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@needs_extension
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_holds_neither_dweight_nor_its_active_words(dtype, tolerance, monkeypatch):
    """Each of 8 chunks keeps some 1 / 50 of the vocabulary, and all together eight times that."""
    v, d, n, budget, slab = 4096, 512, 128, 16 * 4096 * 4, 64 * 512 * 4
    monkeypatch.setattr(weight_gradient, "MIN_SLAB_ENTRIES", 16)
    monkeypatch.setattr(weight_gradient, "SLAB_BYTES", slab)
    monkeypatch.setattr(sparse, "SAMPLE", 16)
    weight = torch.randn(v, d)
    # Each token is near 8 entries that no other token is near.
    hidden = 0.06 * weight.view(n, v // n, d)[:, :8].sum(1)
    hidden = hidden.to(dtype).requires_grad_()
    weight = weight.to(dtype).requires_grad_()
    arguments = {"grad_tolerance": tolerance, "chunk_bytes": budget}

    def peak(call):
        sizes = changes(call)
        return max(sizes), max(itertools.accumulate(sizes))

    got = set()

    def record(entries, values):
        got.update(torch.arange(v)[entries].tolist())

    def into(on_weight_grad=lambda entries, values: None):
        return entropy_loss_into(on_weight_grad, hidden, weight, **arguments)

    share = into(record)[-1].active_share
    union = len(got) * d * 4
    assert union == v * d * 4 if tolerance == 0 else share < 0.1 and slab < union < 0.5 * v * d * 4
    largest, most = peak(into)
    dh, per_token = n * d * (4 + dtype.itemsize), 60 * n * 4 + 60 * v
    assert largest <= max(budget, dh)
    bound = budget + 2 * slab + dh + per_token
    assert most <= bound
    # Without the callback the bound is broken.
    assert peak(lambda: fused_entropy_loss(hidden, weight, **arguments))[1] > bound
