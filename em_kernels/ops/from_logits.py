"""Entropy of logits that exist, and its gradient: some rows at a time in the accumulation dtype."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import kernels, reference
from ..kernels import RowTerms
from ..reference import RowTransform, TokenStats
from .checks import check_values
from .gemm import accumulation_dtype
from .inputs import inv_temperature

BLOCK_BYTES = 16 << 20  # of rows in the accumulation dtype


def entropy(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy (N,), and for the backward m and log s (N,), of logits (N, V)."""
    check_values(None, temperature, None, 0, True)
    found, m, log_s = logits.new_empty(3, len(logits), dtype=accumulation_dtype(logits.dtype))
    for block, y, row in _blocks(logits, temperature):
        parts = kernels.row_statistics(y, row, everything=False)
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
    gradient = logits.new_empty(logits.shape)
    for block, y, row in _blocks(logits, temperature):
        stats, up = TokenStats(entropy[block]), TokenStats(upstream[block].to(entropy.dtype))
        factors = reference.coefficients(stats, up, logits.shape[1])
        kernels.row_gradient(RowTerms(y, row, m[block], log_s[block], factors), gradient[block])
    return gradient


def _blocks(
    logits: Tensor, temperature: float | Tensor
) -> Iterator[tuple[slice, Tensor, RowTransform]]:
    """Rows as the kernels take them: on a GPU all at once, as they are."""
    wide = accumulation_dtype(logits.dtype)
    whole = logits.is_cuda and logits.stride(1) == 1
    row_bytes = wide.itemsize * max(1, logits.shape[1])
    length = max(1, len(logits) if whole else BLOCK_BYTES // row_bytes)
    for start in range(0, len(logits), length):
        block = slice(start, start + length)
        y = logits[block] if whole else logits[block].to(wide).contiguous()
        tau = inv_temperature(temperature, block, logits[block, :0].to(wide))
        yield block, y, RowTransform(None, tau)
