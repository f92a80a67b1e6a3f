"""Triton kernels over few values per row: statistics from their parts, factors of the gradient.

Launches cost more than this work, so each is one kernel.
"""

import triton
import triton.language as tl

from .triton_kernels import _merge, _tanh_and_slope


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
