"""Gradient of the weight, added up chunk by chunk: held for the entries that need it, or streamed.

Both classes take products dy^T hidden, over all vocabulary entries or over some.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .gemm import gemm
from .memory import large_empty

# Above this share of the vocabulary dweight is held whole: an index then saves little memory.
MAX_SPARSE_SHARE = 0.5
GROWTH = 1.5
SLAB_BYTES = 64 << 20  # for a slab of vocabulary entries: its logits, dy, weight and dweight
MIN_SLAB_ENTRIES = 512
KEPT_SLAB_BYTES = 16 << 20  # of the fp32 product that a 16-bit dweight is rounded from

# Called with (entries, values): values (K, D) in the accumulation dtype, to be added to dweight's
# rows `entries`, a slice or distinct indices (K,). The callback may overwrite the values; the next
# call reuses their memory.
WeightGradCallback = Callable[[slice | Tensor, Tensor], object]


def slab_length(entry_bytes: int, budget: int | None = None) -> int:
    """Return how many vocabulary entries one slab holds."""
    limit = SLAB_BYTES if budget is None else min(SLAB_BYTES, budget)
    return max(MIN_SLAB_ENTRIES, limit // entry_bytes)


class SparseWeightGrad:
    """Sum (V, D) of products, held for the vocabulary entries that any product has.

    Once these are many it is held whole. row_of (V,) is each entry's row while it is not; a row
    that make_room() has not yet seen is none.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, like: Tensor) -> None:
        self.shape, self.dtype, self.like = shape, dtype, like
        self.whole: Tensor | None = None
        self.count = 0  # rows held
        self.values = self._empty(0)  # (count or more, D)

    def _empty(self, count: int) -> Tensor:
        return large_empty((count, self.shape[1]), self.dtype, self.like)

    def _make_whole(self, row_of: Tensor) -> Tensor:
        if self.whole is None:
            self.whole = self._empty(self.shape[0]).zero_()
            if self.count > 0:
                self.whole.index_copy_(0, self._entries(row_of), self.values[: self.count])
            self.values, self.count = self._empty(0), 0
        return self.whole

    def _entries(self, row_of: Tensor) -> Tensor:
        """Return the entry of each row (count,)."""
        held = torch.nonzero_static((row_of >= 0) & (row_of < self.count), size=self.count)[:, 0]
        return torch.empty_like(held).index_copy_(0, row_of[held], held)

    def add_all(self, dy: Tensor, hidden: Tensor, alpha: float, row_of: Tensor) -> None:
        """Add alpha dy^T hidden, over all vocabulary entries."""
        is_first = self.whole is None and self.count == 0
        if is_first:
            self.whole = self._empty(self.shape[0])
        gemm(self._make_whole(row_of), dy.t(), hidden, accumulate=not is_first, alpha=alpha)

    def make_room(self, new_count: int, row_of: Tensor) -> bool:
        """Make room for vocabulary entries that come for the first time.

        Returns True if they are the very first: their rows ascend with them and are not yet
        written, and `add_some` has to be told each slab of rows.
        """
        old_count, count = self.count, self.count + new_count
        if self.whole is None and count > MAX_SPARSE_SHARE * self.shape[0]:
            self._make_whole(row_of)
        if self.whole is not None:
            return False
        self.count = count
        if old_count == 0:
            self.values = self._empty(count)
            return True
        if count > len(self.values):
            size = max(count, int(min(GROWTH * count, MAX_SPARSE_SHARE * self.shape[0])))
            values = self._empty(size)
            values[:old_count] = self.values[:old_count]
            self.values = values
        self.values[old_count:count] = 0
        return False

    def add_some(
        self, dy: Tensor, hidden: Tensor, alpha: float, entries: Tensor, rows: slice | Tensor
    ) -> None:
        """Add alpha dy^T hidden over entries whose rows make_room() has seen.

        A slice of rows is one in which nothing was written before.
        """
        if isinstance(rows, slice):
            gemm(self.values[rows], dy.t(), hidden, alpha=alpha)
            return
        product = gemm(self._empty(len(entries)), dy.t(), hidden, alpha=alpha)
        if self.whole is not None:
            self.whole.index_add_(0, entries, product)
        else:
            self.values.index_add_(0, rows, product)

    def result(self, row_of: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
        """Return rows of the sum, and their indices.

        All rows (V, D) and no indices, if `whole` or if the sum is held whole anyway; else the rows
        (K, D) of the entries that any product had, all others being 0, and their indices (K,).
        """
        if whole or self.whole is not None:
            return self._make_whole(row_of), row_of.new_empty(0)
        return self.values[: self.count], self._entries(row_of)


class StreamedWeightGrad:
    """Stand-in for SparseWeightGrad without a sum: a callback gets each product, slab by slab."""

    def __init__(
        self,
        on_weight_grad: WeightGradCallback,
        shape: torch.Size,
        dtype: torch.dtype,
        like: Tensor,
    ) -> None:
        length = slab_length(shape[1] * dtype.itemsize)
        length = length // 16 * 16  # aligned columns of dy, which a GPU reads fast
        self.on_weight_grad = on_weight_grad
        self.values = large_empty((min(length, shape[0]), shape[1]), dtype, like)

    def add_all(self, dy: Tensor, hidden: Tensor, alpha: float, row_of: Tensor) -> None:
        for start in range(0, dy.shape[1], len(self.values)):
            vocab_slice = slice(start, min(start + len(self.values), dy.shape[1]))
            self.add_some(dy[:, vocab_slice], hidden, alpha, vocab_slice)

    def make_room(self, new_count: int, row_of: Tensor) -> bool:
        return False

    def add_some(
        self,
        dy: Tensor,
        hidden: Tensor,
        alpha: float,
        entries: slice | Tensor,
        rows: slice | Tensor | None = None,
    ) -> None:
        values = self.values[: dy.shape[1]]
        self.on_weight_grad(entries, gemm(values, dy.t(), hidden, alpha=alpha))

    def result(self, row_of: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
        return self.values.new_empty(0), self.values.new_empty(0, dtype=torch.int64)


def multiply_kept_dy(
    dy: Tensor, dy_scales: Tensor, hidden: Tensor, upstream: Tensor, out: Tensor
) -> Tensor:
    """Write dweight = upstream * dy^T hidden into out (V, D), rounded once; return out.

    Args:
        dy: (n, V or more), in the dtype of the GEMM.
        dy_scales: (chunks, 2) rows of dy, and the scale that their product lacks.
        hidden: (n, D) of the same tokens.
        upstream: () gradient of the loss.
    """
    entries, width = out.shape
    wide = upstream.dtype
    is_one = upstream.is_cpu and upstream.item() == 1  # a GPU would have to be waited for
    length = entries
    if out.dtype != wide:
        length = min(entries, max(16, KEPT_SLAB_BYTES // (width * wide.itemsize) // 16 * 16))
        slab = large_empty((length, width), wide, out)
    chunks = [(int(count), scale) for count, scale in dy_scales.tolist()]
    for start in range(0, entries, length):
        rows = out[start : start + length]
        product = rows if out.dtype == wide else slab[: len(rows)]
        first = 0
        for count, scale in chunks:
            tokens = slice(first, first + count)
            part = dy[tokens, start : start + len(rows)]
            gemm(product, part.t(), hidden[tokens], accumulate=first > 0, alpha=scale)
            first = tokens.stop
        if not is_one:
            product.mul_(upstream)
        if product is not rows:
            rows.copy_(product)
    return out
