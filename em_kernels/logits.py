"""Entropy of logits that exist, and its gradient: some rows at a time in the accumulation dtype."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference, rows
from .checks import check_values
from .gemm import accumulation_dtype
from .problem import inv_temperature
from .reference import RowTransform, TokenStats

BLOCK_BYTES = 16 << 20  # of rows in the accumulation dtype


def entropy(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy (N,), and for the backward m and log s (N,), of logits (N, V)."""
    check_values(None, temperature, None, 0, True)
    wide = accumulation_dtype(logits.dtype)
    found, m, log_s = logits.new_empty(3, len(logits), dtype=wide)
    for block in _blocks(logits):
        y = logits[block].to(wide).contiguous()
        row = RowTransform(None, inv_temperature(temperature, block, y))
        parts = rows.row_statistics(y, row, everything=False)
        found[block] = reference.statistics(parts, logits.shape[1]).entropy
        m[block], log_s[block] = parts.m, torch.log1p(parts.s1)
    return found.clone(), m.clone(), log_s.clone()


def entropy_backward(
    upstream: Tensor,
    entropy: Tensor,
    m: Tensor,
    log_s: Tensor,
    logits: Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """dlogits (N, V), in the logits' dtype."""
    gradient = torch.empty_like(logits)
    for block in _blocks(logits):
        y = logits[block].to(entropy.dtype, copy=True).contiguous()
        gradient[block] = rows.row_gradient(
            y,
            RowTransform(None, inv_temperature(temperature, block, y)),
            m[block],
            log_s[block],
            TokenStats(entropy[block]),
            TokenStats(upstream[block].to(y.dtype)),
            logits.shape[1],
            y.dtype,
        )
    return gradient


def _blocks(logits: Tensor) -> Iterator[slice]:
    row_bytes = accumulation_dtype(logits.dtype).itemsize * max(1, logits.shape[1])
    length = max(1, BLOCK_BYTES // row_bytes)
    return (slice(start, start + length) for start in range(0, len(logits), length))
