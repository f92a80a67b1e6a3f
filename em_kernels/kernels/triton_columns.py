"""Triton kernels over the vocabulary's columns: their mass, and which of them are kept.

Masses: a program is one warp, which owns columns and walks down rows. Masses stay in registers, a
row's sum is five shuffles, and nothing waits for another warp.

The choice is one kernel, as launches would cost more than its work: every program finds the
threshold for itself rather than wait for others.
"""

import triton
import triton.language as tl

from .triton_kernels import _gradient, _row_scalars


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
    """Take a sample of the columns left out: the heaviest of every columns / sample_size."""
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
