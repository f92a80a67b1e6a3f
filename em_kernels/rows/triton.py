"""Row kernels in Triton for GPUs: equations (1)-(8) of reference.py, one read of the logits each.

The statistics keep a running (1) in every thread, over the columns that this thread loads, and meet
by (7) only at the row's end: no thread waits for another inside the loop. Floating-point fusion is
off: z - m must be that of the rounded z, of which m is one, or a sure token's entropy is noise.
Logits of 16 bits are taken too (entropy of logits that exist).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import Coefficients, RowParts, RowTransform
from .configs import RowConfig, config_for

# e^-150 is 0 in fp32, and no infinity comes near a product
MIN_EXPONENT = tl.constexpr(-150.0)
LOG2_E = tl.constexpr(1.4426950408889634)
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


@triton.jit
def _exp(x):
    """e^x; results below 1e-38 are 0, which saves tl.exp's three instructions for them."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _tanh_and_slope(x):
    """tanh x and 1 - tanh^2 x, both to a few ulp."""
    size = tl.abs(x)
    square = x * x
    # minimax (Remez) of tanh on |x| <= 0.7, relative error 1.5e-8
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
def _transform(v, inv_temperature, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z, and the slope dc/du, of logits with their bias; the scalars meet before the logits."""
    if HAS_SOFTCAP:
        value, slope = _tanh_and_slope(v * (logit_scale / softcap))
        z = value * (softcap * inv_temperature)
    else:
        z = v * (logit_scale * inv_temperature)
        slope = 1.0
    return tl.where(v == -float("inf"), -float("inf"), z), slope


@triton.jit
def _merge(m_a, s_a, t_a, q_a, i_a, m_b, s_b, t_b, q_b, i_b):
    """Equation (7); s and q without the argmax's own 1, ties to the lowest index."""
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
    EVERYTHING: tl.constexpr,
):
    """Every lane's running (1) with these columns added."""
    m, s, t, q, total, argmax = state
    mask_v = (cols < columns) | IS_WHOLE
    v = _logits(y_row + cols, mask_v, bias_ptr + cols, mask_v, HAS_BIAS)
    z, _ = _transform(v, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
    total += tl.sum(tl.sum(tl.where(mask_v, z, 0.0), axis=2), axis=0)

    new_m = tl.maximum(m, tl.max(tl.max(z, axis=2), axis=0))  # (LANES,)
    origin = tl.where(new_m == -float("inf"), 0.0, new_m)
    is_max = z == origin[None, :, None]
    is_max_1 = is_max.to(tl.float32)
    d = tl.maximum(z - origin[None, :, None], MIN_EXPONENT)
    e = _exp(d) - is_max_1  # without the maxima, which are counted: e^0 is exactly 1
    ties = tl.sum(tl.sum(is_max_1, axis=2), axis=0)
    is_higher = new_m > m
    own = tl.where(is_higher, 1.0, 0.0)  # the old maximum joins the sums, a new one leaves them
    shift = tl.where(is_higher, tl.maximum(m - origin, MIN_EXPONENT), 0.0)
    r = _exp(shift)
    t = r * (t + (1.0 + s) * shift) + tl.sum(tl.sum(e * d, axis=2), axis=0)
    s = r * (s + own) + tl.sum(tl.sum(e, axis=2), axis=0) + (ties - own)
    if EVERYTHING:
        q = r * r * (q + own) + tl.sum(tl.sum(e * e, axis=2), axis=0) + (ties - own)
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
    EVERYTHING: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    BLOCK_V: tl.constexpr = UNROLL * LANES * VECTOR
    y_row = y_ptr + row * stride_yn
    inv_temperature = tl.load(inv_temperature_ptr + row)
    target = tl.load(targets_ptr + row)

    # (UNROLL, LANES, VECTOR): a lane is a thread, which loads VECTOR neighbours in one instruction
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
            True, HAS_BIAS, HAS_SOFTCAP, EVERYTHING,
        )  # fmt: skip
    if whole_end < end:
        state = _add_block(
            state, y_row, bias_ptr, whole_end + offs_v, columns, inv_temperature, logit_scale,
            softcap, False, HAS_BIAS, HAS_SOFTCAP, EVERYTHING,
        )  # fmt: skip

    m, s, t, q, total, argmax = state
    m, s, t, q, argmax = tl.reduce((m, s, t, q, argmax), 0, _merge)
    total = tl.sum(total, axis=0)
    is_here = (target >= begin) & (target < end)
    v = _logits(y_row + target, is_here, bias_ptr + target, is_here, HAS_BIAS)
    target_logit, _ = _transform(v, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
    is_broken = (total != total) | (m == float("inf"))
    m = tl.where(is_broken, float("nan"), m)
    parts = parts_ptr + split * 6 * rows + row
    tl.store(parts, m)
    tl.store(parts + rows, s)
    tl.store(parts + 2 * rows, t)
    tl.store(parts + 3 * rows, target_logit)
    if EVERYTHING:
        tl.store(parts + 4 * rows, q)
        tl.store(parts + 5 * rows, total)
        tl.store(argmax_ptr + split * rows + row, argmax.to(tl.int64))


@triton.jit
def _gradient_block(
    y_ptrs,  # (BLOCK_N, BLOCK_V), as out_ptrs
    out_ptrs,
    bias_ptr,
    inv_temperature_ptr,
    targets_ptr,
    per_row_ptr,
    offs_n,
    offs_v,
    rows,
    columns,
    logit_scale,
    softcap,
    IS_WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    mask_n = offs_n < rows
    mask_v = ((offs_v < columns) | IS_WHOLE)[None, :]
    mask = mask_n[:, None] & mask_v
    inv_temperature = tl.load(inv_temperature_ptr + offs_n, mask=mask_n)[:, None]
    target = tl.load(targets_ptr + offs_n, mask=mask_n)[:, None]
    m = tl.load(per_row_ptr + offs_n, mask=mask_n)[:, None]
    log_s = tl.load(per_row_ptr + rows + offs_n, mask=mask_n)[:, None]
    alpha = tl.load(per_row_ptr + 2 * rows + offs_n, mask=mask_n)[:, None]
    beta = tl.load(per_row_ptr + 3 * rows + offs_n, mask=mask_n)[:, None]
    gamma = tl.load(per_row_ptr + 4 * rows + offs_n, mask=mask_n)[:, None]
    delta = tl.load(per_row_ptr + 5 * rows + offs_n, mask=mask_n)[:, None]
    rho = tl.load(per_row_ptr + 6 * rows + offs_n, mask=mask_n)[:, None]
    at_target = tl.load(per_row_ptr + 7 * rows + offs_n, mask=mask_n)[:, None]

    v = _logits(y_ptrs, mask, bias_ptr + offs_v[None, :], mask_v, HAS_BIAS)
    z, slope = _transform(v, inv_temperature, logit_scale, softcap, HAS_SOFTCAP)
    log_p = (z - m) - log_s
    p = _exp(log_p)
    own = tl.where(offs_v[None, :] == target, at_target, -gamma * p)
    dz = p * (alpha + beta * log_p + rho * p) + own + delta
    dy = dz * (inv_temperature * logit_scale) * slope
    nan_unless_finite = (m - m) + (log_s - log_s)
    dy = tl.where(z == -float("inf"), 0.0, dy) + nan_unless_finite
    tl.store(out_ptrs, dy, mask=mask)


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
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks_v = tl.cdiv(columns, BLOCK_V)
    block = tl.program_id(0)
    first_v = (block % blocks_v) * BLOCK_V
    offs_n = (block // blocks_v) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = first_v + tl.arange(0, BLOCK_V)
    rows_n = offs_n.to(tl.int64)[:, None]
    y_ptrs = y_ptr + rows_n * stride_yn + offs_v[None, :]
    out_ptrs = out_ptr + rows_n * stride_on + offs_v[None, :]
    if first_v + BLOCK_V <= columns:
        _gradient_block(
            y_ptrs, out_ptrs, bias_ptr, inv_temperature_ptr, targets_ptr, per_row_ptr, offs_n,
            offs_v, rows, columns, logit_scale, softcap, True, HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
    else:
        _gradient_block(
            y_ptrs, out_ptrs, bias_ptr, inv_temperature_ptr, targets_ptr, per_row_ptr, offs_n,
            offs_v, rows, columns, logit_scale, softcap, False, HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip


def row_statistics(y: Tensor, row: RowTransform, everything: bool = True) -> RowParts:
    """Equation (1), and with everything argmax and the sums of (5) and (6)."""
    rows, columns = y.shape
    if columns == 0 or rows == 0:
        return reference.row_parts(y, row.targets)
    config = config_for(_capability(y))
    settings = statistics_settings(config, y.dtype, _is_aligned(y))
    block_v = settings["UNROLL"] * settings["LANES"] * settings["VECTOR"]
    splits = _splits(rows, -(-columns // block_v), config.programs_per_sm * _sm_count(y))
    split_length = -(-columns // (splits * block_v)) * block_v
    splits = -(-columns // split_length)
    parts = torch.empty(splits, 6, rows, dtype=torch.float32, device=y.device)
    argmax = torch.empty(splits, rows if everything else 0, dtype=torch.int64, device=y.device)
    with torch.cuda.device_of(y):
        row_statistics_kernel[(rows, splits)](
            y,
            y.stride(0),
            *_vectors(row, y),
            parts,
            argmax,
            rows,
            columns,
            split_length,
            *_scalars(row),
            EVERYTHING=everything,
            **_flags(row),
            **settings,
        )
    found = [
        RowParts._make([*part, index] if everything else [*part[:4], None, None, None])
        for part, index in zip(parts, argmax, strict=True)
    ]
    return found[0] if splits == 1 else reference.merge(found)


def row_gradient(
    y: Tensor, row: RowTransform, m: Tensor, log_s: Tensor, factors: Coefficients, out: Tensor
) -> None:
    """Equation (8)."""
    rows, columns = y.shape
    if columns == 0 or rows == 0:
        return
    settings = gradient_settings(config_for(_capability(y)))
    grid = triton.cdiv(rows, settings["BLOCK_N"]) * triton.cdiv(columns, settings["BLOCK_V"])
    with torch.cuda.device_of(y):
        row_gradient_kernel[(grid,)](
            y,
            y.stride(0),
            out,
            out.stride(0),
            *_vectors(row, y),
            torch.stack([m, log_s, *factors]),
            rows,
            columns,
            *_scalars(row),
            **_flags(row),
            **settings,
        )


def statistics_settings(config: RowConfig, dtype: torch.dtype, aligned: bool) -> dict:
    """Constants and compiler options of a statistics launch; the compile report has them too."""
    vector = 16 // dtype.itemsize if aligned else 1  # one load of 16 bytes
    return {
        "LANES": 32 * config.statistics_warps,
        "VECTOR": vector,
        "UNROLL": max(1, config.THREAD_V // vector),
        "num_warps": config.statistics_warps,
        **OPTIONS,
    }


def gradient_settings(config: RowConfig) -> dict:
    """Those of a gradient launch."""
    return {
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_V": config.BLOCK_V,
        "num_warps": config.gradient_warps,
        **OPTIONS,
    }


def _is_aligned(y: Tensor) -> bool:
    """Whether every row begins where Triton knows that vector loads can."""
    return y.data_ptr() % 16 == 0 and y.stride(0) % 16 == 0


def _vectors(row: RowTransform, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bias, 1 / temperature, targets; a bias that is not there is never read, such targets match
    nothing.
    """
    targets = row.targets
    if targets is None:
        targets = torch.full(y.shape[:1], -1, dtype=torch.int64, device=y.device)
    bias = y if row.bias is None else row.bias.contiguous()
    return bias, row.inv_temperature.contiguous(), targets.contiguous()


def _scalars(row: RowTransform) -> tuple[float, float]:
    return float(row.logit_scale), 1.0 if row.softcap is None else float(row.softcap)


def _flags(row: RowTransform) -> dict[str, bool]:
    return {"HAS_BIAS": row.bias is not None, "HAS_SOFTCAP": row.softcap is not None}


def _splits(rows: int, blocks: int, programs: int) -> int:
    """Parts of a row, so that few rows keep the whole GPU busy; at least 4 blocks in each."""
    return max(1, min(-(-programs // rows), blocks // 4))


def _capability(y: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(y.device) if y.is_cuda else (0, 0)


def _sm_count(y: Tensor) -> int:
    return torch.cuda.get_device_properties(y.device).multi_processor_count if y.is_cuda else 1
