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

from .. import kernels
from ..kernels import ColumnChoice, RowTerms
from .inputs import GradMask, HeadInputs

SAMPLE = 2048  # dropped entries whose mean is taken; the mean of all is no better
# Above this share of the columns the dense product is faster: at 0.48 a CPU took 0.7 of the dense
# time, at 0.6 1.3 (LOG.md).
MAX_COLUMN_SHARE = 0.5
# A chunk that may well be flat is probed first: a choice from a few of its rows, which needs fewer
# columns than one from all rows, hence the lower share.
PROBE_ROWS = 64
MAX_PROBE_SHARE = 0.4


def choose_columns(
    terms: RowTerms, tolerance: float, row_of: Tensor, sample_dtype: torch.dtype
) -> tuple[ColumnChoice, Tensor]:
    """Return the heaviest columns, which hold all but `tolerance` of the mass, and dy's row sums.

    row_of: as in kernels.choose_columns.
    """
    mass, row_sums = kernels.column_mass(terms)
    # A mass is a sum of so many rows; sums of masses add V / 2048 one after another, then a tree.
    roundings = len(row_sums) + len(mass) // 2048 + 64
    exactness = 1 - roundings * torch.finfo(mass.dtype).eps
    tolerance *= max(0.0, exactness)
    return kernels.choose_columns(mass, row_of, tolerance, SAMPLE, sample_dtype), row_sums


def take_rows(terms: RowTerms, step: int) -> RowTerms:
    """Return the terms of every step-th row."""
    y, row, per_row = terms
    row = row._replace(
        inv_temperature=row.inv_temperature[::step].contiguous(),
        targets=None if row.targets is None else row.targets[::step],
    )
    return RowTerms(y[::step], row, per_row[:, ::step].contiguous())


class AsyncCounts:
    """Integers copied from the device without waiting: a GPU goes on with what is queued."""

    def __init__(self, counts: Tensor) -> None:
        self.values, self.arrived = counts, None
        if counts.is_cuda:
            stream = torch.cuda.current_stream(counts.device)
            host = torch.empty_like(counts, device="cpu", pin_memory=True)
            self.values = host.copy_(counts, non_blocking=True)
            self.arrived = stream.record_event()

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class Selection(NamedTuple):
    """A chunk's choice of columns, whose counts may still be on their way from the device."""

    choice: ColumnChoice
    row_sums: Tensor  # (n,) of dy over all columns
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
        self.dtype = inputs.weight.dtype
        # (V,) each column's row in dweight, in the order in which chunks choose them; -1: none yet
        count = len(inputs.weight) if self.tolerance > 0 else 0
        self.row_of = inputs.hidden.new_full((count,), -1, dtype=torch.int64)
        self.has_chosen = False
        self.failures = self.dense_ahead = 0

    def begin(self, terms: RowTerms) -> Selection | None:
        """Launch the choice for a chunk; None: all columns."""
        if self.tolerance == 0:
            return None
        if self.dense_ahead > 0:
            self.dense_ahead -= 1
            return None
        if (not self.has_chosen or self.failures > 0) and not self._probe(terms):
            self._back_off()
            return None
        choice, row_sums = choose_columns(terms, self.tolerance, self.row_of, self.dtype)
        self.row_of, self.has_chosen = choice.row_of, True
        return Selection(choice, row_sums, AsyncCounts(choice.counts))

    def finish(self, selection: Selection) -> tuple[int, int] | None:
        """Wait; return how many columns are kept, and how many of them are new. None: all."""
        kept, new = selection.counts.read()
        if kept > MAX_COLUMN_SHARE * len(self.row_of):
            self._back_off()
            return None
        self.failures = 0
        return kept, new

    def _probe(self, terms: RowTerms) -> bool:
        """Return False if a few of the rows already need too many columns."""
        step = len(terms.per_row[0]) // PROBE_ROWS
        if step < 4:  # choosing from all rows costs little more
            return True
        few = take_rows(terms, step)
        choice, _ = choose_columns(few, self.tolerance, self.row_of, self.dtype)
        return choice.counts[0].item() <= MAX_PROBE_SHARE * len(self.row_of)

    def _back_off(self) -> None:
        self.dense_ahead = 1 << self.failures
        self.failures += 1
        # One larger buffer serves dense chunks better than two; but ranks must keep equal chunks.
        if not self.is_sharded:
            self.buffers = 1
