"""The Triton rows and the loops on a GPU, against fp64 on the same device."""

import math

import pytest
import torch
from test_rows import (
    TRANSFORMS,
    assert_parts_close,
    gradient_of,
    in_fp64,
    per_row_of,
    plain,
    problem,
    statistics_of,
    truth_of,
)
from test_triton_rows import entropy_and_gradient
from torch.testing import assert_close
from truth import (
    FLOAT_STATS,
    assert_no_worse_than_eager,
    draw,
    entropy_of,
    leaves,
    logits_of,
    relative_error,
    stats_of,
)

from em_kernels import entropy_from_logits, fused_entropy_loss, fused_token_stats, reference
from em_kernels.cli import main
from em_kernels.kernels import gradient_buffer, kernels_for, portable, row_stride, self_test
from em_kernels.kernels import triton as kernels
from em_kernels.reference import Coefficients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NARROW = [torch.bfloat16, torch.float16]


def on_gpu(fields):
    return fields._replace(
        **{name: x.cuda() for name, x in fields._asdict().items() if torch.is_tensor(x)}
    )


def in_padded_rows(y):
    """Lay out logits as the loops do: rows begin at multiples of 16, with NaN between."""
    shape = len(y), row_stride(y.shape[1], y.device)
    buffer = torch.full(shape, torch.nan, dtype=y.dtype, device=y.device)
    view = buffer[:, : y.shape[1]]
    view.copy_(y)
    return view


def test_choice_of_kernels():
    y = torch.empty(1, 1, device="cuda")
    assert kernels_for(y) is kernels and kernels_for(y.bfloat16()) is kernels
    assert kernels_for(y.double()) is portable and kernels_for(y, torch.bfloat16) is kernels
    assert self_test.failure(y.device) == ""
    assert main(["info"]) == 0


@pytest.mark.parametrize("out_dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("y_dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("results", [self_test.row_results, self_test.divergence_results])
def test_kernels_pass_their_self_test(results, y_dtype, out_dtype):
    assert self_test.wrong_result(kernels, torch.device("cuda"), y_dtype, out_dtype, results) == ""


@pytest.mark.parametrize("layout", [in_padded_rows, torch.clone])
@pytest.mark.parametrize("bias", [None, torch.float32, *NARROW])
@pytest.mark.parametrize("logit_scale, softcap", TRANSFORMS)
@pytest.mark.parametrize("v", [1, 2, 13, 1024, 2048, 4099, 50_257])
def test_statistics_and_gradient(v, logit_scale, softcap, bias, layout):
    given = problem(v, bias=bias is not None, logit_scale=logit_scale, softcap=softcap)
    y, row, factors = given[0].cuda(), *map(on_gpu, given[1:])
    if bias is not None:
        row = row._replace(bias=row.bias.to(bias))
    truth = truth_of(y, row)
    y = layout(y)
    before = y.clone()
    plainer = statistics_of(kernels, y, row, with_collision_and_argmax=False)
    parts = statistics_of(kernels, y, row)
    assert torch.equal(y, before)
    assert plainer.argmax is None
    assert_close(plainer.s1, parts.s1)
    assert_parts_close(parts, truth, v)
    expected = reference.row_gradient(
        y.double(), in_fp64(row), truth.m, truth.s1.log1p(), in_fp64(factors)
    )
    dy = gradient_of(kernels, layout(before), row, parts, factors)
    error = (dy.double() - expected).norm(dim=1)
    assert (error <= 2e-5 * expected.norm(dim=1) + 1e-9).all()
    for dtype in NARROW:
        out = gradient_buffer(y, dtype)
        kernels.row_gradient(y, row, per_row_of(parts, factors), out)
        assert torch.equal(out, dy.to(dtype))
    assert torch.equal(y, before)


@pytest.mark.parametrize("layout", [in_padded_rows, torch.clone])
@pytest.mark.parametrize("bias", [None, torch.float32, *NARROW])
@pytest.mark.parametrize("logit_scale, softcap", TRANSFORMS)
@pytest.mark.parametrize("n", [5, 300])  # 300 rows are split, 5 are not
@pytest.mark.parametrize("v", [1, 13, 512, 4099, 50_257])
def test_column_mass(v, n, logit_scale, softcap, bias, layout):
    given = problem(v, bias=bias is not None, logit_scale=logit_scale, softcap=softcap)
    again = torch.arange(n) % len(given[0])
    y = given[0][again].cuda() + torch.randn(n, v, device="cuda")
    row = given[1]._replace(
        inv_temperature=given[1].inv_temperature[again], targets=given[1].targets[again]
    )
    row, factors = map(on_gpu, (row, Coefficients(*(factor[again] for factor in given[2]))))
    if bias is not None:
        row = row._replace(bias=row.bias.to(bias))
    if v > 1:
        y[:, v // 3] = -torch.inf
    y = layout(y)
    before = y.clone()
    parts, truth = statistics_of(kernels, y, row), truth_of(y, row)
    for part in (row, row._replace(targets=None)):
        per_row = per_row_of(parts, factors)
        (mass, row_sums), repeated = (kernels.column_mass(y, part, per_row) for _ in range(2))
        assert torch.equal(mass, repeated[0]) and torch.equal(row_sums, repeated[1])
        dy = reference.row_gradient(
            y.double(), in_fp64(part), truth.m, truth.s1.log1p(), in_fp64(factors)
        )
        assert_close(mass.double(), dy.abs().sum(0), rtol=1e-4, atol=1e-6)
        assert v == 1 or mass[v // 3] == 0
        error = (row_sums.double() - dy.sum(1)).abs()
        assert (error <= 5e-5 * dy.abs().sum(1) + 1e-6).all()
    assert torch.equal(y, before)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("n", [1, 64, 2048])
def test_column_mass_of_a_vocabulary(n, dtype):
    y = in_padded_rows((torch.randn(n, 151_936, device="cuda") * 4).to(dtype))
    row = plain(n, device="cuda")
    parts = statistics_of(kernels, y, row)
    stats = reference.statistics(parts, 151_936)
    upstream = reference.TokenStats(entropy=torch.ones(n, device="cuda"))
    factors = reference.coefficients(stats, upstream, 151_936)
    mass, row_sums = kernels.column_mass(y, row, per_row_of(parts, factors))
    true_mass = torch.zeros(151_936, dtype=torch.float64, device="cuda")
    for i in range(0, n, 64):
        wide = y[i : i + 64].double()
        p = wide.softmax(1)
        log_p = wide.log_softmax(1)
        dy = -p * (log_p - (p * log_p).sum(1, keepdim=True))
        true_mass += dy.abs().sum(0)
        assert (row_sums[i : i + 64].abs() <= 2e-5 * dy.abs().sum(1)).all()
    assert mass.dtype == row_sums.dtype == torch.float32
    assert relative_error(mass, true_mass) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("n, v", [(1, 151_936), (3, 151_936), (300, 4096), (300, 4101)])
def test_logits_that_exist(n, v, dtype):
    logits = (torch.randn(n, v, device="cuda") * 4).to(dtype).requires_grad_()
    tau = torch.rand(n, device="cuda") + 0.5
    wide = logits.detach().double().requires_grad_()
    truth = stats_of(wide / tau[:, None].double())["entropy"]
    (true_gradient,) = torch.autograd.grad(truth.sum(), wide)
    tolerance = {torch.float32: 2e-5, torch.float16: 2**-9, torch.bfloat16: 2**-8}[dtype]
    entropy = entropy_from_logits(logits, temperature=tau)
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert_close(entropy.double(), truth, rtol=5e-6, atol=0)
    assert gradient.dtype == dtype and relative_error(gradient, true_gradient) < tolerance


def test_hard_rows():
    y = torch.randn(9, 5003, device="cuda")
    y[0] = (y[0] * 8).round() / 8 + 1e4
    y[1] = (y[1] * 8).round() / 8 - 1e4
    y[2] = -7.25
    y[3], y[3, 4000] = 0.0, 1e4
    y[4, 17] = 22.0
    y[5, ::2] = -torch.inf
    y[6] = -torch.inf
    y[7, 5002] = torch.nan
    y[8, 0] = torch.inf
    entropy, gradient = entropy_and_gradient(kernels, y, plain(9, device="cuda"))
    truth = stats_of(y[:6].double())["entropy"]
    assert_close(entropy[:6].double(), truth, rtol=3e-6, atol=0)
    assert_close(entropy[2].item(), math.log(5003), rtol=3e-7, atol=0)
    assert gradient[2].abs().max() <= 1e-7 / 5003
    assert entropy[3] == 0 and (gradient[3] == 0).all()
    assert entropy[4] < 1e-3 and (gradient[5, ::2] == 0).all()
    assert gradient[:6].isfinite().all()
    assert entropy[6:].isnan().all() and gradient[6:].isnan().all()


def test_ties_take_the_lowest_index():
    y = torch.zeros(3, 151_936, device="cuda")
    y[0, [7, 8, 151_935]] = y[1, [70_000, 140_000]] = 2.0
    parts = statistics_of(kernels, y, plain(3, device="cuda"))
    assert parts.argmax.tolist() == [7, 70_000, 0]
    assert parts.s1[2] == 151_935


@pytest.mark.parametrize("n", [2, 500])  # few rows are split, many are not
def test_the_same_bits_again(n):
    y = torch.randn(n, 33_333, device="cuda")
    found = [entropy_and_gradient(kernels, y, plain(n, device="cuda")) for _ in range(3)]
    for entropy, gradient in found[1:]:
        assert torch.equal(entropy, found[0][0]) and torch.equal(gradient, found[0][1])


def test_rows_beyond_the_range_of_int32():
    """Offsets of logits are 64 bits wide."""
    n, v = 14_200, 151_936
    if torch.cuda.mem_get_info()[0] < 2.2 * n * v * 2:
        pytest.skip("needs 10 GB of free memory")
    y = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    y[-1, 5] = 20.0
    entropy, gradient = entropy_and_gradient(kernels, y, plain(n, device="cuda"))
    last = stats_of(y[-1:].double())["entropy"]
    assert_close(entropy[-1:].double(), last, rtol=5e-6, atol=0)
    assert gradient[-1].norm() > 0 and gradient[0].abs().max() <= 1e-7


def on_gpu_with_truth(dtype, n=130, d=64, v=4099):
    hidden, weight, bias, targets = draw(n, d, v, dtype=dtype)
    inputs = leaves(*(x.cuda() for x in (hidden, weight, bias)))
    return inputs, leaves(*inputs, dtype=torch.float64), targets.cuda()


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("transform", [{"temperature": 0.5}, {"softcap": 20.0}])
@pytest.mark.parametrize("n, chunk_bytes", [(130, None), (130, 700_000), (1, None)])
def test_entropy_loss(n, chunk_bytes, transform, dtype):
    inputs, wide, _ = on_gpu_with_truth(dtype, n)
    arguments = {**transform, "chunk_bytes": chunk_bytes}

    def run():
        loss = fused_entropy_loss(inputs[0], inputs[1], bias=inputs[2], **arguments)
        return loss, *torch.autograd.grad(loss, inputs)

    found, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    truth = entropy_of(*wide, **transform).mean()
    eager = entropy_of(*inputs, **transform).mean()
    trues, eagers = torch.autograd.grad(truth, wide), torch.autograd.grad(eager, inputs)
    assert_close(found[0].double(), truth, rtol=1e-5, atol=0)
    for mine, other, true in zip(found[1:], eagers, trues, strict=True):
        assert mine.dtype == dtype
        assert_no_worse_than_eager(mine, other, true, floor=1e-5 * true.norm().item())


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("n, chunk_bytes", [(130, None), (130, 700_000), (1, None)])
def test_token_stats(n, chunk_bytes, dtype):
    inputs, wide, targets = on_gpu_with_truth(dtype, n)
    targets[3::5] = -100
    names = (*FLOAT_STATS, "argmax")

    def total(found):
        return sum((i * found[name]).sum() for i, name in enumerate(FLOAT_STATS, 1))

    def run():
        stats = fused_token_stats(
            inputs[0], inputs[1], targets, bias=inputs[2], stats=names, chunk_bytes=chunk_bytes
        )._asdict()
        return stats, torch.autograd.grad(total(stats), inputs)

    (stats, found), (_, again) = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    truth = stats_of(logits_of(*wide), targets)
    eager = stats_of(logits_of(*inputs), targets)
    assert torch.equal(stats["argmax"], truth["argmax"])
    for name in FLOAT_STATS:
        assert_close(stats[name].double(), truth[name], rtol=1e-5, atol=1e-5)
    trues, eagers = (torch.autograd.grad(total(x), y) for x, y in ((truth, wide), (eager, inputs)))
    for mine, other, true in zip(found, eagers, trues, strict=True):
        assert_no_worse_than_eager(mine, other, true, floor=1e-5 * true.norm().item())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    y = torch.randn(3, 1000, device="cuda:1")
    entropy, gradient = entropy_and_gradient(kernels, y, plain(3, device="cuda:1"))
    assert_close(entropy.double(), stats_of(y.double())["entropy"], rtol=5e-6, atol=0)
    assert gradient.device == y.device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunk_bytes_bounds_the_peak(reduction, dtype):
    """One chunk of logits and of their gradient at a time, whatever the operands' dtype."""
    n, d, v, chunk_bytes = 2048, 64, 32768, 32 << 20
    inputs = [x.detach().cuda().requires_grad_() for x in draw(n, d, v, dtype=dtype)[:2]]
    gradients = sum(x.numel() * (4 + x.element_size()) for x in inputs)

    def run():
        fused_entropy_loss(*inputs, reduction=reduction, chunk_bytes=chunk_bytes).sum().backward()

    run()  # cuBLAS takes a workspace per thread, 32 MiB on Hopper, and keeps it
    for x in inputs:
        x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= chunk_bytes + gradients + 64 * n * 4 + (1 << 20)
