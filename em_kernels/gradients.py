"""Gradients of hidden, weight and bias, added up chunk by chunk: (9) over all columns of dy, or
over those that sparse.py chooses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import rows, sparse
from .gemm import gemm
from .problem import MOST_COLUMNS, Needs, Problem, large_empty
from .rows import RowTerms
from .sparse import Choice, Counts

PROBE_ROWS = 64  # of the first chunk: whether a look at all its rows can pay
PROBE_SHARE = 0.4  # of the columns; all rows together need more
UNION = 0.5  # of the words: with more, dweight is held whole
GROWTH = 1.5


class Gradients(NamedTuple):
    """In the accumulation dtype, unmultiplied by the caller's upstream; size 0 where not wanted."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D); or (K, D), the rows of `words`, others being 0
    bias: Tensor  # (V,)
    words: Tensor  # (K,); (0,) where weight has all rows
    report: Tensor  # (2,) shares: of the columns that were multiplied, of dy's L1 mass left out


class Pending(NamedTuple):
    """A chunk that is to be added."""

    tokens: slice | Tensor  # where they stand among the N
    hidden: Tensor  # (n, D)
    terms: RowTerms
    scale: float  # of its gradients, which dy lacks
    choice: Choice | None  # None: all columns
    fresh: Tensor  # (V,) bool, columns chosen for the first time
    counts: Counts | None  # of both


class Sums:
    """begin() queues what leads to the choice of a chunk's columns, finish() needs their number:
    in between a GPU can begin the next chunk.
    """

    def __init__(self, problem: Problem, needs: Needs) -> None:
        hidden, weight, wide = problem.hidden, problem.weight, problem.dtype
        self.problem, self.needs = problem, needs
        self.dh = hidden.new_zeros(hidden.shape if needs.hidden else (0,), dtype=wide)
        self.db = hidden.new_zeros(len(weight) if needs.bias else 0, dtype=wide)
        self.dw = WordSum(weight.shape, wide, hidden)
        self.is_sparse = problem.grad_tolerance > 0
        self.seen: Tensor | None = None  # (V,) bool
        self.multiplied = self.of = 0  # columns times rows
        self.dropped, self.mass = hidden.new_zeros(2, dtype=wide)

    def begin(
        self, tokens: slice | Tensor, hidden: Tensor, terms: RowTerms, scale: float
    ) -> Pending:
        if self.is_sparse and self.seen is None:
            self.seen = torch.zeros(terms.y.shape[1], dtype=torch.bool, device=terms.y.device)
            self.is_sparse = self._can_pay(terms)
        if self.seen is None or not self.is_sparse:
            return Pending(tokens, hidden, terms, scale, None, hidden.new_empty(0), None)
        choice = sparse.choose(terms, self.problem.grad_tolerance)
        fresh = choice.kept & ~self.seen
        self.seen |= choice.kept
        counts = Counts(choice.kept.sum(), fresh.sum())
        return Pending(tokens, hidden, terms, scale, choice, fresh, counts)

    def finish(self, chunk: Pending) -> None:
        count, columns = chunk.terms.y.shape
        kept = columns
        if self.is_sparse and chunk.choice is not None and chunk.counts is not None:
            kept, fresh = chunk.counts.read()
            self.is_sparse = kept <= MOST_COLUMNS * columns  # this chunk, and so those after it
            if self.is_sparse:
                self._add_some(chunk, chunk.choice, kept, fresh)
        if not self.is_sparse:
            self._add_all(chunk)
            kept = columns
        self.multiplied += count * kept
        self.of += count * columns

    def result(self) -> Gradients:
        """Of all chunks. A collective call where the vocabulary is split."""
        if self.needs.hidden and self.problem.shard is not None:
            self.problem.shard.sum(self.dh)
        dw, words = self.dh.new_empty(0), self.dw.words
        if self.needs.weight:
            if self.problem.grad_tolerance == 0:
                self.dw.make_whole()
            dw, words = self.dw.result()
        share = self.dh.new_tensor(self.multiplied / max(1, self.of))
        dropped = self.dropped / torch.where(self.mass > 0, self.mass, 1)
        return Gradients(self.dh, dw, self.db, words, torch.stack([share, dropped]))

    def _can_pay(self, terms: RowTerms) -> bool:
        step = len(terms.m) // PROBE_ROWS
        if step < 4:  # a look at all rows costs little more
            return True
        probe = sparse.choose(sparse.every(terms, step), self.problem.grad_tolerance)
        return int(probe.kept.sum()) <= PROBE_SHARE * len(probe.kept)

    def _add_all(self, chunk: Pending) -> None:
        out = rows.gradient_buffer(chunk.terms.y, self.problem.operand)
        dy = rows.row_gradient(chunk.terms, out)
        if self.needs.hidden:
            self._dh_of(chunk, dy, self.problem.weight)
        if self.needs.weight:
            self.dw.add_product(dy, chunk.hidden, chunk.scale)
        if self.needs.bias:
            self.db += dy.sum(0, dtype=self.db.dtype) * chunk.scale

    def _add_some(self, chunk: Pending, choice: Choice, kept: int, fresh: int) -> None:
        words = torch.nonzero_static(choice.kept, size=kept)[:, 0]
        weight = self.problem.weight[words]
        terms = sparse.of_words(chunk.terms, words)
        left_out = choice.row_sums - rows.column_mass(terms)[1]
        dy = rows.row_gradient(terms, rows.gradient_buffer(terms.y, self.problem.operand))
        if self.needs.hidden:
            correction = left_out[:, None] * sparse.mean_word(choice, self.problem.weight)
            self._dh_of(chunk, dy, weight, correction)
        if self.needs.weight:
            first_seen = torch.nonzero_static(chunk.fresh, size=fresh)[:, 0]
            product = self.dw.empty(kept)
            self.dw.add(words, first_seen, gemm(product, dy.t(), chunk.hidden, alpha=chunk.scale))
        if self.needs.bias:
            self.db.index_add_(0, words, dy.sum(0, dtype=self.db.dtype), alpha=chunk.scale)
        self.dropped += choice.dropped * chunk.scale
        self.mass += choice.total * chunk.scale

    def _dh_of(
        self, chunk: Pending, dy: Tensor, weight: Tensor, correction: Tensor | None = None
    ) -> None:
        whole = isinstance(chunk.tokens, slice)
        dh = self.dh[chunk.tokens] if whole else self.dh.new_empty(chunk.hidden.shape)
        gemm(dh, dy, weight, alpha=chunk.scale)
        if correction is not None:
            dh.add_(correction, alpha=chunk.scale)
        if not whole:
            self.dh[chunk.tokens] = dh


class WordSum:
    """Sum (V, D) of matrices that have rows for some words each, held for all that any of them has;
    whole once these are many.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, like: Tensor) -> None:
        self.shape, self.dtype, self.like = shape, dtype, like
        self.whole: Tensor | None = None
        self.words = like.new_empty(0, dtype=torch.int64)  # (K,), as they came
        self.values = self.empty(0)  # (K or more, D)
        self.place = like.new_empty(0, dtype=torch.int64)  # (V,) of a word in values

    def empty(self, count: int) -> Tensor:
        return large_empty((count, self.shape[1]), self.dtype, self.like)

    def make_whole(self) -> Tensor:
        if self.whole is None:
            self.whole = self.empty(self.shape[0]).zero_()
            self.whole.index_copy_(0, self.words, self.values[: len(self.words)])
            self.values, self.words = self.values[:0], self.words[:0]
        return self.whole

    def add_product(self, dy: Tensor, hidden: Tensor, alpha: float) -> None:
        """dy^T hidden, all words."""
        is_first = self.whole is None and len(self.words) == 0
        if is_first:
            self.whole = self.empty(self.shape[0])
        gemm(self.make_whole(), dy.t(), hidden, accumulate=not is_first, alpha=alpha)

    def add(self, words: Tensor, fresh: Tensor, values: Tensor) -> None:
        """Rows of these words, of which `fresh` come for the first time."""
        before, count = len(self.words), len(self.words) + len(fresh)
        if self.whole is None and count > UNION * self.shape[0]:
            self.make_whole()
        if self.whole is not None:
            self.whole.index_add_(0, words, values)
            return
        if before == 0:
            self.place = words.new_empty(self.shape[0])
        self.place[fresh] = torch.arange(before, count, device=fresh.device)
        self.words = torch.cat([self.words, fresh])
        if before == 0:
            self.values = values
            return
        if count > len(self.values):
            grown = self.empty(int(GROWTH * count))
            grown[:before] = self.values[:before]
            self.values = grown
        self.values[before:count] = 0
        self.values.index_add_(0, self.place[words], values)

    def result(self) -> tuple[Tensor, Tensor]:
        """All rows (V, D) and (0,); or those of some words (K, D), others being 0, and these
        (K,).
        """
        if self.whole is not None:
            return self.whole, self.words
        return self.values[: len(self.words)], self.words
