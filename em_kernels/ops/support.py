"""Supports: the vocabulary entries that each token's distribution is restricted to.

They are listed token after token, as the column indices of a sparse CSR matrix; a token without any
has the whole vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import IGNORE_INDEX

MAX_SPARSE_SHARE = 1 / 16  # of all logits; up to it only the listed ones are computed


class Support(NamedTuple):
    """Vocabulary entries of N tokens."""

    indices: Tensor  # (nnz,) int64
    offsets: Tensor  # (N + 1,) int64; token i has indices[offsets[i] : offsets[i + 1]]

    @property
    def counts(self) -> Tensor:
        return self.offsets.diff()

    @property
    def row_of(self) -> Tensor:
        """Return the token that each index belongs to (nnz,)."""
        return torch.repeat_interleave(self.counts, output_size=len(self.indices))

    def is_sparse(self, vocab_size: int) -> bool:
        """Return whether computing only the listed logits pays; waits for the device."""
        counts = self.counts
        few = len(self.indices) <= MAX_SPARSE_SHARE * len(counts) * vocab_size
        return few and bool((counts > 0).all())

    def positions_of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return where these tokens' indices are, and which of the tokens each belongs to."""
        counts = self.counts[tokens]
        row_of = torch.repeat_interleave(counts)
        begin = self.offsets[tokens] - (counts.cumsum(0) - counts)
        return begin[row_of] + torch.arange(len(row_of), device=row_of.device), row_of

    def of(self, tokens: slice | Tensor) -> "Support":
        """Return the support of some tokens; a slice stands for all."""
        if isinstance(tokens, slice):
            return self
        positions, _ = self.positions_of(tokens)
        offsets = torch.nn.functional.pad(self.counts[tokens].cumsum(0), (1, 0))
        return Support(self.indices[positions], offsets)

    def places_of(self, targets: Tensor, vocab_size: int) -> Tensor:
        """Return where among its token's entries each target is, -1 for those that are none."""
        if len(self.indices) == 0:
            return torch.full_like(targets, -1)
        keys, order = (self.row_of * vocab_size + self.indices).sort()
        first = torch.arange(len(self.counts), device=keys.device) * vocab_size
        begin = self.offsets[:-1]
        if targets.dim() == 2:
            first, begin = first[:, None], begin[:, None]
        found = torch.searchsorted(keys, first + targets).clamp(max=len(keys) - 1)
        is_entry = (keys[found] == first + targets) & (targets >= 0)
        return torch.where(is_entry, order[found] - begin, -1)

    def check(self, vocab_size: int, targets: Tensor | None, mask: Tensor | None) -> None:
        """Check the values, and that the targets of the tokens that count are in the support."""
        indices, offsets, counts = self.indices, self.offsets, self.counts
        wrong = (indices < 0) | (indices >= vocab_size)
        is_falling = (counts < 0).any() | (offsets[0] != 0) | (offsets[-1] != len(indices))
        out_of_range, bad_offsets = torch.stack([wrong.sum(), is_falling]).tolist()
        if bad_offsets:
            raise ValueError(
                f"support: its offsets must ascend from 0 to the number of indices, {len(indices)}"
            )
        if out_of_range:
            raise ValueError(
                f"support: {out_of_range} indices out of range; they must be in [0, {vocab_size})"
            )
        keys = (self.row_of * vocab_size + indices).sort().values
        twice = keys[1:][keys.diff() == 0][:1].tolist()
        if twice:
            token, entry = divmod(twice[0], vocab_size)
            raise ValueError(
                f"support: token {token} lists entry {entry} more than once; list it once"
            )
        if targets is None:
            return
        targets = targets if targets.dim() == 2 else targets[:, None]
        outside = (self.places_of(targets, vocab_size) < 0) & (targets != IGNORE_INDEX)
        counts_if = counts > 0 if mask is None else (counts > 0) & (mask != 0)
        found = (outside & counts_if[:, None]).nonzero()[:1].tolist()
        if found:
            token, column = found[0]
            raise ValueError(
                f"support: token {token} (flat position) has target {targets[token, column]} "
                f"outside its support; add it there, or give {IGNORE_INDEX}"
            )


class DenseSupport:
    """Remove from chunks of dense logits, all tokens' or a slab's, what is outside the support."""

    def __init__(self, support: Support) -> None:
        self.indices, self.row_of = support.indices, support.row_of
        self.is_restricted = (support.counts > 0)[:, None]

    def mask(self, y: Tensor, start: int = 0) -> None:
        """Set to -inf the logits outside, in place; the vocabulary entries of y begin at start."""
        is_here = (self.indices >= start) & (self.indices < start + y.shape[1])
        place = self.row_of[is_here], self.indices[is_here] - start
        inside = y[place]
        y.masked_fill_(self.is_restricted, -torch.inf)
        y[place] = inside
