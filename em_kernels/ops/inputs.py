"""Inputs of the loops over logits, and the statistics that they return."""

from collections.abc import Sequence
from math import frexp
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from ..kernels import FinishedRows
from ..reference import IGNORE_INDEX, RowTransform, TokenStats
from . import choice_costs
from .checks import HeadArguments, check_values
from .gemm import accumulation_dtype, operand_dtype
from .support import Support
from .vocab_parallel import VocabularyShard


class GradMask(NamedTuple):
    """Gradients that the caller wants; one that is not wanted comes back with size 0."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class SavedStats(NamedTuple):
    """Statistics from which the backward recomputes each token's probabilities."""

    statistics: Tensor  # (5, N) in TokenStats' order, or the first three
    m: Tensor  # (N,)
    log_s: Tensor  # (N,)
    # (n, V or more) raw, of the tokens that count, or (1, nnz) of their supports; (0, 0): not kept
    logits: Tensor


class StatsOutput(NamedTuple):
    """All tokens' statistics and what their backward needs; size 0 where not asked for."""

    statistics: Tensor  # (5, N) in TokenStats' order, or (3, N) without collision and argmax
    argmax: Tensor  # (N,) int64
    m: Tensor  # (N,)
    log_s: Tensor  # (N,)
    logits: Tensor  # as in SavedStats
    dhidden: Tensor  # (N, D) of a single statistic, upstream 1
    chosen: Tensor  # (N, K + k) log p of several targets, then of the largest entries
    top_indices: Tensor  # (N, k) int64
    tail_logprob: Tensor  # (N,) where k > 0

    def store(
        self, tokens: slice | Tensor, rows: FinishedRows, chosen: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Store some tokens' statistics, and what ChosenEntries.finish() returns for them."""
        store_statistics(rows.stats, tokens, self.statistics, self.argmax)
        self.m[tokens], self.log_s[tokens] = rows.m, rows.log_s
        self.chosen[tokens], self.top_indices[tokens], tail = chosen
        if len(self.tail_logprob) > 0:
            self.tail_logprob[tokens] = tail


def store_statistics(
    stats: TokenStats, tokens: slice | Tensor, statistics: Tensor, argmax: Tensor
) -> None:
    """Store some tokens' statistics among all tokens', as StatsOutput has them."""
    for row, value in zip(statistics, stats, strict=False):
        if value is not None:
            row[tokens] = value
    if len(argmax) > 0 and stats.argmax is not None:
        argmax[tokens] = stats.argmax


class HeadInputs(NamedTuple):
    """The head's operands, how logits hidden weight^T + bias become z, and which tokens count."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D), or this rank's rows of it
    bias: Tensor | None = None  # (V,)
    temperature: float | Tensor = 1.0  # (N,)
    logit_scale: float = 1.0
    softcap: float | None = None
    targets: Tensor | None = None  # (N,) or (N, K) int64, counted over the whole vocabulary
    mask: Tensor | None = None  # (N,)
    chunk_bytes: int | None = None
    grad_tolerance: float = 0.0
    shard: VocabularyShard | None = None
    support: Support | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits, statistics and sums."""
        return accumulation_dtype(self.hidden.dtype)

    @property
    def operand(self) -> torch.dtype:
        """Dtype of dy in the GEMMs."""
        return operand_dtype(self.weight)

    @property
    def dy_has_own_buffer(self) -> bool:
        """True on a GPU whose GEMM takes dy in 16 bits; else dy overwrites the logits."""
        return self.hidden.is_cuda and self.operand != self.dtype

    @property
    def logit_bytes(self) -> int:
        """Bytes of one logit, and of its gradient where that has its own buffer."""
        return self.dtype.itemsize + (self.operand.itemsize if self.dy_has_own_buffer else 0)

    def keeps_dy(self, needs: GradMask) -> bool:
        """True if the dy of all tokens takes no more memory than an fp32 dweight.

        A loss with autograd then keeps dy, and the backward multiplies dweight once. The choice
        depends on shapes and dtypes alone, so that all ranks agree.
        """
        dy_bytes = len(self.hidden) * self.operand.itemsize
        dweight_bytes = self.hidden.shape[1] * self.dtype.itemsize
        return self.grad_tolerance == 0 and needs.weight and dy_bytes <= dweight_bytes

    @property
    def shard_sizes(self) -> list[int]:
        """Vocabulary entries that each rank holds."""
        return [len(self.weight)] if self.shard is None else self.shard.sizes

    @property
    def vocab_size(self) -> int:
        return sum(self.shard_sizes)

    def check_and_find_active(self, *, negative_mask_allowed: bool) -> Tensor | None:
        """Return the indices of the tokens of weight != 0, None for all; check the values first."""
        return check_values(
            self.mask, self.temperature, self.targets, self.vocab_size, negative_mask_allowed
        )

    def active_tokens(self) -> Tensor | None:
        """Return what check_and_find_active() does, without checks."""
        active = None if self.mask is None else self.mask.nonzero()[:, 0]
        return None if active is None or len(active) == len(self.hidden) else active

    def upstream_of(
        self, upstream: Tensor, tokens: slice | Tensor, chosen: Tensor | None
    ) -> TokenStats:
        """Return the upstream gradients of some tokens' statistics, as gradient_factors takes them.

        Args:
            upstream: (5 or 3, N), of StatsOutput.statistics.
            tokens: those that count.
            chosen: (N, K) in place of logprob's, for several targets.
        """
        up = TokenStats(*upstream[:, tokens].to(self.dtype))
        if self.targets is None:
            return up._replace(logprob=None)
        logprob = up.logprob if chosen is None else chosen[tokens].to(self.dtype)
        assert logprob is not None
        ignored = self.targets[tokens] == IGNORE_INDEX
        return up._replace(logprob=logprob.masked_fill(ignored, 0))

    def spread(self, dh: Tensor, active: Tensor | None) -> Tensor:
        """Return the active tokens' dhidden in hidden's dtype, with zeros for all others."""
        dh = dh.to(self.hidden.dtype)
        if active is None:
            return dh
        return self.hidden.new_zeros(self.hidden.shape).index_copy_(0, active, dh)

    def row_transform(self) -> RowTransform:
        """Return bias, temperature, scale and targets of all tokens and this rank's entries."""
        targets = self.targets
        if targets is not None and self.shard is not None:
            targets = targets - self.shard.start
        like = self.hidden.new_empty(len(self.hidden), 0, dtype=self.dtype)
        tau = inv_temperature(self.temperature, slice(None), like)
        return RowTransform(self.bias, tau, self.logit_scale, self.softcap, targets)

    def check_top_k(self, top_k: int) -> None:
        if top_k > self.vocab_size:
            raise ValueError(
                f"top_k: {top_k} is more than the {self.vocab_size} vocabulary entries"
            )

    def token_weights(self, mean: bool) -> Tensor:
        """Return each token's factor (N,) in the loss: the mask, divided by its sum for a mean."""
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

    def zero_output(self, with_collision_and_argmax: bool = False, top_k: int = 0) -> StatsOutput:
        """Return zeros for all statistics of tokens; no logits and no dhidden."""
        statistics, argmax = self.zero_statistics(with_collision_and_argmax)
        count, chosen = len(self.hidden), top_k
        if self.targets is not None and self.targets.dim() == 2:
            chosen += self.targets.shape[1]
        return StatsOutput(
            statistics,
            argmax,
            m=statistics.new_zeros(count),
            log_s=statistics.new_zeros(count),
            logits=statistics.new_empty(0, 0),
            dhidden=statistics.new_empty(0),
            chosen=statistics.new_zeros(count, chosen),
            top_indices=argmax.new_zeros(count, top_k),
            tail_logprob=statistics.new_zeros(count if top_k > 0 else 0),
        )

    def zero_statistics(self, with_collision_and_argmax: bool) -> tuple[Tensor, Tensor]:
        """Return zeros for StatsOutput's statistics and argmax."""
        count, more = len(self.hidden), with_collision_and_argmax
        statistics = self.hidden.new_zeros(5 if more else 3, count, dtype=self.dtype)
        return statistics, self.hidden.new_zeros(count if more else 0, dtype=torch.int64)


def build_inputs(
    head: HeadArguments,
    collectives: int,
    grad_tolerance: float = 0.0,
    needs: Sequence[bool] = (False, False, False),
) -> HeadInputs:
    """Build the loops' inputs from checked arguments, with a tolerance of 0 where none can pay.

    Args:
        head: as check_arguments returns it.
        collectives: a number that stands for the collective calls that follow; ranks must agree,
            as in the number of targets and the tolerance.
        grad_tolerance: of the sparse gradient.
        needs: whether gradients of hidden, weight and bias are wanted.
    """
    asked = grad_tolerance
    if grad_tolerance > 0 and choice_costs.why_exact(head, needs):
        grad_tolerance = 0.0
    logit_scale, softcap, temperature = head.transform
    shard = None
    if head.group is not None:
        group = distributed_c10d._resolve_process_group(head.group)  # type: ignore[arg-type]
        several = head.targets.shape[1:].numel() if head.targets is not None else 0
        number = hash((collectives, several, asked))
        shard = VocabularyShard(group, len(head.weight), head.weight.device, number)
    return HeadInputs(
        head.hidden,
        head.weight,
        head.bias,
        temperature if head.temperatures is None else head.temperatures,
        logit_scale,
        softcap or None,
        head.targets,
        head.mask,
        head.chunk_bytes,
        grad_tolerance,
        shard,
    )


def part_of(
    row: RowTransform, tokens: slice | Tensor, vocab_slice: slice | None = None
) -> RowTransform:
    """Return the transform of some tokens, and of some vocabulary entries."""
    bias, targets = row.bias, row.targets
    if targets is not None:
        targets = targets[tokens]
    if vocab_slice is not None:
        bias = None if bias is None else bias[vocab_slice]
        targets = None if targets is None else targets - vocab_slice.start
    return row._replace(bias=bias, inv_temperature=row.inv_temperature[tokens], targets=targets)


def inv_temperature(temperature: float | Tensor, tokens: slice | Tensor, like: Tensor) -> Tensor:
    """Return 1 / temperature of these tokens; `like` has their rows, device and dtype."""
    if isinstance(temperature, Tensor):
        return 1 / temperature[tokens].to(like.dtype)
    return like.new_full(like.shape[:1], 1 / temperature)


def scale_upstream(upstream: TokenStats, operand: torch.dtype) -> tuple[TokenStats, float]:
    """Return the upstream gradient divided by a power of two, and that power.

    For fp16 operands, whose range is small, it brings dy into that range, whatever the loss's
    scale. For other operands the power is 1.
    """
    given = [x for x in upstream if x is not None]
    if operand != torch.float16 or not given or given[0].numel() == 0:
        return upstream, 1.0
    power = power_of_two(torch.cat([x.flatten() for x in given]))
    return TokenStats(*(None if x is None else x / power for x in upstream)), power


def power_of_two(sizes: Tensor) -> float:
    """Return the least power of two that no finite one of the sizes reaches, within 2^+-120."""
    sizes = sizes.abs().float()
    largest = float(sizes.masked_fill(~sizes.isfinite(), 0).amax())
    return 2.0 ** min(max(frexp(largest)[1], -120), 120)
