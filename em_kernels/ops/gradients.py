"""Gradients of hidden, weight and bias, added up chunk by chunk.

They are the products (9) over all columns of dy, or over those that sparse.py chooses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..kernels import DivergenceTerms, RowTerms
from .gemm import gemm
from .inputs import GradMask, HeadInputs
from .memory import large_empty
from .sparse import ColumnSelector, Selection
from .weight_gradient import (
    SparseWeightGrad,
    StreamedWeightGrad,
    WeightGradCallback,
    slab_length,
)

# Chunks whose dy a GPU multiplies together: fp32 dweight is read and written once for all of them.
# Calculated traffic for N = 8192, D = 4096, V = 151936 in 1 GiB: 17 GB instead of 37. With 8, a
# chunk of logits has so few rows that the weight is read too often.
CHUNKS_PER_BATCH = 4


class Gradients(NamedTuple):
    """Gradients in the accumulation dtype for upstream 1; size 0 where not wanted."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D); or (K, D), the rows of `vocab_indices`, others being 0
    bias: Tensor  # (V,)
    vocab_indices: Tensor  # (K,); (0,) where weight has all rows
    dy: Tensor  # (n, V or more) of the tokens that count; (0, 0) where it is not kept
    dy_scales: Tensor  # (chunks, 2) rows and scale of the chunks in dy, fp64 on the CPU
    report: Tensor  # (2,) shares: of the columns that were multiplied, of dy's L1 mass left out


class PendingChunk(NamedTuple):
    """A chunk between begin() and finish()."""

    tokens: slice | Tensor  # positions among the N
    hidden: Tensor  # (n, D)
    terms: RowTerms | DivergenceTerms
    scale: float  # what its dy has to be multiplied by
    logprob_upstream: Tensor | None  # as kernels.row_gradient takes it
    selection: Selection | None  # None: all columns


class DyBatch:
    """dy of several chunks in one buffer, so that each product takes all of them at once."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks  # that are batched at most; 1 where none are, or all dy is kept
        self.capacity = 0  # rows of the buffer; 0: each chunk is multiplied on its own
        self.rows = 0  # filled
        self.buffer: Tensor | None = None  # (capacity, stride)
        self.tokens: list[slice | Tensor] = []  # positions of each chunk's tokens

    def extend(self, tokens: slice | Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the memory, shaped as y, that the chunk's dy is to be written into."""
        if self.buffer is None and len(y) == self.capacity:  # the only chunk: y's own memory
            dy = kernels.gradient_buffer(y, dtype)
            self.buffer = dy.as_strided((len(dy), dy.stride(0)), (dy.stride(0), 1))
        elif self.buffer is None:
            self.buffer = large_empty((self.capacity, y.stride(0)), dtype, y)
        begin, self.rows = self.rows, self.rows + len(y)
        self.tokens.append(tokens)
        return self.buffer[begin : self.rows, : y.shape[1]]

    def take(self, columns: int) -> tuple[slice | Tensor, Tensor]:
        """Empty the batch; return the positions of its tokens and dy (rows, columns)."""
        assert self.buffer is not None
        first, last = self.tokens[0], self.tokens[-1]
        if isinstance(first, slice):  # chunks of slices are adjacent
            assert isinstance(last, slice)
            tokens: slice | Tensor = slice(first.start, last.stop)
        else:
            tokens = torch.cat(self.tokens)  # type: ignore[arg-type]  # tensors, as the first is
        dy = self.buffer[: self.rows, :columns]
        self.tokens, self.rows = [], 0
        return tokens, dy


class GradAccumulator:
    """Sums of all chunks' gradients.

    begin() launches the choice of a chunk's columns; finish() waits for their number and adds the
    chunk. A GPU computes the next chunk's logits in between.
    """

    def __init__(
        self,
        inputs: HeadInputs,
        needs: GradMask,
        on_weight_grad: WeightGradCallback | None = None,
        keeps_dy: bool = False,
    ) -> None:
        hidden, weight, wide = inputs.hidden, inputs.weight, inputs.dtype
        self.inputs, self.needs = inputs, needs
        self.dh = hidden.new_zeros(hidden.shape if needs.hidden else (0,), dtype=wide)
        self.db = hidden.new_zeros(len(weight) if needs.bias else 0, dtype=wide)
        self.dw: SparseWeightGrad | StreamedWeightGrad
        if on_weight_grad is None:
            self.dw = SparseWeightGrad(weight.shape, wide, hidden)
        else:
            self.dw = StreamedWeightGrad(on_weight_grad, weight.shape, wide, hidden)
        self.keeps_dy = keeps_dy  # of all tokens, for one product in the backward
        self.scales: list[tuple[int, float]] = []  # rows and scale of each chunk in a kept dy
        self.selector = ColumnSelector(inputs, needs)
        batches = self.selector.tolerance == 0 and needs.weight and inputs.dy_has_own_buffer
        batches = batches and not keeps_dy
        # Chunks of an fp16 dy cannot be batched: each has a scale of its own.
        self.batch = DyBatch(CHUNKS_PER_BATCH if batches and inputs.operand != torch.float16 else 1)
        self.multiplied = self.total = 0  # elements of dy
        self.masses = hidden.new_zeros(2, dtype=wide)  # left out, and of all columns

    def begin(
        self,
        tokens: slice | Tensor,
        hidden: Tensor,
        terms: RowTerms | DivergenceTerms,
        scale: float,
        logprob_upstream: Tensor | None = None,
    ) -> PendingChunk:
        """Take a chunk; with several targets a row, or a divergence, all columns are multiplied."""
        selection, several = None, logprob_upstream is not None and logprob_upstream.dim() == 2
        if isinstance(terms, RowTerms) and not several:
            selection = self.selector.begin(terms)
        return PendingChunk(tokens, hidden, terms, scale, logprob_upstream, selection)

    def finish(self, chunk: PendingChunk) -> None:
        rows, columns = chunk.terms.y.shape
        found = None if chunk.selection is None else self.selector.finish(chunk.selection)
        if chunk.selection is None or found is None:
            kept = columns
            self._add_all_columns(chunk)
        else:
            kept, new_count = found
            self._add_columns(chunk, chunk.selection, kept, new_count)
        self.multiplied += rows * kept
        self.total += rows * columns

    def result(self) -> Gradients:
        """Finish the gradients of all chunks; a collective call where the vocabulary is split."""
        dy = self.dh.new_empty(0, 0, dtype=self.inputs.operand)
        if self.keeps_dy and self.batch.buffer is not None:
            dy = self.batch.buffer
            self._multiply_kept(dy)
        else:
            self._multiply_batch()
        self.batch.buffer = None
        if self.needs.hidden and self.inputs.shard is not None:
            self.inputs.shard.sum(self.dh)
        dw = self.dh.new_empty((0, self.inputs.weight.shape[1]) if self.needs.weight else 0)
        vocab_indices = self.dh.new_empty(0, dtype=torch.int64)
        if self.needs.weight and not self.keeps_dy:
            row_of = self.selector.row_of
            dw, vocab_indices = self.dw.result(row_of, whole=self.inputs.grad_tolerance == 0)
        share = self.dh.new_full((), self.multiplied / max(1, self.total))
        left_out, mass = self.masses
        dropped = left_out / torch.where(mass > 0, mass, 1)
        scales = torch.tensor(self.scales, dtype=torch.float64, device="cpu").view(-1, 2)
        report = torch.stack([share, dropped])
        return Gradients(self.dh, dw, self.db, vocab_indices, dy, scales, report)

    def _add_all_columns(self, chunk: PendingChunk) -> None:
        y, operand = chunk.terms.y, self.inputs.operand
        if self.batch.capacity == 0:
            dy = _write_gradient(chunk, kernels.gradient_buffer(y, operand))
            self._multiply(chunk.tokens, dy, chunk.scale, chunk.hidden)
            return
        if self.batch.rows + len(y) > self.batch.capacity:
            self._multiply_batch()
        _write_gradient(chunk, self.batch.extend(chunk.tokens, y, operand))
        if self.keeps_dy:
            self.scales.append((len(y), chunk.scale))

    def _multiply_batch(self) -> None:
        if self.batch.rows > 0:
            tokens, dy = self.batch.take(len(self.inputs.weight))
            self._multiply(tokens, dy, 1.0, self.inputs.hidden[tokens])

    def _multiply_kept(self, dy: Tensor) -> None:
        """Add to dhidden and dbias; chunks that share a scale are multiplied together."""
        if len({scale for _, scale in self.scales}) == 1:
            self.scales = [(len(dy), self.scales[0][1])]
            self.batch.tokens = [self.batch.take(len(self.inputs.weight))[0]]
        start = 0
        for tokens, (rows, scale) in zip(self.batch.tokens, self.scales, strict=True):
            self._multiply(tokens, dy[start : start + rows, : len(self.inputs.weight)], scale)
            start += rows

    def _multiply(
        self, tokens: slice | Tensor, dy: Tensor, scale: float, hidden: Tensor | None = None
    ) -> None:
        """Add dy's products; dweight's only with hidden, the tokens' rows of it."""
        if self.needs.hidden:
            dh = self._dhidden_buffer(tokens, len(dy))
            self._store_dhidden(tokens, gemm(dh, dy, self.inputs.weight, alpha=scale))
        if self.needs.weight and hidden is not None:
            self.dw.add_all(dy, hidden, scale, self.selector.row_of)
        if self.needs.bias:
            self.db += dy.sum(0, dtype=self.db.dtype) * scale

    def _add_columns(
        self, chunk: PendingChunk, selection: Selection, count: int, new_count: int
    ) -> None:
        """Add the chosen columns by slabs, which need little memory beside the chunk.

        `new_count` of them were in no chunk before.
        """
        weight, wide, operand = self.inputs.weight, self.inputs.dtype, self.inputs.operand
        terms, choice, residual = chunk.terms, selection.choice, selection.row_sums
        assert isinstance(terms, RowTerms)
        entry_bytes = len(chunk.hidden) * (wide.itemsize + operand.itemsize)
        entry_bytes += weight.shape[1] * (wide.itemsize + weight.dtype.itemsize)
        length = slab_length(entry_bytes, budget=terms.y.nbytes)
        dh = self.dh
        if self.needs.hidden:
            dh = self._dhidden_buffer(chunk.tokens, len(chunk.hidden))
        unwritten = False
        if self.needs.weight:
            unwritten = self.dw.make_room(new_count, selection.choice.row_of)
        for start in range(0, count, length):
            slab = slice(start, min(start + length, count))
            entries = choice.vocab_indices[slab]
            dy = kernels.gradient_of_columns(terms, entries, operand, residual)
            if self.needs.hidden:
                gemm(dh, dy, weight[entries], accumulate=start > 0, alpha=chunk.scale)
            if self.needs.weight:
                rows = slab if unwritten else choice.dweight_rows[slab]
                self.dw.add_some(dy, chunk.hidden, chunk.scale, entries, rows)
            if self.needs.bias:
                self.db.index_add_(0, entries, dy.sum(0, dtype=wide), alpha=chunk.scale)
        if self.needs.hidden:
            if count == 0:
                dh.zero_()
            # Each row's sum is put back, at the mean of the weights left out.
            mean = gemm(dh.new_empty(1, dh.shape[1]), choice.shares, weight[choice.sample])[0]
            dh.addr_(residual, mean, alpha=chunk.scale)
            self._store_dhidden(chunk.tokens, dh)
        self.masses.add_(choice.masses, alpha=chunk.scale)

    def _dhidden_buffer(self, tokens: slice | Tensor, count: int) -> Tensor:
        """Return memory for these tokens' dhidden: a view of the whole where they are adjacent."""
        if isinstance(tokens, slice):
            return self.dh[tokens]
        return self.dh.new_empty(count, self.dh.shape[1])

    def _store_dhidden(self, tokens: slice | Tensor, dh: Tensor) -> None:
        if not isinstance(tokens, slice):
            self.dh[tokens] = dh


def _write_gradient(chunk: PendingChunk, out: Tensor) -> Tensor:
    if isinstance(chunk.terms, RowTerms):
        return kernels.row_gradient(chunk.terms, out, chunk.logprob_upstream)
    return kernels.divergence_gradient(chunk.terms, out)
