"""Triton kernels: equations (1)-(8) of reference.py, each with one read of the logits.

Statistics: every thread keeps a running (1) over the columns that it loads, and threads merge by
(7) only at the row's end, so none waits for another inside the loop. Floating-point fusion is off:
z - m must use the rounded z, as m is one of them, or a confident token's entropy is noise; and
alpha + beta log p must be 0 where the row is flat. Fused operations are written as tl.fma.

Column masses: a program is one warp, which owns columns and walks down rows. Masses stay in
registers, a row's sum is five shuffles, and nothing waits for another warp.

What follows a pass over the logits works on few values, where launches cost more than the work: one
kernel finishes a chunk's rows, and one chooses its columns, in which every program finds the
threshold for itself rather than wait for others.
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


@triton.jit
def _add_masses(
    y_ptr,
    stride_yn,
    bias_ptr,
    inv_temperature_ptr,
    targets_ptr,
    per_row_ptr,
    mass_ptr,
    row_sums_ptr,
    begin,
    end,
    first_v,
    rows,
    columns,
    logit_scale,
    softcap,
    IS_WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sum |dy| over rows begin to end, and each row's dy over columns.

    The columns are the UNROLL * LANES * VECTOR from first_v on.
    """
    # Columns (UNROLL, LANES, VECTOR) as a sum of two parts: the lane's, and one that all lanes
    # share, which becomes an immediate operand.
    lane_v = first_v + tl.arange(0, LANES)[None, :, None] * VECTOR
    offs_v = (
        tl.arange(0, UNROLL)[:, None, None] * (LANES * VECTOR) + tl.arange(0, VECTOR)[None, None, :]
    )
    cols = lane_v + offs_v
    mask_v = (cols < columns) | IS_WHOLE
    mass = tl.zeros([UNROLL, LANES, VECTOR], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=mask_v, other=0.0).to(tl.float32)
    y_row = y_ptr + begin.to(tl.int64) * stride_yn
    for row in range(begin, end):
        v = tl.load(y_row + cols, mask=mask_v, other=-float("inf")).to(tl.float32)
        if HAS_BIAS:
            v += bias
        scalars = _row_scalars(
            inv_temperature_ptr, targets_ptr, per_row_ptr, rows, row, None, HAS_TARGETS
        )
        du = _gradient(v, scalars, offs_v, lane_v, logit_scale, softcap, HAS_SOFTCAP, HAS_TARGETS)
        scale = scalars[0] * logit_scale
        mass = tl.fma(tl.abs(du), tl.abs(scale), mass)
        total = tl.sum(tl.sum(tl.sum(du, axis=2), axis=0), axis=0)
        tl.store(row_sums_ptr + row, scale * total)
        y_row += stride_yn
    tl.store(mass_ptr + cols, mass, mask=mask_v)


@triton.jit
def column_mass_kernel(
    y_ptr,  # (rows, columns)
    stride_yn,
    bias_ptr,  # (columns,)
    inv_temperature_ptr,  # (rows,)
    targets_ptr,  # (rows,)
    per_row_ptr,  # (8, rows), as in row_gradient_kernel
    mass_ptr,  # (splits, columns)
    row_sums_ptr,  # (column blocks, rows)
    rows,
    columns,
    split_rows,  # per program
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    block = tl.program_id(0)
    split = tl.program_id(1)
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, rows)
    mass = mass_ptr + split.to(tl.int64) * columns
    row_sums = row_sums_ptr + block.to(tl.int64) * rows
    # Columns beyond the last whole block go into narrow blocks, whose masks take few registers.
    whole = columns // (UNROLL * LANES * VECTOR)
    if block < whole:
        _add_masses(
            y_ptr, stride_yn, bias_ptr, inv_temperature_ptr, targets_ptr, per_row_ptr, mass,
            row_sums, begin, end, block * (UNROLL * LANES * VECTOR), rows, columns, logit_scale,
            softcap, True, HAS_BIAS, HAS_SOFTCAP, HAS_TARGETS, LANES, VECTOR, UNROLL,
        )  # fmt: skip
    else:
        _add_masses(
            y_ptr, stride_yn, bias_ptr, inv_temperature_ptr, targets_ptr, per_row_ptr, mass,
            row_sums, begin, end, (whole * (UNROLL - 1) + block) * (LANES * VECTOR), rows, columns,
            logit_scale, softcap, False, HAS_BIAS, HAS_SOFTCAP, HAS_TARGETS, LANES, VECTOR, 1,
        )  # fmt: skip


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, to a few ulp."""
    # 2 atanh(w): its series converges fast for x <= 1, where w <= 1/3.
    w = x / (2.0 + x)
    square = w * w
    tail = (((square / 15.0 + 1.0 / 13.0) * square + 1.0 / 11.0) * square + 1.0 / 9.0) * square
    tail = (((tail + 1.0 / 7.0) * square + 1.0 / 5.0) * square + 1.0 / 3.0) * square
    return tl.where(x <= 1.0, 2.0 * tl.fma(w, tail, w), tl.log(1.0 + x))


@triton.jit
def finish_rows_kernel(
    m_ptr,  # (parts, rows), as are the next five
    s_ptr,
    t_ptr,
    target_logit_ptr,
    q_ptr,
    total_ptr,
    stride_parts,
    argmax_ptr,  # (parts, rows)
    stride_argmax,
    targets_ptr,  # (rows,)
    stats_ptr,  # (7, rows): m, log s, entropy, logprob, logsumexp, mean_logit, log_collision
    argmax_out_ptr,  # (rows,)
    parts,
    rows,
    vocab_size,
    HAS_TARGETS: tl.constexpr,
    WITH_COLLISION_AND_ARGMAX: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merge the parts by (7); equations (2) to (6)."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row < rows
    m = tl.load(m_ptr + row, mask=mask)
    s = tl.load(s_ptr + row, mask=mask)
    t = tl.load(t_ptr + row, mask=mask)
    target_logit = m
    q, total = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    argmax = tl.zeros([BLOCK_N], tl.int64)
    if HAS_TARGETS:
        target_logit = tl.load(target_logit_ptr + row, mask=mask)
    if WITH_COLLISION_AND_ARGMAX:
        q = tl.load(q_ptr + row, mask=mask)
        total = tl.load(total_ptr + row, mask=mask)
        argmax = tl.load(argmax_ptr + row, mask=mask)
    nan = m != m
    at, at_argmax = row.to(tl.int64), row.to(tl.int64)
    for _ in range(1, parts):
        at += stride_parts
        at_argmax += stride_argmax
        m_b = tl.load(m_ptr + at, mask=mask)
        s_b, t_b = tl.load(s_ptr + at, mask=mask), tl.load(t_ptr + at, mask=mask)
        nan |= m_b != m_b
        q_b, argmax_b = q, argmax
        if HAS_TARGETS:
            target_logit = tl.maximum(target_logit, tl.load(target_logit_ptr + at, mask=mask))
        if WITH_COLLISION_AND_ARGMAX:
            q_b = tl.load(q_ptr + at, mask=mask)
            total += tl.load(total_ptr + at, mask=mask)
            argmax_b = tl.load(argmax_ptr + at_argmax, mask=mask)
        # Parts are in the vocabulary's order, so that the earlier one has the lower argmax.
        m, s, t, q, argmax = _merge(m, s, t, q, argmax, m_b, s_b, t_b, q_b, argmax_b)
    m = tl.where(nan, float("nan"), m)
    nan_unless_finite = m - m
    log_s = _log1p(s) + nan_unless_finite
    tl.store(stats_ptr + row, m, mask=mask)
    tl.store(stats_ptr + rows + row, log_s, mask=mask)
    tl.store(stats_ptr + 2 * rows + row, log_s - tl.div_rn(t, 1.0 + s), mask=mask)
    if HAS_TARGETS:
        is_ignored = tl.load(targets_ptr + row, mask=mask) == -100
        logprob = (target_logit - m) - log_s
        tl.store(stats_ptr + 3 * rows + row, tl.where(is_ignored, 0.0, logprob), mask=mask)
    tl.store(stats_ptr + 4 * rows + row, m + log_s, mask=mask)
    if WITH_COLLISION_AND_ARGMAX:
        mean = tl.div_rn(total, tl.zeros([BLOCK_N], tl.float32) + vocab_size) + nan_unless_finite
        tl.store(stats_ptr + 5 * rows + row, mean, mask=mask)
        tl.store(stats_ptr + 6 * rows + row, _log1p(q) - 2.0 * log_s, mask=mask)
        argmax = tl.where(nan_unless_finite == 0.0, argmax, 0)
        tl.store(argmax_out_ptr + row, argmax, mask=mask)


@triton.jit
def gradient_factors_kernel(
    m_ptr,  # (rows,), as are all the others; the upstream gradients may be None
    log_s_ptr,
    entropy_ptr,
    logprob_ptr,
    log_collision_ptr,
    g_entropy_ptr,
    g_logprob_ptr,
    g_logsumexp_ptr,
    g_mean_logit_ptr,
    g_log_collision_ptr,
    per_row_ptr,  # (8, rows): m, log s, alpha, beta, gamma, delta, rho, at_target
    rows,
    vocab_size,
    BLOCK_N: tl.constexpr,
):
    """The per-row terms of equation (8)."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row < rows
    m = tl.load(m_ptr + row, mask=mask)
    tl.store(per_row_ptr + row, m, mask=mask)
    tl.store(per_row_ptr + rows + row, tl.load(log_s_ptr + row, mask=mask), mask=mask)
    zero = tl.zeros([BLOCK_N], tl.float32)
    alpha, beta, gamma, delta, rho, at_target = zero, zero, zero, zero, zero, zero
    if g_logsumexp_ptr is not None:
        alpha = tl.load(g_logsumexp_ptr + row, mask=mask)
    if g_entropy_ptr is not None:
        g = tl.load(g_entropy_ptr + row, mask=mask)
        alpha -= g * tl.load(entropy_ptr + row, mask=mask)
        beta = -g
    if g_log_collision_ptr is not None:
        g = tl.load(g_log_collision_ptr + row, mask=mask)
        alpha -= 2.0 * g
        # Without a gradient rho is 0, even where log_collision is -inf and 0 * inf would be NaN.
        log_collision = tl.load(log_collision_ptr + row, mask=mask)
        rho = tl.where(g == 0.0, 0.0, 2.0 * g * tl.exp(-log_collision))
    if g_mean_logit_ptr is not None:
        g = tl.load(g_mean_logit_ptr + row, mask=mask)
        delta = tl.div_rn(g, zero + vocab_size)
    if g_logprob_ptr is not None:
        gamma = tl.load(g_logprob_ptr + row, mask=mask)
        logprob = tl.load(logprob_ptr + row, mask=mask)
        # expm1(x) = tanh(x / 2) (e^x + 1) keeps the digits of a confident target.
        tanh, _ = _tanh_and_slope(0.5 * logprob)
        at_target = -gamma * (tanh * (tl.exp(logprob) + 1.0))
    tl.store(per_row_ptr + 2 * rows + row, alpha, mask=mask)
    tl.store(per_row_ptr + 3 * rows + row, beta, mask=mask)
    tl.store(per_row_ptr + 4 * rows + row, gamma, mask=mask)
    tl.store(per_row_ptr + 5 * rows + row, delta, mask=mask)
    tl.store(per_row_ptr + 6 * rows + row, rho, mask=mask)
    tl.store(per_row_ptr + 7 * rows + row, at_target, mask=mask)


@triton.jit
def _is_kept(mass, threshold):
    """Not below the threshold, and not 0; a NaN is kept."""
    return ((mass < threshold) == 0) & (mass != 0.0)


@triton.jit
def _masses_below(mass_ptr, columns, thresholds, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """Sum the masses below each threshold (8,)."""
    sums = tl.zeros([8, LANES], tl.float32)
    for start in range(0, columns, UNROLL * LANES):
        for i in tl.static_range(UNROLL):
            cols = start + i * LANES + tl.arange(0, LANES)
            mass = tl.load(mass_ptr + cols, mask=cols < columns, other=0.0)
            sums += tl.where(mass[None, :] < thresholds[:, None], mass[None, :], 0.0)
    return tl.sum(sums, axis=1)


@triton.jit
def _take_sample(
    mass_ptr,
    sample_ptr,
    shares_ptr,
    columns,
    sample_size,
    threshold,
    SAMPLE_LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Of every columns / sample_size columns, take the heaviest that was left out."""
    lane = tl.arange(0, SAMPLE_LANES)
    heaviest = tl.zeros([SAMPLE_LANES], tl.float32)
    index = lane
    for start in range(0, columns, UNROLL * sample_size):
        for i in tl.static_range(UNROLL):
            cols = start + i * sample_size + lane
            mask = (lane < sample_size) & (cols < columns)
            mass = tl.load(mass_ptr + cols, mask=mask, other=0.0)
            mass = tl.where(_is_kept(mass, threshold), 0.0, mass)
            index = tl.where(mass > heaviest, cols, index)
            heaviest = tl.maximum(mass, heaviest)
    total = tl.sum(heaviest, axis=0)
    shares = heaviest / tl.where(total > 0.0, total, 1.0)
    tl.store(sample_ptr + lane, index.to(tl.int64), mask=lane < sample_size)
    tl.store(shares_ptr + lane, shares, mask=lane < sample_size)


@triton.jit
def _list_columns(
    mass_ptr,
    row_of_ptr,
    indices_ptr,
    rows_ptr,
    new_row_of_ptr,
    counts_ptr,
    masses_ptr,
    columns,
    threshold,
    total,
    begin,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """List the columns kept among UNROLL * LANES from begin on, behind those kept before them."""
    before = tl.zeros([LANES], tl.int32)  # columns kept that precede begin
    new_before = tl.zeros([LANES], tl.int32)
    old = tl.zeros([LANES], tl.int32)  # rows of earlier choices
    kept_count = tl.zeros([LANES], tl.int32)
    new_count = tl.zeros([LANES], tl.int32)
    left_out = tl.zeros([LANES], tl.float32)
    for start in range(0, columns, UNROLL * LANES):
        is_before = (start < begin).to(tl.int32)
        for i in tl.static_range(UNROLL):
            cols = start + i * LANES + tl.arange(0, LANES)
            mask = cols < columns
            mass = tl.load(mass_ptr + cols, mask=mask, other=0.0)
            row = tl.load(row_of_ptr + cols, mask=mask, other=-1)
            is_kept = _is_kept(mass, threshold)
            left_out += tl.where(is_kept, 0.0, mass)
            kept, new = is_kept.to(tl.int32), (is_kept & (row < 0)).to(tl.int32)
            old += (row >= 0).to(tl.int32)
            kept_count += kept
            new_count += new
            before += kept * is_before
            new_before += new * is_before
    if begin == 0:
        tl.store(counts_ptr, tl.sum(kept_count, axis=0).to(tl.int64))
        tl.store(counts_ptr + 1, tl.sum(new_count, axis=0).to(tl.int64))
        tl.store(masses_ptr, tl.sum(left_out, axis=0))
        tl.store(masses_ptr + 1, total)
    place = tl.sum(before, axis=0)
    new_row = tl.sum(old, axis=0) + tl.sum(new_before, axis=0)
    for start in range(begin, tl.minimum(begin + UNROLL * LANES, columns), LANES):
        cols = start + tl.arange(0, LANES)
        mask = cols < columns
        mass = tl.load(mass_ptr + cols, mask=mask, other=0.0)
        row = tl.load(row_of_ptr + cols, mask=mask, other=-1)
        is_kept = _is_kept(mass, threshold)
        is_new = is_kept & (row < 0)
        kept, new = is_kept.to(tl.int32), is_new.to(tl.int32)
        row = tl.where(is_new, (new_row + tl.cumsum(new, axis=0) - 1).to(tl.int64), row)
        at = place + tl.cumsum(kept, axis=0) - 1
        tl.store(indices_ptr + at, cols.to(tl.int64), mask=is_kept)
        tl.store(rows_ptr + at, row, mask=is_kept)
        tl.store(new_row_of_ptr + cols, row, mask=mask)
        place += tl.sum(kept, axis=0)
        new_row += tl.sum(new, axis=0)


@triton.jit
def choose_columns_kernel(
    mass_ptr,  # (columns,)
    row_of_ptr,  # (columns,): of earlier choices, -1 for none
    indices_ptr,  # (columns,), of which the first counts[0] are written
    rows_ptr,  # (columns,), the same
    new_row_of_ptr,  # (columns,)
    counts_ptr,  # (2,): columns kept, and those of them that are new
    masses_ptr,  # (2,): of the columns left out, and of all
    sample_ptr,  # (sample_size,)
    shares_ptr,  # (sample_size,)
    columns,
    tolerance,
    log2_columns,
    sample_size,
    STEPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    SAMPLE_LANES: tl.constexpr,
):
    """Choose columns as portable.choose_columns does; the last program takes the sample."""
    BLOCK: tl.constexpr = UNROLL * LANES
    program = tl.program_id(0)
    sums = tl.zeros([LANES], tl.float32)
    for start in range(0, columns, BLOCK):
        for i in tl.static_range(UNROLL):
            cols = start + i * LANES + tl.arange(0, LANES)
            sums += tl.load(mass_ptr + cols, mask=cols < columns, other=0.0)
    total = tl.sum(sums, axis=0)
    budget = tolerance * total
    threshold = tl.where(total - total == 0.0, budget / columns, 0.0)
    step = log2_columns
    k = tl.arange(0, 8)
    for _ in tl.static_range(ROUNDS):
        step /= STEPS
        tried = threshold * tl.exp2(step * k.to(tl.float32))
        below = _masses_below(mass_ptr, columns, tried, LANES, UNROLL)
        fits = (below <= budget) & (k < STEPS)
        threshold = tl.max(tl.where(fits, tried, 0.0), axis=0)

    if program == tl.num_programs(0) - 1:
        _take_sample(
            mass_ptr, sample_ptr, shares_ptr, columns, sample_size, threshold, SAMPLE_LANES, UNROLL
        )
    else:
        _list_columns(
            mass_ptr, row_of_ptr, indices_ptr, rows_ptr, new_row_of_ptr, counts_ptr, masses_ptr,
            columns, threshold, total, program * BLOCK, LANES, UNROLL,
        )  # fmt: skip
