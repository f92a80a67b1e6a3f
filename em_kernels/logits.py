"""Entropy of logits that exist, and its gradient: some rows at a time in the accumulation dtype."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference
from .checks import check_values
from .chunked import Transform, inv_temperature
from .gemm import accumulation_dtype
from .reference import TokenStats
from .rows import kernels_for

BLOCK_BYTES = 16 << 20  # of rows in the accumulation dtype


def entropy(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy (N,), and for the backward m and log s (N,), of logits (N, V)."""
    check_values(None, temperature, None, 0, True)
    wide = accumulation_dtype(logits.dtype)
    found = logits.new_empty(3, len(logits), dtype=wide)
    for rows in _blocks(logits):
        y = logits[rows].to(wide).contiguous()
        tau = inv_temperature(Transform(temperature=temperature), rows, y)
        parts = kernels_for(y).row_statistics(y, None, tau, 1.0, None, None)
        stats = reference.statistics(parts, logits.shape[1])
        assert stats.entropy is not None
        found[:, rows] = torch.stack([stats.entropy, parts.m, torch.log1p(parts.s1)])
    return found[0].clone(), found[1].clone(), found[2].clone()


def entropy_backward(
    upstream: Tensor,
    found: Tensor,
    m: Tensor,
    log_s: Tensor,
    logits: Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """dlogits (N, V), in the logits' dtype."""
    gradient = torch.empty_like(logits)
    for rows in _blocks(logits):
        y = logits[rows].to(found.dtype, copy=True).contiguous()
        tau = inv_temperature(Transform(temperature=temperature), rows, y)
        stats = TokenStats(entropy=found[rows], log_collision=torch.zeros_like(found[rows]))
        factors = reference.coefficients(
            stats, TokenStats(entropy=upstream[rows].to(y.dtype)), logits.shape[1]
        )
        gradient[rows] = kernels_for(y).row_gradient(
            y, None, tau, 1.0, None, None, m[rows], log_s[rows], factors
        )
    return gradient


def _blocks(logits: Tensor) -> Iterator[slice]:
    row_bytes = accumulation_dtype(logits.dtype).itemsize * max(1, logits.shape[1])
    length = max(1, BLOCK_BYTES // row_bytes)
    return (slice(start, start + length) for start in range(0, len(logits), length))
