"""The GEMM of 16-bit operands and fp32 result: both instruction sets, and upcast."""

import itertools

import pytest
import torch
from kernel_params import needs_extension
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import em_kernels.ops.flops
import em_kernels.ops.gemm
from em_kernels.ops.gemm import BF16_ISAS, bf16_isa, gemm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[0, 1, 2], ids=BF16_ISAS)
def isa(request, monkeypatch):
    """Run the test with each way in which this CPU multiplies bf16."""
    if request.param > bf16_isa():
        pytest.skip(f"this CPU has no {BF16_ISAS[request.param]}")
    monkeypatch.setattr(em_kernels.ops.gemm, "bf16_isa", lambda: request.param)
    return request.param


@pytest.fixture(params=[1, 2], ids=BF16_ISAS[1:])
def native_isa(request):
    """Run the test with each instruction set that the op can use on this CPU."""
    if request.param > bf16_isa():
        pytest.skip(f"this CPU has no {BF16_ISAS[request.param]}")
    return request.param


def framed(x, layout="rows", frame=float("nan")):
    """Return x inside a larger matrix of `frame`, with its rows or its columns contiguous."""
    if layout == "columns":
        return framed(x.t(), frame=frame).t()
    rows, columns = x.shape
    whole = torch.full((rows + 40, columns + 37), frame, dtype=x.dtype)
    inside = whole[3 : 3 + rows, 5 : 5 + columns]
    return inside.copy_(x)


def check(out, before, a, b):
    """Check fp32 accumulation: a sum's error is a few roundings of its terms' sizes."""
    a, b = a.double(), b.double()
    size = a.abs() @ b.abs() + before.abs()
    bound = 2**-23 * (4 + a.shape[1] ** 0.5) * size + 1e-30
    assert ((out - (a @ b + before)).abs() <= bound).all()


def problem(m, k, n, layouts=("rows", "rows")):
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    return framed(a, layouts[0]), framed(b, layouts[1])


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [(4, 33, 7), (4, 7, 33), (1, 1, 1), (0, 5, 6)])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids=str)
def test_any_dtypes(dtypes, shape, accumulate, isa, monkeypatch):
    """Sums are fp32, also where blocks of 16-bit operands are upcast."""
    monkeypatch.setattr(em_kernels.ops.gemm, "UPCAST_BYTES", 4 * 7 * 5)
    rows, inner, columns = shape
    a = torch.randn(rows, inner).to(dtypes[0])
    b = torch.randn(columns, inner).to(dtypes[1]).t()
    before = torch.full((rows, columns), 1e3 if accumulate else torch.nan)
    out = before.clone()
    assert gemm(out, a, b, accumulate) is out
    expected = a.double() @ b.double() + (before if accumulate else 0)
    assert_close(out.double(), expected, rtol=1e-6, atol=1e-5)


EDGES = [0, 1, 2, 15, 16, 17, 31, 32, 33, 65]
LAYOUT_PAIRS = list(itertools.product(["rows", "columns"], repeat=2))
SHAPES = [
    *itertools.product([1, 16, 33], repeat=3),
    *((m, 40, 50) for m in EDGES),
    *((40, k, 50) for k in EDGES),
    *((50, 40, n) for n in EDGES),
    (0, 0, 0),
    (70, 1024, 40),  # K is a little more than a block
    (70, 1025, 40),
    (20, 2100, 800),  # several blocks of b's columns
    (3, 30, 25000),
]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
def test_every_remainder(layouts, accumulate, native_isa):
    """Memory around the operands holds NaN, and memory around out stays as it was."""
    for m, k, n in SHAPES:
        a, b = problem(m, k, n, layouts)
        before = torch.randn(m, n) if accumulate else torch.full((m, n), torch.nan)
        out = framed(before, frame=7.0)
        torch.ops.em_kernels.gemm_bf16(out, a, b, accumulate, native_isa)
        check(out, before if accumulate else torch.zeros(m, n), a, b)
        around = out._base.clone()
        around[3 : 3 + m, 5 : 5 + n] = 7.0
        assert (around == 7.0).all()


@pytest.mark.parametrize("accumulate", [False, True])
def test_aligned_output(accumulate, native_isa):
    """Whole panels of an aligned output bypass the cache."""
    a, b = problem(70, 64, 96)
    before = torch.randn(70, 96)
    out = before.clone()
    assert out.data_ptr() % 64 == 0
    torch.ops.em_kernels.gemm_bf16(out, a, b, accumulate, native_isa)
    check(out, before * accumulate, a, b)


def test_bf16_gradient_within_fp32_rows(native_isa):
    """dy in bf16 lies in the first half of each fp32 row."""
    c, d, v = 50, 24, 333
    dy = torch.randn(c, v)
    narrow = dy.view(torch.bfloat16)[:, :v]
    narrow.copy_(dy.clone())
    assert narrow.stride() == (2 * v, 1)
    weight, hidden = torch.randn(v, d).bfloat16(), torch.randn(c, d).bfloat16()
    dh, dw = torch.zeros(c, d), torch.ones(v, d)
    torch.ops.em_kernels.gemm_bf16(dh, narrow, weight, False, native_isa)
    torch.ops.em_kernels.gemm_bf16(dw, narrow.t(), hidden, True, native_isa)
    check(dh, torch.zeros(c, d), narrow, weight)
    check(dw, torch.ones(v, d), narrow.t(), hidden)


@pytest.mark.parametrize("shape", [(512, 64, 3000), (64, 5000, 200), (3000, 64, 200)])
def test_same_bits_for_any_threads_and_slabs(shape, native_isa):
    m, k, n = shape
    a, b = problem(m, k, n, ("rows", "columns"))
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3, 4):
        torch.set_num_threads(count)
        try:
            results.append(torch.empty(m, n))
            torch.ops.em_kernels.gemm_bf16(results[-1], a, b, False, native_isa)
        finally:
            torch.set_num_threads(threads)
    slab = torch.empty(m, 77)
    torch.ops.em_kernels.gemm_bf16(slab, a, b[:, 50:127], False, native_isa)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(results[0][:, 50:127], slab)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
def test_not_finite_stays_in_its_row_and_column(layouts, value, native_isa):
    a, b = problem(35, 45, 37, layouts)
    a[34, 44] = b[44, 36] = value
    out = torch.empty(35, 37)
    torch.ops.em_kernels.gemm_bf16(out, a, b, False, native_isa)
    expected = a.double() @ b.double()
    finite = expected.isfinite()
    assert finite.sum() == 34 * 36
    assert_close(out[~finite].double(), expected[~finite], equal_nan=True)
    check(out[:34, :36], torch.zeros(34, 36), a[:34], b[:, :36])


def test_no_unit_stride_is_upcast():
    a, b = torch.randn(8, 12).bfloat16()[::2, ::2], torch.randn(6, 10).bfloat16()[:, ::2]
    out = gemm(torch.empty(4, 5), a, b)
    check(out, torch.zeros(4, 5), a, b)


@needs_extension
def test_flops_are_counted_and_fakes_traced(native_isa):
    a, b = problem(5, 7, 11)
    with FlopCounterMode(display=False) as counter:
        torch.ops.em_kernels.gemm_bf16(torch.empty(5, 11), a, b, False, native_isa)
    assert counter.get_total_flops() == 2 * 5 * 7 * 11
    arguments = (torch.zeros(5, 11), a.contiguous(), b.contiguous(), True, native_isa)
    torch.library.opcheck(torch.ops.em_kernels.gemm_bf16.default, arguments)


def matrix(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype)


ERRORS = {
    "out must be float32, not BFloat16": (matrix(2, 4), matrix(2, 3), matrix(3, 4)),
    "a must be bfloat16, not Float": (torch.zeros(2, 4), torch.zeros(2, 3), matrix(3, 4)),
    "b must be bfloat16, not Half": (torch.zeros(2, 4), matrix(2, 3), matrix(3, 4).half()),
    r"out \(M, N\) = a \(M, K\) @ b \(K, N\) cannot be \(2, 5\) = \(2, 3\) @ \(3, 4\)": (
        torch.zeros(2, 5),
        matrix(2, 3),
        matrix(3, 4),
    ),
    "must be matrices, not of 2, 1 and 2 dimensions": (torch.zeros(2, 4), matrix(3), matrix(3, 4)),
    r"a must have stride 1 in one of its dimensions, not strides \(12, 2\)": (
        torch.zeros(2, 4),
        matrix(4, 6)[::2, ::2],
        matrix(3, 4),
    ),
    r"b must have stride 1 in one of its dimensions, not strides \(8, 2\)": (
        torch.zeros(2, 4),
        matrix(2, 3),
        matrix(3, 8)[:, ::2],
    ),
    "out must have stride 1 along its columns, not 2": (
        torch.zeros(4, 2).t(),
        matrix(2, 3),
        matrix(3, 4),
    ),
    "rows must not overlap: row stride 0 with 4 columns": (
        torch.zeros(4).expand(2, 4),
        matrix(2, 3),
        matrix(3, 4),
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message, native_isa):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.em_kernels.gemm_bf16(*ERRORS[message], False, native_isa)


@needs_extension
@pytest.mark.parametrize("number", [-1, 0, 3])
def test_unknown_isa(number):
    operands = torch.zeros(2, 4), matrix(2, 3), matrix(3, 4)
    with pytest.raises(RuntimeError, match=f"isa must be 1 .* not {number}"):
        torch.ops.em_kernels.gemm_bf16(*operands, False, number)
