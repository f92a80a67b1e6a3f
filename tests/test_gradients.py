"""Gradients with a tolerance, chunk by chunk, against the exact ones; their work and memory."""

import itertools

import pytest
import torch
from kernel_params import needs_extension, on_cpu_only
from test_memory import changes
from test_sparse import N, V, peaked
from torch.utils.flop_counter import FlopCounterMode
from truth import relative_error

import em_kernels.ops.flops  # noqa: F401  # FlopCounterMode counts the extension's GEMM
from em_kernels import fused_entropy_loss, fused_token_loss, gradient_report
from em_kernels.ops import chunked, gradients, inputs, sparse, weight_gradient
from em_kernels.ops.inputs import GradMask, HeadInputs


def gradients_of(hidden, weight, tolerance, *, bias=None, **arguments):
    hidden, weight = (x.detach().requires_grad_(x.requires_grad) for x in (hidden, weight))
    inputs = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    loss = fused_entropy_loss(hidden, weight, bias=bias, grad_tolerance=tolerance, **arguments)
    return loss, torch.autograd.grad(loss, inputs)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("trained", [(0, 1, 2), (0,), (1,), (2,), (0, 1)])
@pytest.mark.parametrize("chunk", [1000, 40])
@on_cpu_only
def test_gradients_are_near_the_exact_ones(chunk, trained, dtype):
    inputs = [*peaked(200, 3000, dtype=dtype), torch.zeros(3000, dtype=dtype)]
    h, w, b = (x.detach().requires_grad_(i in trained) for i, x in enumerate(inputs))
    arguments = {"temperature": 0.5, "chunk_bytes": chunk * 3000 * 8, "bias": b}
    loss, found = gradients_of(h, w, 2**-9, **arguments)
    expected, exact = gradients_of(h, w, 0.0, **arguments)
    assert torch.equal(loss, expected)
    report = gradient_report(loss)
    if trained == (2,):  # there is no GEMM to save
        assert report.active_share == 1 and torch.equal(found[0], exact[0])
        return
    assert report.active_share < 0.3 and 0 < report.dropped_share <= 2**-9
    for mine, true in zip(found, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == true.shape
        # Two roundings to 16 bits may differ.
        rounding = 0 if dtype.itemsize > 2 else 2 * torch.finfo(dtype).eps
        assert 0 < relative_error(mine, true.double()) < 3 * 2**-9 + rounding


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("flat_from", [0, 1, 3])
@pytest.mark.parametrize("chunk", [32, 256])
@on_cpu_only
def test_flat_distributions_get_the_dense_gradient(chunk, flat_from):
    """All chunks flat: the same bits as the exact gradient. Flat later: earlier chunks stay sparse.

    Chunks of 256 tokens are probed on 64 of them first.
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


@pytest.mark.parametrize("groups, is_whole", [(3, False), (8, True)])
def test_union_of_many_chunks_words(groups, is_whole):
    """Each of 8 chunks keeps some 80 of 640 entries: dweight ends with few rows, or whole."""
    weight = torch.randn(640, 64)
    nearest = torch.arange(640) % (80 * groups)
    inputs = (0.75 * weight[nearest]).requires_grad_(), weight.requires_grad_()
    arguments = {"chunk_bytes": 80 * 640 * 4, "reduction": "sum"}
    # torch 2.11 needs the loss held while its saved tensors are read.
    loss = fused_entropy_loss(*inputs, grad_tolerance=0.01, **arguments)
    values = loss.grad_fn.saved_tensors[1]
    assert len(values) == 640 if is_whole else 160 <= len(values) <= 320
    assert values.untyped_storage().nbytes() <= (1.0 if is_whole else 0.5) * 640 * 64 * 4
    loss, found = gradients_of(*inputs, 0.01, **arguments)
    assert gradient_report(loss).active_share < 0.3
    for mine, true in zip(found, gradients_of(*inputs, 0.0, **arguments)[1], strict=True):
        assert relative_error(mine, true) < 0.03


@pytest.mark.parametrize("flat", [0, 4, 9])
def test_one_flat_chunk_costs_the_others_little(flat):
    hidden, weight = peaked(1000, 1000)
    hidden.data[100 * flat : 100 * flat + 100] *= 0.01
    loss, found = gradients_of(
        hidden, weight, 2**-9, temperature=0.5, chunk_bytes=100 * 1000 * 4, reduction="sum"
    )
    assert gradient_report(loss).active_share < 0.5
    _, exact = gradients_of(hidden, weight, 0.0, temperature=0.5, reduction="sum")
    for mine, true in zip(found, exact, strict=True):
        assert relative_error(mine, true) < 0.01


@pytest.mark.parametrize("flat_from", [0, 3, 10])
@pytest.mark.parametrize("operand", [torch.float32, torch.float16])
def test_two_chunks_at_a_time_as_on_a_gpu(operand, flat_from, monkeypatch):
    """Two buffers give what one gives, also in slabs of few entries; an fp16 dy is scaled."""
    monkeypatch.setattr(weight_gradient, "MIN_SLAB_ENTRIES", 40)
    monkeypatch.setattr(weight_gradient, "SLAB_BYTES", 0)
    monkeypatch.setattr(inputs, "operand_dtype", lambda weight: operand)
    hidden, weight = (x.detach().to(operand).requires_grad_() for x in peaked(1000, 1000))
    hidden.data[100 * flat_from :] *= 0.01
    mask = torch.linspace(0.1, 5, 1000) * (torch.arange(1000) % 7 > 0)
    arguments = {
        "temperature": 0.5,
        "mask": mask,
        "chunk_bytes": 100 * 1000 * 8,
        "reduction": "sum",
    }
    _, one = gradients_of(hidden, weight, 2**-9, **arguments | {"chunk_bytes": 100 * 1000 * 4})
    begun = []

    class Overlapping(gradients.GradAccumulator):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.selector.buffers = 2

        def begin(self, *arguments):
            begun.append(self.selector.buffers)
            return super().begin(*arguments)

    monkeypatch.setattr(chunked, "GradAccumulator", Overlapping)
    _, two = gradients_of(hidden, weight, 2**-9, **arguments)
    assert 2 in begun and (1 in begun) == (flat_from < 10)
    rounding = 2 * torch.finfo(operand).eps
    for mine, same in zip(two, one, strict=True):
        assert relative_error(mine, same.double()) < 3 * 2**-9 + rounding


@pytest.mark.parametrize("n", [100, 101, 199, 200, 201, 299])
def test_no_buffer_is_taken_from_a_chunk_that_waits(n, monkeypatch):
    """One to three chunks of any length, two of them in flight."""
    hidden, weight = peaked(n, 1000)
    arguments = {"temperature": 0.5, "chunk_bytes": 100 * 1000 * 8, "reduction": "sum"}
    _, exact = gradients_of(hidden, weight, 0.0, **arguments)

    class Overlapping(gradients.GradAccumulator):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.selector.buffers = 2

    monkeypatch.setattr(chunked, "GradAccumulator", Overlapping)
    _, found = gradients_of(hidden, weight, 2**-9, **arguments)
    for mine, true in zip(found, exact, strict=True):
        assert relative_error(mine, true) < 3 * 2**-9


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("silent", [slice(0, 0), slice(0, 40), slice(40, 90), slice(0, 90)])
def test_token_loss_whose_chunks_have_no_mass(silent):
    """Chunks have no gradient where advantages are 0, as in a group of equal rewards."""
    hidden, weight = peaked(90, 2000)
    advantage = torch.ones(90)
    advantage[silent] = 0
    found, exact = (
        torch.autograd.grad(
            fused_token_loss(
                hidden,
                weight,
                torch.arange(90),
                lambda s, i: advantage[i] * s.logprob,
                temperature=0.5,
                chunk_bytes=40 * 2000 * 4,
                grad_tolerance=tolerance,
            ),
            (hidden, weight),
        )
        for tolerance in (0.01, 0.0)
    )
    for mine, true in zip(found, exact, strict=True):
        assert (mine - true).norm() <= 0.03 * true.norm()


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
    """mean_logit has a gradient of 1 / V at each entry."""
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
@on_cpu_only
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
    # More threads split the GEMMs otherwise, but do not change the choice of columns.
    for a, b in zip(found[0], found[2], strict=True):
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
    head = HeadInputs(*(x.detach() for x in inputs), temperature=0.5, grad_tolerance=2**-9)
    needs = GradMask(*(x.requires_grad for x in inputs))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, found = chunked.sum_entropy(head, True, needs)
    share = found.report[0].item()
    assert 0 < share < 0.3
    mean_weight = 2 * sparse.SAMPLE * d
    assert counter.get_total_flops() == pytest.approx(
        (2 + units * share) * n * v * d + mean_weight, rel=0.01
    )


@needs_extension
@pytest.mark.parametrize("trained", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_a_chunk_and_the_words_that_are_kept(dtype, trained):
    n, v, d, budget = 512, 8192, 128, 64 * 8192 * 4
    hidden, weight = peaked(n, v, d, dtype)
    inputs = [x.detach().requires_grad_(i in trained) for i, x in enumerate((hidden, weight))]
    arguments = {"temperature": 0.5, "grad_tolerance": 2**-9, "chunk_bytes": budget}
    loss = fused_entropy_loss(*inputs, **arguments)
    share = gradient_report(loss).active_share.item()
    assert share < 0.1
    sizes = changes(lambda: fused_entropy_loss(*inputs, **arguments).backward())
    returned = sum(x.nbytes for x in inputs if x.requires_grad)
    union = 0.25 * v * d * 4 if 1 in trained else 0
    slab, dh, per_token = budget / 4, n * d * 4, 60 * n * 4 + 60 * v
    assert max(itertools.accumulate(sizes)) <= budget + returned + union + slab + dh + per_token
    if dtype == torch.bfloat16 or 1 not in trained:
        assert v * d * 4 not in sizes


@pytest.mark.parametrize("mask", [None, torch.arange(500) % 3 > 0])
@pytest.mark.parametrize("trained", [(0, 1, 2), (1,), (0,)])
def test_dy_of_several_chunks_is_multiplied_at_once_as_on_a_gpu(trained, mask, monkeypatch):
    """As on a GPU, a 16-bit dy has its own buffer; the budget holds that of several chunks."""
    leaves = [x.detach() for x in peaked(500, 1000, dtype=torch.bfloat16)]
    leaves.append(torch.zeros(1000, dtype=torch.bfloat16))
    hidden, weight, bias = (x.requires_grad_(i in trained) for i, x in enumerate(leaves))
    arguments = {"bias": bias, "mask": mask, "temperature": 0.5, "chunk_bytes": 60 * 1000 * 12}
    monkeypatch.setattr(inputs, "operand_dtype", lambda weight: torch.bfloat16)
    _, expected = gradients_of(hidden, weight, 0.0, **arguments | {"chunk_bytes": None})
    rows, products, add_all = [], [], weight_gradient.SparseWeightGrad.add_all

    def counted(total, dy, *arguments):
        products.append(len(dy))
        add_all(total, dy, *arguments)

    class Counting(gradients.GradAccumulator):
        def begin(self, tokens, hidden, *arguments):
            rows.append(len(hidden))
            return super().begin(tokens, hidden, *arguments)

    monkeypatch.setattr(inputs.HeadInputs, "dy_has_own_buffer", True)
    monkeypatch.setattr(chunked, "TILE", 50)
    monkeypatch.setattr(weight_gradient.SparseWeightGrad, "add_all", counted)
    monkeypatch.setattr(chunked, "GradAccumulator", Counting)
    _, found = gradients_of(hidden, weight, 0.0, **arguments)
    if trained == (0,):  # frozen weight: larger chunks instead of batches
        assert max(rows) > 60 and not products
    elif mask is None:
        assert rows == [56] * 8 + [52] and products == [224, 224, 52]
    else:
        assert rows == [56] * 5 + [53] and products == [224, 109]
    for mine, same in zip(found, expected, strict=True):
        assert relative_error(mine, same.double()) < 2 * torch.finfo(torch.bfloat16).eps
    monkeypatch.setattr(chunked, "TILE", 60)  # batches would leave chunks too few rows
    rows.clear()
    gradients_of(hidden, weight, 0.0, **arguments)
    assert max(rows) > 60


def test_a_gpu_s_default_batches_dy_only_within_its_budget(monkeypatch):
    """The default may rise to a tile of rows for the logits, but not for the dy beside them."""
    asked = []

    def chunk_length(total, bytes_each, *others, at_least_a_tile):
        asked.append((bytes_each, at_least_a_tile))
        return max(1, total // (8 if at_least_a_tile else 16))

    monkeypatch.setattr(inputs.HeadInputs, "dy_has_own_buffer", True)
    monkeypatch.setattr(inputs, "operand_dtype", lambda weight: torch.bfloat16)
    monkeypatch.setattr(chunked, "chunk_length", chunk_length)
    hidden, weight = (torch.randn(n, 8).bfloat16() for n in (400, 300))
    head = inputs.HeadInputs(hidden, weight)
    chunked.sum_entropy(head, True, inputs.GradMask(hidden=True, weight=True))
    assert [rises for _, rises in asked] == [True, False] and asked[0][0] < asked[1][0]
