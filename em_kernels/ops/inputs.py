"""Inputs of the loops over logits that are never held whole, and the memory a piece may take."""

from math import frexp
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.cpu import is_built
from ..reference import RowTransform, TokenStats
from .checks import check_values
from .free_memory import free_host_bytes
from .gemm import accumulation_dtype, operand_dtype
from .vocab_parallel import VocabularyShard

MAX_CHUNK_BYTES = 1 << 30  # fp32 dW is read and written once a chunk, or some: few, large ones
# The longer side of a GPU's GEMM tile. Counted, not measured: dhidden at D = 4096 in tiles of
# 128 x 256 on 132 multiprocessors fills 0.97 of its waves with 1024 or 2048 rows, 0.55 with 1171.
TILE = 256


class Needs(NamedTuple):
    """Which gradients the caller wants; one that is not wanted comes back with size 0."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Problem(NamedTuple):
    """Logits hidden weight^T + bias, how they become z, and what is asked of which tokens."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D), this rank's rows of it where there is a shard
    bias: Tensor | None = None  # (V,)
    temperature: float | Tensor = 1.0  # (N,)
    logit_scale: float = 1.0
    softcap: float | None = None
    targets: Tensor | None = None  # (N,) int64, counted over the whole vocabulary
    mask: Tensor | None = None  # (N,)
    chunk_bytes: int | None = None
    grad_tolerance: float = 0.0
    shard: VocabularyShard | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits, statistics and sums."""
        return accumulation_dtype(self.hidden.dtype)

    @property
    def operand(self) -> torch.dtype:
        """Dtype of dy in the GEMMs."""
        return operand_dtype(self.weight)

    @property
    def sizes(self) -> list[int]:
        """Vocabulary entries that each rank holds."""
        return [len(self.weight)] if self.shard is None else self.shard.sizes

    @property
    def vocab_size(self) -> int:
        return sum(self.sizes)

    def active(self, *, negative_mask_allowed: bool) -> Tensor | None:
        """Check the values; the indices of the tokens of weight != 0, None for all."""
        return check_values(
            self.mask, self.temperature, self.targets, self.vocab_size, negative_mask_allowed
        )

    def row_transform(self, tokens: slice | Tensor, words: slice = slice(0, None)) -> RowTransform:
        """Bias, temperature, scale and targets for these tokens and these rows of the weight."""
        targets, first = self.targets, words.start
        if targets is not None:
            first += 0 if self.shard is None else self.shard.start
            targets = targets[tokens] - first
        bias = None if self.bias is None else self.bias[words]
        tau = inv_temperature(self.temperature, tokens, self.hidden[tokens, :0].to(self.dtype))
        return RowTransform(bias, tau, self.logit_scale, self.softcap, targets)

    def token_weights(self, mean: bool) -> Tensor:
        """(N,) factors of the tokens' losses: the mask's, over its sum for the mean."""
        if self.mask is None:
            weights = self.hidden.new_ones(len(self.hidden), dtype=self.dtype)
        else:
            weights = self.mask
        if not mean or len(weights) == 0:
            return weights.to(self.dtype)
        if weights.is_floating_point():  # their sum might overflow
            weights = weights.to(torch.promote_types(weights.dtype, self.dtype))
            largest = weights.amax()
            weights = weights / torch.where(largest == 0, 1, largest)
        total = weights.sum(dtype=self.dtype)
        return weights.to(self.dtype) / torch.where(total == 0, 1, total)

    def blank_statistics(self, everything: bool) -> tuple[Tensor, Tensor]:
        """Zeros for statistics (5, N) in TokenStats' order and argmax (N,), or (3, N) and (0,)."""
        count = len(self.hidden)
        statistics = self.hidden.new_zeros(5 if everything else 3, count, dtype=self.dtype)
        return statistics, self.hidden.new_zeros(count if everything else 0, dtype=torch.int64)

    @property
    def dy_is_apart(self) -> bool:
        """True if dy has its own buffer: on a GPU, in the 16 bits that the GEMM takes."""
        return self.hidden.is_cuda and self.operand != self.dtype

    @property
    def logit_bytes(self) -> int:
        """Bytes of one logit, and of its gradient where that has its own buffer."""
        return self.dtype.itemsize + (self.operand.itemsize if self.dy_is_apart else 0)


def inv_temperature(temperature: float | Tensor, tokens: slice | Tensor, like: Tensor) -> Tensor:
    """1 / temperature of these tokens, whose rows `like` holds, in its dtype."""
    if isinstance(temperature, Tensor):
        return 1 / temperature[tokens].to(like.dtype)
    return like.new_full(like.shape[:1], 1 / temperature)


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor on this device could take now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        return free_host_bytes()
    except OSError:  # not Linux
        return 8 * MAX_CHUNK_BYTES


def chunk_length(
    total: int,
    bytes_each: int,
    chunk_bytes: int | None,
    device: torch.device,
    enough: int = MAX_CHUNK_BYTES,
) -> int:
    """How many of `total` rows (or columns) of logits fit in the budget, split evenly, on a GPU
    into multiples of TILE.

    The default is `enough` or what is free, a power of two, so that what else runs seldom changes
    the order of sums.
    """
    if chunk_bytes is not None and chunk_bytes < bytes_each:
        raise ValueError(
            f"chunk_bytes: {chunk_bytes} is less than one row (or column) of logits takes; "
            f"give at least {bytes_each}"
        )
    if chunk_bytes is None:
        most = max(1, min(enough, MAX_CHUNK_BYTES, free_bytes(device) // 8))
        chunk_bytes = 1 << (most.bit_length() - 1)
    fitting = max(1, chunk_bytes // max(1, bytes_each))
    step = TILE if device.type == "cuda" and TILE <= fitting < total else 1
    pieces = max(1, -(-total // (fitting // step * step)))
    return max(1, -(-total // (pieces * step)) * step)


def large_empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """torch.empty on like's device; on a CPU in pages of 2 MiB.

    Measured (Xeon, 2026-11): 300,000 page faults of 4 KiB were half of a bf16 loss's time.
    """
    x = like.new_empty(shape, dtype=dtype)
    if x.is_cpu and is_built():
        torch.ops.em_kernels.advise_huge_pages(x)
    return x


def in_range_of(dtype: torch.dtype, upstream: TokenStats) -> tuple[TokenStats, float]:
    """The upstream divided by a power of two, and that: fp16, the one operand of small range, then
    loses neither small gradients nor large ones, whatever the loss's scale.
    """
    there = [x for x in upstream if x is not None]
    if dtype != torch.float16 or not there or there[0].numel() == 0:
        return upstream, 1.0
    sizes = torch.stack(there).abs().float()
    largest = float(sizes.masked_fill(~sizes.isfinite(), 0).amax())
    exponent = min(max(frexp(largest)[1], -120), 120)
    scaled = (None if x is None else x * 2.0**-exponent for x in upstream)
    return TokenStats(*scaled), 2.0**exponent
