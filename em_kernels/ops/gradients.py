"""Gradients of hidden, weight and bias, added up chunk by chunk: (9) over all columns of dy, or
over those that sparse.py chooses.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..kernels import RowTerms
from . import sparse
from .gemm import gemm
from .inputs import Needs, Problem, large_empty
from .sparse import Choice, Counts

PROBE_ROWS = 64  # of a chunk: whether a look at all its rows can pay
PROBE_SHARE = 0.4  # of the columns; all rows together need more
MOST_COLUMNS = 0.5  # that pay: at 0.48 a CPU took 0.7 of the dense time, at 0.6 1.3 (LOG.md)
UNION = 0.5  # of the words: with more, dweight is held whole
GROWTH = 1.5
SLAB_BYTES = 64 << 20  # of a slab of columns: logits, dy, rows of weight and dweight
SLAB_WORDS = 512  # at least
# Chunks whose dy a GPU multiplies together: fp32 dweight is read and written once for all of them.
# Counted for N = 8192, D = 4096, V = 151936 in 1 GiB: 17 GB instead of 37; at 8 a chunk of logits
# has so few rows that the weight is read too often.
TOGETHER = 4

# (words, values): these words' rows (K, D) of a part of dweight, in the accumulation dtype, to be
# added to what came before; words are a slice, or distinct indices (K,). The values may be
# overwritten, and are when the next ones come.
Sink = Callable[[slice | Tensor, Tensor], object]


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
    fresh: Tensor | None  # (V,) bool, columns chosen for the first time
    counts: Counts | None  # of both


class Sums:
    """begin() queues what leads to the choice of a chunk's columns, finish() needs their number:
    in between a GPU can begin the next chunk.
    """

    def __init__(self, problem: Problem, needs: Needs, sink: Sink | None = None) -> None:
        hidden, weight, wide = problem.hidden, problem.weight, problem.dtype
        self.problem, self.needs = problem, needs
        self.dh = hidden.new_zeros(hidden.shape if needs.hidden else (0,), dtype=wide)
        self.db = hidden.new_zeros(len(weight) if needs.bias else 0, dtype=wide)
        self.dw: WordSum | WordSink = WordSum(weight.shape, wide, hidden)
        if sink is not None:
            self.dw = WordSink(sink, weight.shape, wide, hidden)
        self.tolerance = problem.grad_tolerance if needs.hidden or needs.weight else 0.0
        # in_range_of waits for fp16
        overlaps = self.tolerance > 0 and hidden.is_cuda and problem.operand != torch.float16
        self.buffers = 2 if overlaps else 1  # chunks between begin() and finish()
        gathers = self.tolerance == 0 and needs.weight and problem.dy_is_apart
        # a dy in fp16 has a scale of its own for each chunk
        self.together = TOGETHER if gathers and problem.operand != torch.float16 else 1
        self.room = 0  # rows of dy that may wait to be multiplied together; 0: none
        self.dy: Tensor | None = None  # (room, stride)
        self.tokens: list[slice | Tensor] = []  # of these
        self.filled = 0  # rows
        self.seen: Tensor | None = None  # (V,) bool
        self.failures = self.dense_ahead = 0
        self.multiplied = self.of = 0  # columns times rows
        self.dropped, self.mass = hidden.new_zeros(2, dtype=wide)

    def begin(
        self, tokens: slice | Tensor, hidden: Tensor, terms: RowTerms, scale: float
    ) -> Pending:
        dense = Pending(tokens, hidden, terms, scale, None, None, None)
        if self.tolerance == 0:
            return dense
        if self.dense_ahead > 0:
            self.dense_ahead -= 1
            return dense
        if (self.seen is None or self.failures > 0) and not self._can_pay(terms):
            self._fail()
            return dense
        if self.seen is None:
            self.seen = torch.zeros(terms.y.shape[1], dtype=torch.bool, device=terms.y.device)
        choice = sparse.choose(terms, self.tolerance)
        fresh = choice.kept & ~self.seen
        self.seen |= choice.kept
        counts = Counts(choice.kept.sum(), fresh.sum())
        return dense._replace(choice=choice, fresh=fresh, counts=counts)

    def finish(self, chunk: Pending) -> None:
        count, columns = chunk.terms.y.shape
        kept = columns
        if chunk.choice is not None:
            assert chunk.counts is not None and chunk.fresh is not None
            kept, fresh = chunk.counts.read()
        if chunk.choice is not None and kept <= MOST_COLUMNS * columns:
            self.failures = 0
            words = torch.nonzero_static(chunk.choice.kept, size=kept)[:, 0]
            self._add_some(chunk, chunk.choice, words, chunk.fresh, fresh)
        else:
            if chunk.choice is not None:
                self._fail()
            kept = columns
            self._add_all(chunk)
        self.multiplied += count * kept
        self.of += count * columns

    def result(self) -> Gradients:
        """Finish the gradients of all chunks; a collective call where the vocabulary is split."""
        self._multiply_waiting()
        self.dy = None
        if self.needs.hidden and self.problem.shard is not None:
            self.problem.shard.sum(self.dh)
        dw, words = self.dh.new_empty(0), self.dh.new_empty(0, dtype=torch.int64)
        if self.needs.weight:
            dw, words = self.dw.result(whole=self.problem.grad_tolerance == 0)
        share = self.dh.new_full((), self.multiplied / max(1, self.of))
        dropped = self.dropped / torch.where(self.mass > 0, self.mass, 1)
        return Gradients(self.dh, dw, self.db, words, torch.stack([share, dropped]))

    def _can_pay(self, terms: RowTerms) -> bool:
        """By some of the rows."""
        step = len(terms.m) // PROBE_ROWS
        if step < 4:  # a look at all rows costs little more
            return True
        probe = sparse.choose(sparse.of_rows(terms, step), self.tolerance)
        return int(probe.kept.sum()) <= PROBE_SHARE * len(probe.kept)

    def _fail(self) -> None:
        """Some chunks go without a look, twice as many each time, so that looks cost next to
        nothing; a GPU then has one larger buffer instead of two.
        """
        self.dense_ahead = 1 << self.failures
        self.failures += 1
        if self.problem.shard is None:  # ranks must have chunks alike
            self.buffers = 1

    def _add_all(self, chunk: Pending) -> None:
        y = chunk.terms.y
        if self.room == 0:
            dy = kernels.row_gradient(chunk.terms, kernels.gradient_buffer(y, self.problem.operand))
            self._multiply(chunk.tokens, chunk.hidden, dy, chunk.scale)
            return
        if self.filled + len(y) > self.room:
            self._multiply_waiting()
        if self.dy is None:
            self.dy = y.new_empty(self.room, y.stride(0), dtype=self.problem.operand)
        end = self.filled + len(y)
        kernels.row_gradient(chunk.terms, self.dy[self.filled : end, : y.shape[1]])
        self.tokens.append(chunk.tokens)
        self.filled = end

    def _multiply_waiting(self) -> None:
        """Multiply the dy that waits from several chunks; their tokens are adjacent, or a list."""
        if self.filled == 0:
            return
        assert self.dy is not None
        first, last = self.tokens[0], self.tokens[-1]
        if isinstance(first, slice):
            assert isinstance(last, slice)
            tokens: slice | Tensor = slice(first.start, last.stop)
        else:
            tokens = torch.cat(self.tokens)  # type: ignore[arg-type]  # all of a kind
        dy = self.dy[: self.filled, : len(self.problem.weight)]
        self._multiply(tokens, self.problem.hidden[tokens], dy, 1.0)
        self.tokens, self.filled = [], 0

    def _multiply(self, tokens: slice | Tensor, hidden: Tensor, dy: Tensor, scale: float) -> None:
        if self.needs.hidden:
            dh = self._dh_of(tokens, hidden)
            self._put(tokens, gemm(dh, dy, self.problem.weight, alpha=scale))
        if self.needs.weight:
            self.dw.add_all(dy, hidden, scale)
        if self.needs.bias:
            self.db += dy.sum(0, dtype=self.db.dtype) * scale

    def _add_some(
        self, chunk: Pending, choice: Choice, words: Tensor, fresh: Tensor | None, new: int
    ) -> None:
        """By slabs of words, so that beside the chunk little memory is needed."""
        weight, wide, operand = self.problem.weight, self.problem.dtype, self.problem.operand
        word_bytes = len(chunk.hidden) * (wide.itemsize + operand.itemsize)
        word_bytes += weight.shape[1] * (wide.itemsize + weight.dtype.itemsize)
        length = max(SLAB_WORDS, min(SLAB_BYTES, chunk.terms.y.nbytes) // word_bytes)
        dh = self.dh
        if self.needs.hidden:
            dh = self._dh_of(chunk.tokens, chunk.hidden).zero_()
        left_out = choice.row_sums.clone()
        is_first = False
        if self.needs.weight:
            assert fresh is not None
            is_first = self.dw.extend(torch.nonzero_static(fresh, size=new)[:, 0])
        for start in range(0, len(words), length):
            some = words[start : start + length]
            terms = sparse.of_words(chunk.terms, some)
            if self.needs.hidden:
                left_out -= kernels.column_mass(terms)[1]
            dy = kernels.row_gradient(terms, kernels.gradient_buffer(terms.y, operand))
            if self.needs.hidden:
                gemm(dh, dy, weight[some], accumulate=True, alpha=chunk.scale)
            if self.needs.weight:
                at = slice(start, start + length) if is_first else None
                self.dw.add_some(dy, chunk.hidden, chunk.scale, some, at)
            if self.needs.bias:
                self.db.index_add_(0, some, dy.sum(0, dtype=wide), alpha=chunk.scale)
        if self.needs.hidden:
            dh.addr_(left_out, sparse.mean_word(choice, weight), alpha=chunk.scale)
            self._put(chunk.tokens, dh)
        self.dropped += choice.dropped * chunk.scale
        self.mass += choice.total * chunk.scale

    def _dh_of(self, tokens: slice | Tensor, hidden: Tensor) -> Tensor:
        """Memory for these tokens' dhidden: the whole's own where they are neighbours."""
        if isinstance(tokens, slice):
            return self.dh[tokens]
        return self.dh.new_empty(hidden.shape)

    def _put(self, tokens: slice | Tensor, dh: Tensor) -> None:
        if not isinstance(tokens, slice):
            self.dh[tokens] = dh


class WordSum:
    """Sum (V, D) of products dy^T hidden that have rows for some words each, held for all words
    that any of them has; whole once these are many.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, like: Tensor) -> None:
        self.shape, self.dtype, self.like = shape, dtype, like
        self.whole: Tensor | None = None
        self.words = like.new_empty(0, dtype=torch.int64)  # (K,), as they came
        self.values = self.empty(0)  # (K or more, D)
        self.place = self.words  # (V,) of a word in values

    def empty(self, count: int) -> Tensor:
        return large_empty((count, self.shape[1]), self.dtype, self.like)

    def make_whole(self) -> Tensor:
        if self.whole is None:
            self.whole = self.empty(self.shape[0]).zero_()
            self.whole.index_copy_(0, self.words, self.values[: len(self.words)])
            self.values, self.words = self.empty(0), self.words.new_empty(0)
        return self.whole

    def add_all(self, dy: Tensor, hidden: Tensor, alpha: float) -> None:
        """dy^T hidden, all words."""
        is_first = self.whole is None and len(self.words) == 0
        if is_first:
            self.whole = self.empty(self.shape[0])
        gemm(self.make_whole(), dy.t(), hidden, accumulate=not is_first, alpha=alpha)

    def extend(self, fresh: Tensor) -> bool:
        """Make room for words that come for the first time; whether they are the very first, which
        then have the first rows, not yet written.
        """
        before, count = len(self.words), len(self.words) + len(fresh)
        if self.whole is None and count > UNION * self.shape[0]:
            self.make_whole()
        if self.whole is not None:
            return False
        if before == 0:
            self.words, self.values = fresh, self.empty(count)
            self.place = fresh.new_empty(self.shape[0])
        elif count > len(self.values):
            size = max(count, int(min(GROWTH * count, UNION * self.shape[0])))
            values = self.empty(size)
            values[:before] = self.values[:before]
            self.values = values
        if before > 0:
            self.words = torch.cat([self.words, fresh])
            self.values[before:count] = 0
        self.place[fresh] = torch.arange(before, count, device=fresh.device)
        return before == 0

    def add_some(
        self, dy: Tensor, hidden: Tensor, alpha: float, words: Tensor, at: slice | None
    ) -> None:
        """dy^T hidden of words that extend() has seen; `at`: the rows of the very first."""
        if at is not None:
            gemm(self.values[at], dy.t(), hidden, alpha=alpha)
            return
        product = gemm(self.empty(len(words)), dy.t(), hidden, alpha=alpha)
        if self.whole is not None:
            self.whole.index_add_(0, words, product)
        else:
            self.values.index_add_(0, self.place[words], product)

    def result(self, whole: bool) -> tuple[Tensor, Tensor]:
        """All rows (V, D) and (0,); or, unless they must be whole, those of some words (K, D),
        others being 0, and these (K,).
        """
        if whole or self.whole is not None:
            return self.make_whole(), self.words
        return self.values[: len(self.words)], self.words


class WordSink:
    """WordSum's part where the sum is not held: a sink gets the products, slab by slab of words,
    each in the same memory.
    """

    def __init__(self, sink: Sink, shape: torch.Size, dtype: torch.dtype, like: Tensor) -> None:
        length = max(SLAB_WORDS, SLAB_BYTES // (shape[1] * dtype.itemsize))
        length = length // 16 * 16  # a GPU reads dy^T fast from there
        self.sink = sink
        self.values = large_empty((min(length, shape[0]), shape[1]), dtype, like)

    def add_all(self, dy: Tensor, hidden: Tensor, alpha: float) -> None:
        for start in range(0, dy.shape[1], len(self.values)):
            words = slice(start, min(start + len(self.values), dy.shape[1]))
            self.add_some(dy[:, words], hidden, alpha, words)

    def extend(self, fresh: Tensor) -> bool:
        return False

    def add_some(
        self, dy: Tensor, hidden: Tensor, alpha: float, words: slice | Tensor, at: object = None
    ) -> None:
        values = self.values[: dy.shape[1]]
        self.sink(words, gemm(values, dy.t(), hidden, alpha=alpha))

    def result(self, whole: bool) -> tuple[Tensor, Tensor]:
        return self.values.new_empty(0), self.values.new_empty(0, dtype=torch.int64)
