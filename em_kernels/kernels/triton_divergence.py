"""Triton kernels over two heads' logits: divergence sums (10), (11) and their gradient (11).

Each program reads a row of both. KIND is 0 for beta = 0, 1 for beta = 1, 2 between them.
"""

import triton
import triton.language as tl

from .triton_finish import _log1p
from .triton_kernels import MIN_EXPONENT, _cap, _exp, _logits, _tanh_and_slope

# Of a ratio: beyond it the logarithm is multiplied by less than e^-80.
MAX_EXPONENT = tl.constexpr(80.0)


@triton.jit
def _log_p(
    y_ptrs,
    bias_ptrs,
    mask,
    inv_temperature,
    logit_scale,
    softcap,
    m,
    log_s,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """log p (4), -inf where the logit is or the mask is off; and the slope dc/du."""
    v = _logits(y_ptrs, mask, bias_ptrs, mask, HAS_BIAS)
    z, slope = _cap(v, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
    return tl.where(v == -float("inf"), -float("inf"), (z - m) - log_s), slope


@triton.jit
def _log_ratio(log_p, log_q):
    """log(p / q); 0 where both are 0."""
    return tl.where(log_p == log_q, 0.0, log_p - log_q)


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 80, to a few ulp."""
    x = tl.maximum(x, MIN_EXPONENT)
    tanh, _ = _tanh_and_slope(0.5 * x)
    return tanh * (_exp(x) + 1.0)


@triton.jit
def _log_mixture(x, share, rest):
    """log(rest + share e^x), for share + rest = 1, exact near x = 0."""
    x = tl.minimum(x, MAX_EXPONENT)
    change = share * _expm1(x)
    is_near = change > -0.5
    far = tl.log(rest + share * _exp(tl.maximum(x, MIN_EXPONENT)))
    return tl.where(is_near, _log1p(tl.where(is_near, change, 0.0)), far)


@triton.jit
def _times(p, log_ratio):
    """p log(p / q): 0 where p is 0, inf where only q is."""
    product = tl.where(log_ratio == -float("inf"), 0.0, p * log_ratio)
    return tl.where(log_ratio == float("inf"), float("inf"), product)


@triton.jit
def _excess(p, q, x):
    """p x - p + q >= 0 for x = log(p / q), by its Taylor series where p is near q."""
    series = (((x / 720.0 - 1.0 / 120.0) * x + 1.0 / 24.0) * x - 1.0 / 6.0) * x + 0.5
    return tl.where(tl.abs(x) < 0.25, p * (x * x * series), _times(p, x) - p + q)


@triton.jit
def _row_sums(per_row_ptr, rows, row):
    """m and log s of both heads."""
    return (
        tl.load(per_row_ptr + row),
        tl.load(per_row_ptr + rows + row),
        tl.load(per_row_ptr + 2 * rows + row),
        tl.load(per_row_ptr + 3 * rows + row),
    )


@triton.jit
def divergence_sums_kernel(
    y_ptr,  # (rows, columns)
    stride_yn,
    bias_ptr,  # (columns,)
    ref_y_ptr,  # (rows, columns)
    stride_rn,
    ref_bias_ptr,  # (columns,)
    inv_temperature_ptr,  # (rows,)
    per_row_ptr,  # (7, rows), of which the first five are read
    sums_ptr,  # (splits, 2, rows): (10), and c of (11)
    rows,
    columns,
    split_length,  # a multiple of BLOCK_V
    logit_scale,
    softcap,
    ref_logit_scale,
    ref_softcap,
    beta,
    rest,  # 1 - beta
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    REF_HAS_BIAS: tl.constexpr,
    REF_HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    m, log_s, ref_m, ref_log_s = _row_sums(per_row_ptr, rows, row)
    pivot = tl.load(per_row_ptr + 4 * rows + row)
    if KIND == 2:
        pivot = -_log_mixture(-pivot, beta, rest)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    value, centre = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)
    begin = split * split_length
    for start in range(begin, tl.minimum(begin + split_length, columns), BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = cols < columns
        log_p, _ = _log_p(
            y_ptr + row * stride_yn + cols, bias_ptr + cols, mask, inv_temperature, logit_scale,
            softcap, m, log_s, HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        log_q, _ = _log_p(
            ref_y_ptr + row * stride_rn + cols, ref_bias_ptr + cols, mask, inv_temperature,
            ref_logit_scale, ref_softcap, ref_m, ref_log_s, REF_HAS_BIAS, REF_HAS_SOFTCAP,
        )  # fmt: skip
        p, q, x = _exp(log_p), _exp(log_q), _log_ratio(log_p, log_q)
        if KIND == 0:
            value += _excess(q, p, -x)
        elif KIND == 1:
            value += _excess(p, q, x)
            centre += _times(p, x - pivot)
        else:
            mixture = beta * q + rest * p
            of_p = -_log_mixture(-x, beta, rest)
            of_q = -_log_mixture(x, rest, beta)
            value += rest * _excess(p, mixture, of_p) + beta * _excess(q, mixture, of_q)
            centre += p * (of_p - pivot)
    nan_unless_finite = (m - m) + (log_s - log_s) + (ref_m - ref_m) + (ref_log_s - ref_log_s)
    sums = sums_ptr + split * 2 * rows + row
    tl.store(sums, tl.sum(value, axis=0) + nan_unless_finite)
    tl.store(sums + rows, tl.sum(centre, axis=0) + nan_unless_finite)


@triton.jit
def divergence_gradient_kernel(
    y_ptr,  # (rows, columns)
    stride_yn,
    bias_ptr,  # (columns,)
    ref_y_ptr,  # (rows, columns)
    stride_rn,
    ref_bias_ptr,  # (columns,)
    inv_temperature_ptr,  # (rows,)
    per_row_ptr,  # (7, rows), as DivergenceTerms has it
    out_ptr,  # (rows, columns)
    stride_on,
    rows,
    columns,
    logit_scale,
    softcap,
    ref_logit_scale,
    ref_softcap,
    beta,
    rest,  # 1 - beta
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    REF_HAS_BIAS: tl.constexpr,
    REF_HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks_v = tl.cdiv(columns, BLOCK_V)
    row = (tl.program_id(0) // blocks_v).to(tl.int64)
    cols = (tl.program_id(0) % blocks_v) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < columns
    m, log_s, ref_m, ref_log_s = _row_sums(per_row_ptr, rows, row)
    pivot = tl.load(per_row_ptr + 4 * rows + row)
    centre = tl.load(per_row_ptr + 5 * rows + row)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    scale = tl.load(per_row_ptr + 6 * rows + row) * inv_temperature * logit_scale
    log_p, slope = _log_p(
        y_ptr + row * stride_yn + cols, bias_ptr + cols, mask, inv_temperature, logit_scale,
        softcap, m, log_s, HAS_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
    log_q, _ = _log_p(
        ref_y_ptr + row * stride_rn + cols, ref_bias_ptr + cols, mask, inv_temperature,
        ref_logit_scale, ref_softcap, ref_m, ref_log_s, REF_HAS_BIAS, REF_HAS_SOFTCAP,
    )  # fmt: skip
    p, x = _exp(log_p), _log_ratio(log_p, log_q)
    if KIND == 0:
        change = _expm1(-tl.abs(x))
        dz = tl.where(x < 0.0, _exp(log_q) * change, -p * change)
    elif KIND == 1:
        dz = p * ((x - pivot) - centre)
    else:
        pivot = -_log_mixture(-pivot, beta, rest)
        dz = rest * p * ((-_log_mixture(-x, beta, rest) - pivot) - centre)
    dy = tl.where(log_p == -float("inf"), 0.0, dz * scale * slope)
    nan_unless_finite = (m - m) + (log_s - log_s) + (centre - centre)
    nan_unless_finite += (ref_m - ref_m) + (ref_log_s - ref_log_s)
    tl.store(out_ptr + row * stride_on + cols, dy + nan_unless_finite, mask=mask)
