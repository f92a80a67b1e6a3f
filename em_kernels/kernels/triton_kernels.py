"""Triton kernels over the logits' rows: statistics and their gradient, each with one read.

Statistics: every thread keeps a running (1) over the columns that it loads, and threads merge by
(7) only at the row's end, so none waits for another inside the loop. Floating-point fusion is off:
z - m must use the rounded z, as m is one of them, or a confident token's entropy is noise; and
alpha + beta log p must be 0 where the row is flat. Fused operations are written as tl.fma.
"""

import triton
import triton.language as tl

# e^-150 is 0 in fp32; the clamp keeps infinities out of products.
MIN_EXPONENT = tl.constexpr(-150.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    """e^x; results below 1e-38 are 0, which saves three instructions of tl.exp."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _tanh_and_slope(x):
    """tanh x and 1 - tanh^2 x, both to a few ulp."""
    size = tl.abs(x)
    square = x * x
    # Minimax (Remez) approximation of tanh on |x| <= 0.7, relative error 1.5e-8
    head = (-5.13866215e-3 * square + 2.00919700e-2) * square - 5.35588612e-2
    tail = (head * square + 1.33291107e-1) * square - 3.33331899e-1
    small = size * square * tail + size
    e = _exp(-2.0 * size)
    complement = 2.0 * e / (1.0 + e)
    is_small = size < 0.7
    value = tl.where(is_small, small, 1.0 - complement)
    slope = tl.where(is_small, 1.0 - small * small, complement * (2.0 - complement))
    return tl.where(x < 0, -value, value), slope


@triton.jit
def _logits(y_ptrs, mask, bias_ptrs, mask_bias, HAS_BIAS: tl.constexpr):
    """Raw logits and their bias, in fp32; -inf where the mask is off."""
    v = tl.load(y_ptrs, mask=mask, other=-float("inf")).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptrs, mask=mask_bias, other=0.0).to(tl.float32)
    return v


@triton.jit
def _cap(v, inv_temperature, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z, where v is not -inf, and the slope dc/du; scalar factors are multiplied together first."""
    if HAS_SOFTCAP:
        value, slope = _tanh_and_slope(v * (logit_scale / softcap))
        z = value * (softcap * inv_temperature)
    else:
        z = v * (logit_scale * inv_temperature)
        slope = 1.0
    return z, slope


@triton.jit
def _transform(v, inv_temperature, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z of logits that include their bias."""
    z, _ = _cap(v, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
    return tl.where(v == -float("inf"), -float("inf"), z)


@triton.jit
def _merge(m_a, s_a, t_a, q_a, i_a, m_b, s_b, t_b, q_b, i_b):
    """Equation (7); s and q lack the argmax's own 1; the lowest index wins ties."""
    a_wins = (m_a > m_b) | ((m_a == m_b) & (i_a < i_b))
    shift = tl.where(m_a == m_b, 0.0, tl.maximum(-tl.abs(m_a - m_b), MIN_EXPONENT))
    r = _exp(shift)
    s_low = 1.0 + tl.where(a_wins, s_b, s_a)
    t_low = tl.where(a_wins, t_b, t_a)
    q_low = 1.0 + tl.where(a_wins, q_b, q_a)
    return (
        tl.where(a_wins, m_a, m_b),
        tl.where(a_wins, s_a, s_b) + r * s_low,
        tl.where(a_wins, t_a, t_b) + r * (t_low + s_low * shift),
        tl.where(a_wins, q_a, q_b) + r * r * q_low,
        tl.where(a_wins, i_a, i_b),
    )


@triton.jit
def _add_block(
    state,
    y_row,
    bias_ptr,
    cols,  # (UNROLL, LANES, VECTOR)
    columns,
    inv_temperature,
    logit_scale,
    softcap,
    IS_WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_COLLISION_AND_ARGMAX: tl.constexpr,
):
    """Add these columns to every lane's running (1)."""
    m, s, t, q, total, argmax = state
    mask_v = (cols < columns) | IS_WHOLE
    v = _logits(y_row + cols, mask_v, bias_ptr + cols, mask_v, HAS_BIAS)
    z = _transform(v, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
    total += tl.sum(tl.sum(tl.where(mask_v, z, 0.0), axis=2), axis=0)

    new_m = tl.maximum(m, tl.max(tl.max(z, axis=2), axis=0))  # (LANES,)
    origin = tl.where(new_m == -float("inf"), 0.0, new_m)
    is_max = z == origin[None, :, None]
    is_max_1 = is_max.to(tl.float32)
    d = tl.maximum(z - origin[None, :, None], MIN_EXPONENT)
    e = _exp(d) - is_max_1  # e^0 is exactly 1: the maxima drop out here and are counted as ties
    ties = tl.sum(tl.sum(is_max_1, axis=2), axis=0)
    is_higher = new_m > m
    # The old maximum joins the sums, and the new one leaves them.
    changed = tl.where(is_higher, 1.0, 0.0)
    shift = tl.where(is_higher, tl.maximum(m - origin, MIN_EXPONENT), 0.0)
    r = _exp(shift)
    t = r * (t + (1.0 + s) * shift) + tl.sum(tl.sum(e * d, axis=2), axis=0)
    s = r * (s + changed) + tl.sum(tl.sum(e, axis=2), axis=0) + (ties - changed)
    if WITH_COLLISION_AND_ARGMAX:
        q = r * r * (q + changed) + tl.sum(tl.sum(e * e, axis=2), axis=0) + (ties - changed)
        first = tl.min(tl.min(tl.where(is_max, cols, columns), axis=2), axis=0)
        argmax = tl.where(is_higher, first, argmax)
    return new_m, s, t, q, total, argmax


@triton.jit
def row_statistics_kernel(
    y_ptr,  # (rows, columns)
    stride_yn,
    bias_ptr,  # (columns,)
    inv_temperature_ptr,  # (rows,)
    targets_ptr,  # (rows,)
    parts_ptr,  # (splits, 6, rows): m, s', t, target logit, q', sum of z
    argmax_ptr,  # (splits, rows)
    rows,
    columns,
    split_length,  # a multiple of BLOCK_V
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    WITH_COLLISION_AND_ARGMAX: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    BLOCK_V: tl.constexpr = UNROLL * LANES * VECTOR
    y_row = y_ptr + row * stride_yn
    inv_temperature = tl.load(inv_temperature_ptr + row)
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row)

    # (UNROLL, LANES, VECTOR): a lane is a thread, which loads VECTOR adjacent columns at once.
    offs_v = (
        tl.arange(0, UNROLL)[:, None, None] * (LANES * VECTOR)
        + tl.arange(0, LANES)[None, :, None] * VECTOR
        + tl.arange(0, VECTOR)[None, None, :]
    )
    lowest = tl.full([LANES], -float("inf"), tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    state = (lowest, zero, zero, zero, zero, tl.arange(0, LANES))
    begin = split * split_length
    end = tl.minimum(begin + split_length, columns)
    whole_end = begin + (end - begin) // BLOCK_V * BLOCK_V
    for start in range(begin, whole_end, BLOCK_V):
        state = _add_block(
            state, y_row, bias_ptr, start + offs_v, columns, inv_temperature, logit_scale, softcap,
            True, HAS_BIAS, HAS_SOFTCAP, WITH_COLLISION_AND_ARGMAX,
        )  # fmt: skip
    if whole_end < end:
        state = _add_block(
            state, y_row, bias_ptr, whole_end + offs_v, columns, inv_temperature, logit_scale,
            softcap, False, HAS_BIAS, HAS_SOFTCAP, WITH_COLLISION_AND_ARGMAX,
        )  # fmt: skip

    m, s, t, q, total, argmax = state
    m, s, t, q, argmax = tl.reduce((m, s, t, q, argmax), 0, _merge)
    total = tl.sum(total, axis=0)
    is_broken = (total != total) | (m == float("inf"))
    m = tl.where(is_broken, float("nan"), m)
    parts = parts_ptr + split * 6 * rows + row
    tl.store(parts, m)
    tl.store(parts + rows, s)
    tl.store(parts + 2 * rows, t)
    if HAS_TARGETS:
        is_here = (target >= begin) & (target < end)
        v = _logits(y_row + target, is_here, bias_ptr + target, is_here, HAS_BIAS)
        target_logit = _transform(v, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
        tl.store(parts + 3 * rows, target_logit)
    else:
        tl.store(parts + 3 * rows, -float("inf"))
    if WITH_COLLISION_AND_ARGMAX:
        tl.store(parts + 4 * rows, q)
        tl.store(parts + 5 * rows, total)
        tl.store(argmax_ptr + split * rows + row, argmax.to(tl.int64))


@triton.jit
def _row_scalars(
    inv_temperature_ptr, targets_ptr, per_row_ptr, rows, offs_n, mask_n, HAS_TARGETS: tl.constexpr
):
    """Load the per-row terms of equation (8)."""
    inv_temperature = tl.load(inv_temperature_ptr + offs_n, mask=mask_n)
    target = 0
    if HAS_TARGETS:
        target = tl.load(targets_ptr + offs_n, mask=mask_n).to(tl.int32)
    m = tl.load(per_row_ptr + offs_n, mask=mask_n)
    log_s = tl.load(per_row_ptr + rows + offs_n, mask=mask_n)
    alpha = tl.load(per_row_ptr + 2 * rows + offs_n, mask=mask_n)
    beta = tl.load(per_row_ptr + 3 * rows + offs_n, mask=mask_n)
    gamma = tl.load(per_row_ptr + 4 * rows + offs_n, mask=mask_n)
    delta = tl.load(per_row_ptr + 5 * rows + offs_n, mask=mask_n)
    rho = tl.load(per_row_ptr + 6 * rows + offs_n, mask=mask_n)
    at_target = tl.load(per_row_ptr + 7 * rows + offs_n, mask=mask_n)
    return inv_temperature, target, m, log_s, alpha, beta, gamma, delta, rho, at_target


@triton.jit
def _gradient(
    v,
    scalars,
    offs_v,
    origin,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
):
    """Equation (8) without the row's factor logit_scale / temperature.

    v are the logits, with their bias, of columns origin + offs_v.
    """
    inv_temperature, target, m, log_s, alpha, beta, gamma, delta, rho, at_target = scalars
    nan_unless_finite = (m - m) + (log_s - log_s)
    delta += nan_unless_finite
    z, slope = _cap(v, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
    log_p = (z - m) - log_s
    p = _exp(log_p)
    factor, constant = alpha - gamma, delta
    if HAS_TARGETS:
        is_target = offs_v == target - origin
        factor = tl.where(is_target, alpha, factor)
        constant = tl.where(is_target, at_target + delta, delta)
    du = tl.fma(p, tl.fma(rho, p, factor + beta * log_p), constant)
    if HAS_SOFTCAP:
        du *= slope
        is_masked = tl.abs(v) == float("inf")  # at +inf the slope is 0 as well
    else:
        is_masked = tl.abs(z) == float("inf")  # +inf: the scale is negative, or the row is NaN
    return tl.where(is_masked, nan_unless_finite, du)


@triton.jit
def row_gradient_kernel(
    y_ptr,  # (rows, columns)
    stride_yn,
    out_ptr,  # (rows, columns)
    stride_on,
    bias_ptr,  # (columns,)
    inv_temperature_ptr,  # (rows,)
    targets_ptr,  # (rows,)
    per_row_ptr,  # (8, rows): m, log s, alpha, beta, gamma, delta, rho, at_target
    rows,
    columns,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks_v = tl.cdiv(columns, BLOCK_V)
    block = tl.program_id(0)
    first_v = (block % blocks_v) * BLOCK_V
    offs_n = ((block // blocks_v) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    offs_v = (first_v + tl.arange(0, BLOCK_V))[None, :]
    mask_n = offs_n < rows
    scalars = _row_scalars(
        inv_temperature_ptr, targets_ptr, per_row_ptr, rows, offs_n, mask_n, HAS_TARGETS
    )
    scale = scalars[0] * logit_scale
    y_ptrs = y_ptr + offs_n.to(tl.int64) * stride_yn + offs_v
    out_ptrs = out_ptr + offs_n.to(tl.int64) * stride_on + offs_v
    bias_ptrs = bias_ptr + offs_v
    if first_v + BLOCK_V <= columns:
        everywhere = tl.full([1, BLOCK_V], True, tl.int1)
        v = _logits(y_ptrs, mask_n & everywhere, bias_ptrs, everywhere, HAS_BIAS)
        dy = scale * _gradient(
            v, scalars, offs_v, 0, logit_scale, softcap, HAS_SOFTCAP, HAS_TARGETS
        )
        tl.store(out_ptrs, dy, mask=mask_n)
    else:
        mask_v = offs_v < columns
        v = _logits(y_ptrs, mask_n & mask_v, bias_ptrs, mask_v, HAS_BIAS)
        dy = scale * _gradient(
            v, scalars, offs_v, 0, logit_scale, softcap, HAS_SOFTCAP, HAS_TARGETS
        )
        tl.store(out_ptrs, dy, mask=mask_n & mask_v)


@triton.jit
def column_gradient_kernel(
    y_ptr,  # (rows, columns)
    stride_yn,
    out_ptr,  # (rows, count)
    stride_on,
    bias_ptr,  # (columns,)
    inv_temperature_ptr,  # (rows,)
    targets_ptr,  # (rows,)
    per_row_ptr,  # (8, rows), as in row_gradient_kernel
    indices_ptr,  # (count,) of columns
    residual_ptr,  # (rows,), from which each row's sum is subtracted
    rows,
    count,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Equation (8) for some columns; a program has a row, whose sum it needs."""
    row = tl.program_id(0)
    scalars = _row_scalars(
        inv_temperature_ptr, targets_ptr, per_row_ptr, rows, row, None, HAS_TARGETS
    )
    scale = scalars[0] * logit_scale
    y_row = y_ptr + row.to(tl.int64) * stride_yn
    out_row = out_ptr + row.to(tl.int64) * stride_on
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, count, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        mask = offs < count
        cols = tl.load(indices_ptr + offs, mask=mask, other=0).to(tl.int32)
        v = _logits(y_row + cols, mask, bias_ptr + cols, mask, HAS_BIAS)
        du = _gradient(v, scalars, cols, 0, logit_scale, softcap, HAS_SOFTCAP, HAS_TARGETS)
        dy = tl.where(mask, du * scale, 0.0)
        tl.store(out_row + offs, dy, mask=mask)
        total += dy
    residual = tl.load(residual_ptr + row)
    tl.store(residual_ptr + row, residual - tl.sum(total, axis=0))
