"""Row kernels for GPUs: launches of the kernels in the triton_*.py files.

They take logits of 16 bits too, as entropy_from_logits has them.
"""

import math

import torch
import triton
from torch import Tensor

from ..reference import RowParts, RowTransform, TokenStats
from ..reference_divergence import DivergenceTerms
from . import portable
from .configs import RowConfig, config_for
from .portable import ROUNDS, STEPS, ColumnChoice, FinishedRows
from .triton_columns import choose_columns_kernel, column_mass_kernel
from .triton_divergence import divergence_gradient_kernel, divergence_sums_kernel
from .triton_finish import finish_rows_kernel, gradient_factors_kernel
from .triton_kernels import column_gradient_kernel, row_gradient_kernel, row_statistics_kernel

MIN_SPLIT_BLOCKS = 4  # per part of a row: the merge (7) is then little work
MIN_SPLIT_ROWS = 32  # per part of a column: partial masses are then at most 1/32 of the logits
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}
FINISH = {"BLOCK_N": 128, "num_warps": 4, **OPTIONS}
# 512 threads, which on AMD are 1024. The 8 sums of a lane take 32 registers of a thread.
CHOOSE = {"STEPS": STEPS, "ROUNDS": ROUNDS, "LANES": 2048, "UNROLL": 4, "num_warps": 16, **OPTIONS}


def row_statistics(
    y: Tensor, row: RowTransform, with_collision_and_argmax: bool = True
) -> RowParts:
    """Compute (1); with_collision_and_argmax adds argmax and the sums of (5) and (6)."""
    rows, columns = y.shape
    if columns == 0 or rows == 0:
        return portable.row_statistics(y, row)
    config = config_for(_capability(y))
    settings = statistics_settings(config, y.dtype, _is_aligned(y))
    block_v = settings["UNROLL"] * settings["LANES"] * settings["VECTOR"]
    programs = config.warps_per_sm // config.statistics_warps * _sm_count(y)
    splits = _splits(rows, -(-columns // block_v) // MIN_SPLIT_BLOCKS, programs)
    split_length = -(-columns // (splits * block_v)) * block_v
    splits = -(-columns // split_length)
    parts = torch.empty(splits, 6, rows, dtype=torch.float32, device=y.device)
    argmax_rows = rows if with_collision_and_argmax else 0
    argmax = torch.empty(splits, argmax_rows, dtype=torch.int64, device=y.device)
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
            WITH_COLLISION_AND_ARGMAX=with_collision_and_argmax,
            **_flags(row),
            **settings,
        )
    if with_collision_and_argmax:
        return RowParts._make([*parts.unbind(1), argmax])
    return RowParts._make([*parts[:, :4].unbind(1), None, None, None])


def finish_rows(parts: RowParts, vocab_size: int, targets: Tensor | None) -> FinishedRows:
    """Merge the parts and compute (2) to (6)."""
    count, rows = parts.m.shape
    with_argmax = parts.argmax is not None
    stats = torch.empty(7, rows, dtype=torch.float32, device=parts.m.device)
    argmax = torch.empty(rows if with_argmax else 0, dtype=torch.int64, device=stats.device)
    if rows > 0:
        floats = [parts.m if field is None else field for field in parts[:6]]
        if len({field.stride() for field in floats}) > 1 or parts.m.stride(1) != 1:
            floats = [field.contiguous() for field in floats]
        found = argmax if parts.argmax is None else parts.argmax.contiguous()
        with torch.cuda.device_of(stats):
            finish_rows_kernel[(triton.cdiv(rows, FINISH["BLOCK_N"]),)](
                *floats,
                floats[0].stride(0),
                found,
                rows,
                stats if targets is None else targets.contiguous(),
                stats,
                argmax,
                count,
                rows,
                float(vocab_size),
                HAS_TARGETS=targets is not None,
                WITH_COLLISION_AND_ARGMAX=with_argmax,
                **FINISH,
            )
    m, log_s, entropy, logprob, logsumexp, mean_logit, log_collision = stats
    found_stats = TokenStats(entropy, logprob if targets is not None else None, logsumexp)
    if with_argmax:
        found_stats = TokenStats(*found_stats[:3], mean_logit, log_collision, argmax)
    return FinishedRows(found_stats, m, log_s)


def gradient_factors(rows: FinishedRows, upstream: TokenStats, vocab_size: int) -> Tensor:
    """Compute the per-row terms of (8)."""
    stats, m = rows.stats, rows.m.contiguous()
    per_row = torch.empty(8, len(m), dtype=torch.float32, device=m.device)
    if len(m) > 0:
        values = (stats.entropy, stats.logprob, stats.log_collision)
        with torch.cuda.device_of(m):
            gradient_factors_kernel[(triton.cdiv(len(m), FINISH["BLOCK_N"]),)](
                m,
                rows.log_s.contiguous(),
                *(m if x is None else x.contiguous() for x in values),
                *(None if g is None else g.float().contiguous() for g in upstream[:5]),
                per_row,
                len(m),
                float(vocab_size),
                **FINISH,
            )
    return per_row


def row_gradient(y: Tensor, row: RowTransform, per_row: Tensor, out: Tensor) -> None:
    """Write dy (8) into out."""
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
            per_row,
            rows,
            columns,
            *_scalars(row),
            **_flags(row),
            **settings,
        )


def column_mass(y: Tensor, row: RowTransform, per_row: Tensor) -> tuple[Tensor, Tensor]:
    """Sum |dy| over the rows and dy over the columns."""
    rows, columns = y.shape
    if columns == 0 or rows == 0:
        return per_row.new_zeros(columns), per_row.new_zeros(rows)
    config = config_for(_capability(y))
    settings = mass_settings(config, y.dtype, _is_aligned(y))
    narrow = settings["LANES"] * settings["VECTOR"]
    block_v = settings["UNROLL"] * narrow
    blocks = columns // block_v + triton.cdiv(columns % block_v, narrow)
    splits = _splits(blocks, rows // MIN_SPLIT_ROWS, config.warps_per_sm * _sm_count(y))
    split_rows = triton.cdiv(rows, splits)
    splits = triton.cdiv(rows, split_rows)
    mass = torch.empty(splits, columns, dtype=torch.float32, device=y.device)
    row_sums = torch.empty(blocks, rows, dtype=torch.float32, device=y.device)
    with torch.cuda.device_of(y):
        column_mass_kernel[(blocks, splits)](
            y,
            y.stride(0),
            *_vectors(row, y),
            per_row,
            mass,
            row_sums,
            rows,
            columns,
            split_rows,
            *_scalars(row),
            **_flags(row),
            **settings,
        )
    return mass.sum(0), row_sums.sum(0)


def choose_columns(
    mass: Tensor, row_of: Tensor, tolerance: float, sample_size: int, sample_dtype: torch.dtype
) -> ColumnChoice:
    """Choose the heaviest columns."""
    columns = len(mass)
    if columns == 0:
        return portable.choose_columns(mass, row_of, tolerance, sample_size, sample_dtype)
    sample_size = min(sample_size, columns)
    choice = ColumnChoice(
        vocab_indices=torch.empty_like(row_of),
        dweight_rows=torch.empty_like(row_of),
        row_of=torch.empty_like(row_of),
        counts=row_of.new_empty(2),
        masses=mass.new_empty(2),
        sample=row_of.new_empty(sample_size),
        shares=mass.new_empty(1, sample_size, dtype=sample_dtype),
    )
    with torch.cuda.device_of(mass):
        choose_columns_kernel[(triton.cdiv(columns, CHOOSE["UNROLL"] * CHOOSE["LANES"]) + 1,)](
            mass,
            row_of,
            *choice,
            columns,
            tolerance,
            math.log2(columns),
            sample_size,
            SAMPLE_LANES=triton.next_power_of_2(sample_size),
            **CHOOSE,
        )
    return choice


def gradient_of_columns(
    y: Tensor,
    row: RowTransform,
    per_row: Tensor,
    vocab_indices: Tensor,
    dtype: torch.dtype,
    residual: Tensor,
) -> Tensor:
    """Return dy (8) of these columns; subtract its row sums from residual."""
    rows, count = len(y), len(vocab_indices)
    stride = triton.cdiv(count, 16) * 16  # which a GEMM reads fast
    out = torch.empty(rows, stride, dtype=dtype, device=y.device)[:, :count]
    if rows == 0 or count == 0:
        return out
    settings = gradient_settings(config_for(_capability(y)), rows_too=False)
    with torch.cuda.device_of(y):
        column_gradient_kernel[(rows,)](
            y,
            y.stride(0),
            out,
            out.stride(0),
            *_vectors(row, y),
            per_row,
            vocab_indices,
            residual,
            rows,
            count,
            *_scalars(row),
            **_flags(row),
            **settings,
        )
    return out


def divergence_sums(terms: DivergenceTerms) -> Tensor:
    """Sum (10), and c of (11)."""
    y, row, ref_y, ref_row, per_row, beta = terms
    rows, columns = y.shape
    if columns == 0 or rows == 0:
        return per_row.new_zeros(2, rows)
    config = config_for(_capability(y))
    settings = gradient_settings(config, rows_too=False)
    block_v = settings["BLOCK_V"]
    programs = config.warps_per_sm // config.gradient_warps * _sm_count(y)
    splits = _splits(rows, triton.cdiv(columns, block_v) // MIN_SPLIT_BLOCKS, programs)
    split_length = triton.cdiv(columns, splits * block_v) * block_v
    splits = triton.cdiv(columns, split_length)
    sums = torch.empty(splits, 2, rows, dtype=torch.float32, device=y.device)
    with torch.cuda.device_of(y):
        divergence_sums_kernel[(rows, splits)](
            *_pair(y, row, ref_y, ref_row),
            per_row,
            sums,
            rows,
            columns,
            split_length,
            *_pair_scalars(row, ref_row, beta),
            **_pair_flags(row, ref_row, beta),
            **settings,
        )
    return sums.sum(0)


def divergence_gradient(terms: DivergenceTerms, out: Tensor) -> None:
    """Write dy of (11) into out."""
    y, row, ref_y, ref_row, per_row, beta = terms
    rows, columns = y.shape
    if columns == 0 or rows == 0:
        return
    settings = gradient_settings(config_for(_capability(y)), rows_too=False)
    with torch.cuda.device_of(y):
        divergence_gradient_kernel[(rows * triton.cdiv(columns, settings["BLOCK_V"]),)](
            *_pair(y, row, ref_y, ref_row),
            per_row,
            out,
            out.stride(0),
            rows,
            columns,
            *_pair_scalars(row, ref_row, beta),
            **_pair_flags(row, ref_row, beta),
            **settings,
        )


def statistics_settings(config: RowConfig, dtype: torch.dtype, aligned: bool) -> dict:
    """Return the constants and compiler options of a statistics launch."""
    return _lane_settings(config.statistics_warps, config.THREAD_V, dtype, aligned)


def mass_settings(config: RowConfig, dtype: torch.dtype, aligned: bool) -> dict:
    """Return the constants and compiler options of a column-mass launch.

    It has one warp per program, in which a row's sum needs no barrier.
    """
    return _lane_settings(1, config.THREAD_V, dtype, aligned)


def _lane_settings(warps: int, thread_v: int, dtype: torch.dtype, aligned: bool) -> dict:
    vector = 16 // dtype.itemsize if aligned else 1  # a thread loads 16 bytes at once
    return {
        "LANES": 32 * warps,
        "VECTOR": vector,
        "UNROLL": max(1, thread_v // vector),
        "num_warps": warps,
        **OPTIONS,
    }


def gradient_settings(config: RowConfig, rows_too: bool = True) -> dict:
    """Return the constants and compiler options of a gradient launch, over all columns or some."""
    blocks = {"BLOCK_N": config.BLOCK_N} if rows_too else {}
    return {**blocks, "BLOCK_V": config.BLOCK_V, "num_warps": config.gradient_warps, **OPTIONS}


def _is_aligned(y: Tensor) -> bool:
    """Return True if every row starts at an address that allows vector loads."""
    return y.data_ptr() % 16 == 0 and y.stride(0) % 16 == 0


def _vectors(row: RowTransform, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return bias, 1 / temperature and targets.

    Where there is no bias, or are no targets, y stands in and is never read.
    """
    bias = y if row.bias is None else row.bias.contiguous()
    targets = y if row.targets is None else row.targets.contiguous()
    return bias, row.inv_temperature.contiguous(), targets


def _scalars(row: RowTransform) -> tuple[float, float]:
    return float(row.logit_scale), 1.0 if row.softcap is None else float(row.softcap)


def _flags(row: RowTransform) -> dict[str, bool]:
    return {
        "HAS_BIAS": row.bias is not None,
        "HAS_SOFTCAP": row.softcap is not None,
        "HAS_TARGETS": row.targets is not None,
    }


def _pair(y: Tensor, row: RowTransform, ref_y: Tensor, ref_row: RowTransform) -> tuple:
    bias, inv_temperature, _ = _vectors(row, y)
    return y, y.stride(0), bias, ref_y, ref_y.stride(0), _vectors(ref_row, y)[0], inv_temperature


def _pair_scalars(row: RowTransform, ref_row: RowTransform, beta: float) -> tuple[float, ...]:
    return *_scalars(row), *_scalars(ref_row), float(beta), 1.0 - beta


def _pair_flags(row: RowTransform, ref_row: RowTransform, beta: float) -> dict[str, int | bool]:
    return {
        "KIND": {0.0: 0, 1.0: 1}.get(float(beta), 2),
        "HAS_BIAS": row.bias is not None,
        "HAS_SOFTCAP": row.softcap is not None,
        "REF_HAS_BIAS": ref_row.bias is not None,
        "REF_HAS_SOFTCAP": ref_row.softcap is not None,
    }


def _splits(blocks: int, limit: int, programs: int) -> int:
    """Return into how many parts to split each block so that few blocks keep the GPU busy."""
    return max(1, min(triton.cdiv(programs, blocks), limit))


def _capability(y: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(y.device) if y.is_cuda else (0, 0)


def _sm_count(y: Tensor) -> int:
    return torch.cuda.get_device_properties(y.device).multi_processor_count if y.is_cuda else 1
