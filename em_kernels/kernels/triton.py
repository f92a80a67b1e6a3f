"""Row kernels for GPUs: launches of triton_kernels.py.

They take logits of 16 bits too, as entropy_from_logits has them.
"""

import torch
import triton
from torch import Tensor

from .. import reference
from ..reference import Coefficients, RowParts, RowTransform
from .configs import RowConfig, config_for
from .triton_kernels import column_mass_kernel, row_gradient_kernel, row_statistics_kernel

MIN_SPLIT_BLOCKS = 4  # per part of a row: the merge (7) is then little work
MIN_SPLIT_ROWS = 32  # per part of a column: partial masses are then at most 1/32 of the logits
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


def row_statistics(
    y: Tensor, row: RowTransform, with_collision_and_argmax: bool = True
) -> RowParts:
    """Compute (1); with_collision_and_argmax adds argmax and the sums of (5) and (6)."""
    rows, columns = y.shape
    if columns == 0 or rows == 0:
        return reference.row_parts(y, row.targets)
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
        by_split = [
            RowParts._make([*part, index]) for part, index in zip(parts, argmax, strict=True)
        ]
    else:
        by_split = [RowParts(*part[:4]) for part in parts]
    return by_split[0] if splits == 1 else reference.merge(by_split)


def row_gradient(
    y: Tensor, row: RowTransform, m: Tensor, log_s: Tensor, factors: Coefficients, out: Tensor
) -> None:
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
            torch.stack([m, log_s, *factors]),
            rows,
            columns,
            *_scalars(row),
            **_flags(row),
            **settings,
        )


def column_mass(
    y: Tensor, row: RowTransform, m: Tensor, log_s: Tensor, factors: Coefficients
) -> tuple[Tensor, Tensor]:
    """Sum |dy| over the rows and dy over the columns."""
    rows, columns = y.shape
    if columns == 0 or rows == 0:
        return m.new_zeros(columns), m.new_zeros(rows)
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
            torch.stack([m, log_s, *factors]),
            mass,
            row_sums,
            rows,
            columns,
            split_rows,
            *_scalars(row),
            HAS_TARGETS=row.targets is not None,
            **_flags(row),
            **settings,
        )
    return mass.sum(0), row_sums.sum(0)


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


def gradient_settings(config: RowConfig) -> dict:
    """Return the constants and compiler options of a gradient launch."""
    return {
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_V": config.BLOCK_V,
        "num_warps": config.gradient_warps,
        **OPTIONS,
    }


def _is_aligned(y: Tensor) -> bool:
    """Return True if every row starts at an address that allows vector loads."""
    return y.data_ptr() % 16 == 0 and y.stride(0) % 16 == 0


def _vectors(row: RowTransform, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return bias, 1 / temperature and targets.

    Where there is no bias, y stands in and is never read; where there are no targets, -1 matches
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


def _splits(blocks: int, limit: int, programs: int) -> int:
    """Return into how many parts to split each block so that few blocks keep the GPU busy."""
    return max(1, min(triton.cdiv(programs, blocks), limit))


def _capability(y: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(y.device) if y.is_cuda else (0, 0)


def _sm_count(y: Tensor) -> int:
    return torch.cuda.get_device_properties(y.device).multi_processor_count if y.is_cuda else 1
