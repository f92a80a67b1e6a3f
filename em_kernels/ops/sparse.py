"""The certified sparse gradient: which vocabulary entries a chunk's backward needs.

A language model's distributions are peaked, so most columns of dy hold next to nothing. Column j
has the mass M_j = sum_i |dy_ij|, token weights included. The lightest columns, which together hold
at most `tolerance` of all mass, are left out; both GEMMs run on the others.

Certificate, for any input:
    M_j is a sum of |dy_ij|, so ||dy - kept||_1 is the sum of M_j over the columns left out;
    that sum, taken directly over them, is at most tolerance * sum_j M_j = tolerance * ||dy||_1;
    so ||dy - kept||_1 <= tolerance * ||dy||_1 over the chunk.
The budget is lessened by the rounding error that fp32 sums of so many rows can have; a mass that is
not finite leaves nothing out; a column without mass is always left out. The bound is the chunk's: a
token of little weight may lose most of its own gradient (a bound per token would need 88 % of the
columns where the chunk's needs 37 %: SmolLM2-135M at temperature 1).

What is left out is mostly of one sign, so it would bias dhidden. Each row's dropped sum r_i is
known, and r_i times a mean of the dropped entries' weights is added back. As that adds at most
sum_i |r_i|, the dy that dhidden implies is off by at most 2 * tolerance * ||dy||_1. Measured on
1024 tokens of SmolLM2-135M: the relative error of dhidden falls from 3.3 to 1.1 times the tolerance
at temperature 0.5, from 3.8 to 0.6 times at 1.
The gradients of weight and bias are 0 at the entries left out.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import kernels
from ..kernels import RowTerms
from .gemm import gemm
from .inputs import GradMask, HeadInputs

# Thresholds tried per round, and rounds: keeps some 1 % more columns than sorting would.
STEPS, ROUNDS = 6, 3
SAMPLE = 2048  # dropped entries whose mean is taken; the mean of all is no better
# Above this share of the columns the dense product is faster: at 0.48 a CPU took 0.7 of the dense
# time, at 0.6 1.3 (LOG.md).
MAX_COLUMN_SHARE = 0.5
# A chunk that may well be flat is probed first: a choice from a few of its rows, which needs fewer
# columns than one from all rows, hence the lower share.
PROBE_ROWS = 64
MAX_PROBE_SHARE = 0.4


class ColumnChoice(NamedTuple):
    """The columns of a chunk that are multiplied, and what leaving out the others drops."""

    kept: Tensor  # (V,) bool
    mass: Tensor  # (V,)
    row_sums: Tensor  # (n,) of dy
    total: Tensor  # () mass of all columns
    dropped: Tensor  # () mass of the columns left out


def choose_columns(terms: RowTerms, tolerance: float) -> ColumnChoice:
    """Choose the heaviest columns, which hold all but `tolerance` of the mass."""
    mass, row_sums = kernels.column_mass(terms)
    total = mass.sum()
    exactness = 1 - (len(row_sums) + 64) * torch.finfo(mass.dtype).eps
    budget = tolerance * max(0.0, exactness) * total
    # All columns below budget / V can go, none above the budget. Each round tries thresholds in a
    # geometric series from the best one so far.
    powers = torch.arange(STEPS, device=mass.device, dtype=mass.dtype)
    threshold = torch.where(total.isfinite(), budget / len(mass), 0)
    for finer in range(1, ROUNDS + 1):
        tried = threshold * len(mass) ** (powers / STEPS**finer)
        below = torch.where(mass < tried[:, None], mass, 0).sum(1)
        threshold = torch.where(below <= budget, tried, 0).amax()
    kept = ~(mass < threshold) & (mass != 0)
    return ColumnChoice(kept, mass, row_sums, total, torch.where(kept, 0, mass).sum())


def mean_dropped_weight(choice: ColumnChoice, weight: Tensor) -> Tensor:
    """Return the mean (D,) of the dropped entries' weights, weighted by their mass.

    It is taken over a sample: the heaviest of every few entries.
    """
    mass = torch.where(choice.kept, 0, choice.mass)
    count = min(SAMPLE, len(mass))
    stride = -(-len(mass) // count)
    mass, place = pad(mass, (0, stride * count - len(mass))).view(stride, count).max(0)
    vocab_indices = place * count + torch.arange(count, device=place.device)
    shares = (mass / torch.where(mass.sum() > 0, mass.sum(), 1))[None]
    sample = weight[vocab_indices.clamp(max=len(weight) - 1)]  # padding has no share
    return gemm(shares.new_empty(1, weight.shape[1]), shares.to(weight.dtype), sample)[0]


def take_rows(terms: RowTerms, step: int) -> RowTerms:
    """Return the terms of every step-th row."""
    y, row, m, log_s, factors = terms
    row = row._replace(
        inv_temperature=row.inv_temperature[::step].contiguous(),
        targets=None if row.targets is None else row.targets[::step],
    )
    m, log_s = m[::step].contiguous(), log_s[::step].contiguous()
    factors = type(factors)(*(factor[::step] for factor in factors))
    return RowTerms(y[::step], row, m, log_s, factors)


def take_columns(terms: RowTerms, vocab_indices: Tensor) -> RowTerms:
    """Return a copy of these columns' terms, as if there were no others; the indices ascend."""
    row, targets, y = terms.row, terms.row.targets, terms.y
    if targets is not None:
        place = torch.searchsorted(vocab_indices, targets)
        is_taken = torch.searchsorted(vocab_indices, targets, right=True) > place
        targets = torch.where(is_taken, place, -1)
    bias = None if row.bias is None else row.bias[vocab_indices]
    stride = kernels.row_stride(len(vocab_indices), y.device)
    taken = y.new_empty(len(y), stride)[:, : len(vocab_indices)]
    torch.index_select(y, 1, vocab_indices, out=taken)
    return terms._replace(y=taken, row=row._replace(bias=bias, targets=targets))


class AsyncCounts:
    """Integers copied from the device without waiting: a GPU goes on with what is queued."""

    def __init__(self, *counts: Tensor) -> None:
        self.values, self.arrived = torch.stack(counts), None
        if self.values.is_cuda:
            stream = torch.cuda.current_stream(self.values.device)
            host = torch.empty_like(self.values, device="cpu", pin_memory=True)
            self.values = host.copy_(self.values, non_blocking=True)
            self.arrived = stream.record_event()

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class Selection(NamedTuple):
    """A chunk's choice of columns, whose counts may still be on their way from the device."""

    choice: ColumnChoice
    is_new: Tensor  # (V,) bool: chosen for the first time
    counts: AsyncCounts  # of the columns kept, and of those that are new


class ColumnSelector:
    """Choose each chunk's columns; where the choice keeps too many, the chunk stays dense.

    After a dense chunk the next 1, 2, 4, ... chunks are dense without a choice, so that flat
    distributions pay next to nothing for it.
    """

    def __init__(self, inputs: HeadInputs, needs: GradMask) -> None:
        self.tolerance = inputs.grad_tolerance if needs.hidden or needs.weight else 0.0
        # scale_upstream() waits for the GPU where the operand is fp16: nothing could overlap.
        on_gpu = inputs.hidden.is_cuda and inputs.operand != torch.float16
        self.buffers = 2 if self.tolerance > 0 and on_gpu else 1  # chunks of logits held at a time
        self.is_sharded = inputs.shard is not None
        self.seen: Tensor | None = None  # (V,) bool: columns that any chunk has chosen
        self.failures = self.dense_ahead = 0

    def begin(self, terms: RowTerms) -> Selection | None:
        """Launch the choice for a chunk; None: all columns."""
        if self.tolerance == 0:
            return None
        if self.dense_ahead > 0:
            self.dense_ahead -= 1
            return None
        if (self.seen is None or self.failures > 0) and not self._probe(terms):
            self._back_off()
            return None
        if self.seen is None:
            self.seen = torch.zeros(terms.y.shape[1], dtype=torch.bool, device=terms.y.device)
        choice = choose_columns(terms, self.tolerance)
        is_new = choice.kept & ~self.seen
        self.seen |= choice.kept
        return Selection(choice, is_new, AsyncCounts(choice.kept.sum(), is_new.sum()))

    def finish(self, selection: Selection) -> tuple[Tensor, int] | None:
        """Wait for the counts; return the columns kept and how many are new; None: all columns."""
        kept, new = selection.counts.read()
        if kept > MAX_COLUMN_SHARE * len(selection.choice.kept):
            self._back_off()
            return None
        self.failures = 0
        return torch.nonzero_static(selection.choice.kept, size=kept)[:, 0], new

    def _probe(self, terms: RowTerms) -> bool:
        """Return False if a few of the rows already need too many columns."""
        step = len(terms.m) // PROBE_ROWS
        if step < 4:  # choosing from all rows costs little more
            return True
        probe = choose_columns(take_rows(terms, step), self.tolerance)
        return int(probe.kept.sum()) <= MAX_PROBE_SHARE * len(probe.kept)

    def _back_off(self) -> None:
        self.dense_ahead = 1 << self.failures
        self.failures += 1
        # One larger buffer serves dense chunks better than two; but ranks must keep equal chunks.
        if not self.is_sharded:
            self.buffers = 1
