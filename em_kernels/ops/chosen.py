"""Chosen entries of each row: several targets, and the k largest with the sum of all others.

They are collected part by part of the vocabulary: slabs, and the ranks' shards.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import reference
from ..kernels import FinishedRows
from ..reference import RowTransform
from .inputs import part_of
from .vocab_parallel import VocabularyShard

# Logits whose z is copied at a time; a GPU launches a dozen kernels for each block, and waits once.
CPU_BLOCK, GPU_BLOCK = 1 << 21, 1 << 24


class TopEntries(NamedTuple):
    """The largest z of each row, and the sum of e^(z - rest_max) over all others."""

    z: Tensor  # (rows, k) descending; fewer than k where the part is small
    indices: Tensor  # (rows, k) int64, ascending among equal z
    rest_max: Tensor  # (rows,) the largest of the others; -inf where there are none
    rest_sum: Tensor  # (rows,)


class ChosenEntries:
    """Collect the chosen entries of the same rows from all parts of the vocabulary."""

    def __init__(self, targets: Tensor | None, top_k: int = 0) -> None:
        several = targets is not None and targets.dim() == 2
        self.targets = targets if several else None  # (rows, K), over the whole vocabulary
        self.top_k = top_k
        self.target_logits: Tensor | None = None  # (rows, K) z
        self.top: TopEntries | None = None

    def add(self, y: Tensor, row: RowTransform, start: int) -> None:
        """Add a part of the vocabulary, which begins at entry `start`."""
        if self.targets is not None:
            z = reference.target_logits(y, row)
            earlier = self.target_logits
            self.target_logits = z if earlier is None else torch.maximum(earlier, z)
        if self.top_k > 0:
            blocks = [_top_of(z, self.top_k, start) for z in _transformed(y, row)]
            part = TopEntries(*(torch.cat(field) for field in zip(*blocks, strict=True)))
            self.top = part if self.top is None else _merged([self.top, part], self.top_k)

    def gather(self, shard: VocabularyShard) -> None:
        """Merge what the ranks have found in their shards, to the same on all of them."""
        if self.target_logits is not None:
            shard.maximum(self.target_logits)
        if self.top is not None:
            z, indices, *rest = self.top
            # A rank of few entries also sends some that are -inf, behind the whole vocabulary.
            missing = (0, self.top_k - z.shape[1])
            z = pad(z, missing, value=-torch.inf)
            indices = pad(indices + shard.start, missing, value=sum(shard.sizes))
            floats = shard.all_gather(torch.cat([z, torch.stack(rest, dim=1)], dim=1))
            ranks = zip(floats, shard.all_gather(indices), strict=True)
            parts = [TopEntries(x[:, :-2], i, x[:, -2], x[:, -1]) for x, i in ranks]
            self.top = _merged(parts, self.top_k)

    def finish(self, rows: FinishedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Return log p of the targets and the largest entries, these' indices, and the tail's.

        Shapes: (rows, K + k), (rows, k), and (rows,), or 0 without top_k.
        """
        nan_unless_finite = rows.m - rows.m
        chosen = [rows.m.new_empty(len(rows.m), 0)]
        if self.targets is not None and self.target_logits is not None:
            ignored: Tensor = self.targets == reference.IGNORE_INDEX
            log_p = _log_p(self.target_logits.masked_fill(ignored, 0), rows)
            chosen.append(log_p.masked_fill(ignored, 0))
        if self.top is None:
            indices = torch.empty_like(chosen[0], dtype=torch.int64)
            return torch.cat(chosen, dim=1), indices, rows.m.new_empty(0)
        z, indices, rest_max, rest_sum = self.top
        first = torch.arange(self.top_k, device=z.device)
        indices = torch.where(nan_unless_finite[:, None].isnan(), first, indices)
        tail = _log_p(rest_max[:, None], rows)[:, 0] + torch.log(rest_sum)
        return torch.cat([*chosen, _log_p(z, rows)], dim=1), indices, tail


def _log_p(z: Tensor, rows: FinishedRows) -> Tensor:
    log_s = rows.log_s + (rows.m - rows.m)  # NaN for a broken row
    return (z - rows.m[:, None]) - log_s[:, None]


def _transformed(y: Tensor, row: RowTransform) -> Iterator[Tensor]:
    """Yield z of some rows at a time, once for no rows; in the same memory wherever it can be."""
    block = GPU_BLOCK if y.is_cuda else CPU_BLOCK
    length = max(1, block // y.shape[1])
    is_linear = row.softcap is None and row.logit_scale > 0  # then -inf stays -inf
    memory = y.new_empty((min(length, len(y)), y.shape[1]) if is_linear else 0)
    for start in range(0, max(1, len(y)), length):
        rows = slice(start, start + length)
        of_rows, part = part_of(row._replace(targets=None), rows), y[rows]
        if not is_linear:
            yield reference.transform(part, of_rows)
            continue
        z = memory[: len(part)]  # reference.transform's steps, without its copies
        if of_rows.bias is not None:
            part = torch.add(part, of_rows.bias.to(y.dtype), out=z)
        if row.logit_scale != 1:
            part = torch.mul(part, row.logit_scale, out=z)
        yield torch.mul(part, of_rows.inv_temperature[:, None], out=z)


def _top_of(z: Tensor, top_k: int, start: int) -> TopEntries:
    """Find the largest entries of z (rows, V), which is overwritten and begins at `start`."""
    count = min(top_k, z.shape[1])
    values, indices = z.topk(min(count + 1, z.shape[1]), dim=1)
    cut = (values[:, count - 1 : count] == values[:, count:]).any(1).nonzero()[:, 0]
    values, indices = values[:, :count], indices[:, :count]
    if len(cut) > 0:  # topk took any of several entries that equal the last
        indices[cut] = z[cut].sort(dim=1, descending=True, stable=True).indices[:, :count]
    values, indices = _ordered(values, indices)
    z.scatter_(1, indices, -torch.inf)
    rest_max = z.amax(1)
    rest_sum = z.sub_(_finite(rest_max)[:, None]).exp_().sum(1)
    return TopEntries(values, indices + start, rest_max, rest_sum)


def _merged(parts: list[TopEntries], top_k: int) -> TopEntries:
    z, indices = (torch.cat(field, dim=1) for field in list(zip(*parts, strict=True))[:2])
    z, indices = _ordered(z, indices)
    rest_max = torch.stack([part.rest_max for part in parts], dim=1)
    rest_sum = torch.stack([part.rest_sum for part in parts], dim=1)
    losers = z[:, top_k:]
    others = torch.cat([losers, rest_max], dim=1)
    weights = torch.cat([torch.ones_like(losers), rest_sum], dim=1)
    largest = others.amax(1)
    merged_sum = (weights * torch.exp(others - _finite(largest)[:, None])).sum(1)
    return TopEntries(z[:, :top_k], indices[:, :top_k], largest, merged_sum)


def _ordered(z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row by z, descending, and equal z by index, ascending."""
    indices, order = indices.sort(dim=1)
    z, order = z.gather(1, order).sort(dim=1, descending=True, stable=True)
    return z, indices.gather(1, order)


def _finite(largest: Tensor) -> Tensor:
    """Return what to subtract from z: -inf less -inf would be NaN."""
    return largest.clamp(min=torch.finfo(largest.dtype).min)
