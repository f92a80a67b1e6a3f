"""Entropy of logits that already exist, and its gradient, for some rows at a time."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .. import kernels
from ..kernels import FinishedRows, RowTerms
from ..reference import RowTransform, TokenStats
from .checks import check_values
from .gemm import accumulation_dtype
from .inputs import inv_temperature

BLOCK_BYTES = 16 << 20  # for a block of rows in the accumulation dtype


class LogitsEntropy(NamedTuple):
    """Entropy of each row, and what the backward needs beside it; every field is (N,)."""

    entropy: Tensor
    m: Tensor
    log_s: Tensor


def entropy(logits: Tensor, temperature: float | Tensor) -> LogitsEntropy:
    """Compute the entropy of logits (N, V)."""
    check_values(None, temperature, None, 0, True)
    dtype = accumulation_dtype(logits.dtype)
    result = LogitsEntropy(*(logits.new_empty(len(logits), dtype=dtype) for _ in range(3)))
    for block, y, row in _blocks(logits, temperature):
        parts = kernels.row_statistics(y, row, with_collision_and_argmax=False)
        stats, m, log_s = kernels.finish_rows(parts, logits.shape[1], None)
        assert stats.entropy is not None
        result.entropy[block], result.m[block], result.log_s[block] = stats.entropy, m, log_s
    return result


def entropy_backward(
    upstream: Tensor, forward: LogitsEntropy, logits: Tensor, temperature: float | Tensor
) -> Tensor:
    """Return dlogits (N, V) in the logits' dtype."""
    gradient = logits.new_empty(logits.shape)
    for block, y, row in _blocks(logits, temperature):
        entropy, m, log_s = (field[block] for field in forward)
        finished = FinishedRows(TokenStats(entropy), m, log_s)
        upstream_of_block = TokenStats(upstream[block].to(entropy.dtype))
        per_row = kernels.gradient_factors(finished, upstream_of_block, logits.shape[1])
        kernels.row_gradient(RowTerms(y, row, per_row), gradient[block])
    return gradient


def _blocks(
    logits: Tensor, temperature: float | Tensor
) -> Iterator[tuple[slice, Tensor, RowTransform]]:
    """Yield blocks of rows as the kernels take them; a GPU takes all at once, as they are."""
    wide = accumulation_dtype(logits.dtype)
    whole = logits.is_cuda and logits.stride(1) == 1
    row_bytes = wide.itemsize * max(1, logits.shape[1])
    length = max(1, len(logits) if whole else BLOCK_BYTES // row_bytes)
    for start in range(0, len(logits), length):
        block = slice(start, start + length)
        y = logits[block] if whole else logits[block].to(wide).contiguous()
        tau = inv_temperature(temperature, block, logits[block, :0].to(wide))
        yield block, y, RowTransform(None, tau)
