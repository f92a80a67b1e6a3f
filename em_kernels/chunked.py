"""The loops: GEMM -> row statistics -> row gradient -> GEMMs, never holding all logits.

Plain functions on flat tensors: hidden (N, D), weight (V, D). Work is counted in units of N*D*V;
one GEMM over the whole vocabulary costs 2. Gradients come back unmultiplied by the caller's
upstream.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .checks import check_values
from .gemm import accumulation_dtype, gemm
from .parallel import VocabularyShard
from .reference import TokenStats
from .rows import kernels_for

MAX_CHUNK_BYTES = 1 << 30  # fp32 dW is read and written once a chunk: few, large chunks


class Transform(NamedTuple):
    """How raw logits become z; temperature is a number or (N,)."""

    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None


class Needs(NamedTuple):
    """Which gradients the caller wants; one that is not wanted comes back with size 0."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Chunk(NamedTuple):
    """Some tokens, their raw logits, and what one pass over those found."""

    tokens: slice | Tensor  # where they stand among the N
    hidden: Tensor  # (n, D)
    y: Tensor  # (n, V) raw logits, free to overwrite
    row_arguments: tuple  # bias, inv_temperature, logit_scale, softcap, targets
    m: Tensor  # (n,)
    log_s: Tensor  # (n,)
    stats: TokenStats


class Slab(NamedTuple):
    """Some words, and all tokens' raw logits of them."""

    words: slice  # where they stand in the weight
    weight: Tensor  # (v, D)
    y: Tensor  # (N, v) raw logits, free to overwrite
    row_arguments: tuple  # as a Chunk's


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor on this device could take now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        return int(kib) << 10
    except (OSError, StopIteration):  # not Linux
        return 8 * MAX_CHUNK_BYTES


def chunk_length(total: int, bytes_each: int, chunk_bytes: int | None, device: torch.device) -> int:
    """How many of `total` rows (or columns) of logits fit in the budget, split evenly.

    The default is a power of two, so that what else runs seldom changes the order of sums.
    """
    if chunk_bytes is not None and chunk_bytes < bytes_each:
        raise ValueError(
            f"chunk_bytes: {chunk_bytes} is less than one row (or column) of logits takes; "
            f"give at least {bytes_each}"
        )
    budget = chunk_bytes or 1 << (min(MAX_CHUNK_BYTES, free_bytes(device) // 8).bit_length() - 1)
    fitting = max(1, budget // max(1, bytes_each))
    pieces = max(1, -(-total // fitting))
    return max(1, -(-total // pieces))


def _at(x: Tensor | None, tokens: slice | Tensor) -> Tensor | None:
    return None if x is None else x[tokens]


def inv_temperature(transform: Transform, tokens: slice | Tensor, like: Tensor) -> Tensor:
    """1 / temperature of each of like's rows, in like's dtype."""
    tau = transform.temperature
    if isinstance(tau, Tensor):
        return 1 / tau[tokens].to(like.dtype)
    return torch.full(like.shape[:1], 1 / tau, dtype=like.dtype, device=like.device)


def _logit_bytes(hidden: Tensor) -> int:
    """Of one logit, and on CUDA of its gradient in the 16 bits that the GEMM wants."""
    wide = accumulation_dtype(hidden.dtype)
    return wide.itemsize + (hidden.dtype.itemsize if hidden.is_cuda and hidden.dtype != wide else 0)


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    transform: Transform,
    active: Tensor | None,
    chunk_bytes: int | None,
    shard: VocabularyShard | None,
) -> Iterator[Chunk]:
    """Token-major: some tokens' logits at a time, in one reused buffer, and their statistics."""
    wide = accumulation_dtype(hidden.dtype)
    count = len(hidden) if active is None else len(active)
    sizes = [len(weight)] if shard is None else shard.sizes
    length = chunk_length(count, max(sizes) * _logit_bytes(hidden), chunk_bytes, hidden.device)
    if shard is not None:
        length = shard.smallest(length)  # free memory differs, and every chunk is a collective call
    buffer = hidden.new_empty(min(length, count), len(weight), dtype=wide)
    kernels = kernels_for(buffer)
    for start in range(0, count, length):
        tokens = slice(start, start + length) if active is None else active[start : start + length]
        h = hidden[tokens]
        y = gemm(buffer[: len(h)], h, weight.t())
        tau = inv_temperature(transform, tokens, y)
        row_arguments = (transform.bias, tau, transform.logit_scale, transform.softcap, None)
        parts = kernels.row_statistics(y, *row_arguments)
        if shard is not None:
            parts = shard.merge(parts)
        stats = reference.statistics(parts, sum(sizes))
        yield Chunk(tokens, h, y, row_arguments, parts.m, torch.log1p(parts.s1), stats)


def _slabs(
    hidden: Tensor,
    weight: Tensor,
    transform: Transform,
    tokens: slice | Tensor,
    targets: Tensor | None,
    chunk_bytes: int | None,
) -> Iterator[Slab]:
    """Vocabulary-major: a slab of words at a time, all tokens' logits, in one reused buffer.

    hidden and targets are those of `tokens`. A backward computes the very logits of its forward:
    rounded in another order they would cost a sure token's small probabilities their digits.
    """
    wide = accumulation_dtype(hidden.dtype)
    # logits, their gradient in 16 bits for a CUDA GEMM, and in the backward the slab's fp32 dweight
    word_bytes = len(hidden) * _logit_bytes(hidden) + hidden.shape[1] * wide.itemsize
    length = chunk_length(len(weight), word_bytes, chunk_bytes, hidden.device)
    buffer = hidden.new_empty(len(hidden) * min(length, len(weight)), dtype=wide)
    for start in range(0, len(weight), length):
        words = slice(start, min(start + length, len(weight)))
        w = weight[words]
        y = gemm(buffer[: len(hidden) * len(w)].view(len(hidden), len(w)), hidden, w.t())
        row_arguments = (
            _at(transform.bias, words),
            inv_temperature(transform, tokens, y),
            transform.logit_scale,
            transform.softcap,
            None if targets is None else targets - start,
        )
        yield Slab(words, w, y, row_arguments)


def _row_gradient(
    y: Tensor,
    row_arguments: tuple,
    m: Tensor,
    log_s: Tensor,
    stats: TokenStats,
    upstream: TokenStats,
    vocab_size: int,
    operand: torch.dtype,
) -> Tensor:
    """Equation (8) into y, in the dtype that the backward GEMMs take."""
    factors = reference.coefficients(stats, upstream, vocab_size)
    dy = kernels_for(y).row_gradient(y, *row_arguments, m, log_s, factors)
    return dy.to(operand) if dy.is_cuda else dy


def gradients_in_forward(
    hidden: Tensor,
    weight: Tensor,
    transform: Transform,
    per_token: Callable[[TokenStats, slice | Tensor], tuple[Tensor, TokenStats]],
    *,
    needs: Needs,
    active: Tensor | None = None,
    chunk_bytes: int | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of per-token losses and its gradients, in one pass over the tokens.

    per_token(statistics of some tokens, which) -> their losses (n,), and the losses' derivatives as
    TokenStats. Returns loss (), dhidden (N, D), dweight (V, D), dbias (V,) in the accumulation
    dtype.
    Work: 2 without gradients, +2 for hidden, +2 for weight. Memory: one chunk and what is returned.
    """
    wide = accumulation_dtype(hidden.dtype)
    loss = hidden.new_zeros((), dtype=wide)
    dh = hidden.new_zeros(hidden.shape if needs.hidden else (0,), dtype=wide)
    dw = hidden.new_zeros(weight.shape if needs.weight else (0,), dtype=wide)
    db = hidden.new_zeros(len(weight) if needs.bias else 0, dtype=wide)
    vocab_size = len(weight) if shard is None else sum(shard.sizes)
    for chunk in _chunks(hidden, weight, transform, active, chunk_bytes, shard):
        losses, upstream = per_token(chunk.stats, chunk.tokens)
        loss += losses.sum()
        if not any(needs):
            continue
        dy = _row_gradient(
            chunk.y,
            chunk.row_arguments,
            chunk.m,
            chunk.log_s,
            chunk.stats,
            upstream,
            vocab_size,
            weight.dtype,
        )
        if needs.hidden:
            dh[chunk.tokens] = gemm(dh.new_empty(chunk.hidden.shape), dy, weight)
        if needs.weight:
            gemm(dw, dy.t(), chunk.hidden, accumulate=True)
        if needs.bias:
            db += dy.sum(0, dtype=wide)
    if needs.hidden and shard is not None:
        shard.sum(dh)
    return loss, dh, dw, db


def entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    transform: Transform,
    mask: Tensor | None,
    *,
    mean: bool,
    needs: Needs,
    chunk_bytes: int | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gradients_in_forward of entropy (3), weighted by mask; summed, or over the mask's sum."""
    active = check_values(mask, transform.temperature, None, 0, not mean)
    wide = accumulation_dtype(hidden.dtype)
    if mask is None or len(hidden) == 0:
        weights = None
        scale = hidden.new_tensor(1 / max(1, len(hidden)) if mean else 1.0, dtype=wide)
    else:
        weights = mask.to(wide)
        largest = weights.abs().max()  # 16-bit gradients stay in range whatever the mask's scale
        weights = weights / torch.where(largest == 0, 1, largest)
        total = mask.sum(dtype=wide)
        scale = largest / torch.where(total == 0, 1, total) if mean else largest

    def per_token(stats: TokenStats, tokens: slice | Tensor) -> tuple[Tensor, TokenStats]:
        assert stats.entropy is not None
        w = torch.ones_like(stats.entropy) if weights is None else weights[tokens]
        return w * stats.entropy, TokenStats(entropy=w)

    results = gradients_in_forward(
        hidden,
        weight,
        transform,
        per_token,
        needs=needs,
        active=active,
        chunk_bytes=chunk_bytes,
        shard=shard,
    )
    for result in results:
        result *= scale
    return results


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    transform: Transform,
    targets: Tensor | None,
    mask: Tensor | None,
    *,
    chunk_bytes: int | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics (5, N) in TokenStats' order, argmax (N,), and m, log s (N,) for the backward.

    Work: 2. Memory: one slab, and a copy of the tokens left where the mask leaves some out.
    """
    vocab_size, first = (len(weight), 0) if shard is None else (sum(shard.sizes), shard.start)
    active = check_values(mask, transform.temperature, targets, vocab_size, True)
    tokens: slice | Tensor = slice(None) if active is None else active
    goals = _at(targets, tokens)
    local_goals = None if goals is None else goals - first
    parts = None
    for slab in _slabs(hidden[tokens], weight, transform, tokens, local_goals, chunk_bytes):
        found = kernels_for(slab.y).row_statistics(slab.y, *slab.row_arguments)
        found = found._replace(argmax=found.argmax + slab.words.start)
        parts = found if parts is None else reference.merge([parts, found])
    assert parts is not None  # functional.py refuses an empty vocabulary
    if shard is not None:
        parts = shard.merge(parts)
    *stats, argmax = reference.statistics(parts, vocab_size, goals)
    columns = (*stats, parts.m, torch.log1p(parts.s1))

    def spread(x: Tensor | None) -> Tensor:
        everywhere = parts.m.new_zeros(len(hidden), dtype=None if x is None else x.dtype)
        if x is not None:
            everywhere[tokens] = x
        return everywhere

    *spread_stats, m, log_s = map(spread, columns)
    return torch.stack(spread_stats), spread(argmax), m, log_s


def token_stats_backward(
    upstream: Tensor,
    statistics: Tensor,
    m: Tensor,
    log_s: Tensor,
    hidden: Tensor,
    weight: Tensor,
    transform: Transform,
    targets: Tensor | None,
    mask: Tensor | None,
    *,
    needs: Needs,
    chunk_bytes: int | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for any upstream (5, N), from logits computed again.

    Returns dhidden, dweight, dbias in the inputs' dtypes. Work: 2, +2 for hidden, +2 for weight:
    with the forward's 2, 8 in all. Memory: one slab, fp32 dhidden, and where the mask leaves tokens
    out a copy of the others.
    """
    wide = accumulation_dtype(hidden.dtype)
    active = None if mask is None else mask.nonzero()[:, 0]
    tokens: slice | Tensor = slice(None) if active is None else active
    h = hidden[tokens]
    stats = TokenStats(*statistics[:, tokens])
    # a power of two: 16-bit gradients stay in range whatever the upstream's scale, and exact
    largest = upstream.abs().amax() if len(hidden) else upstream.new_ones(())
    scale = torch.exp2(torch.frexp(largest.nan_to_num(posinf=1))[1].to(wide))
    up = TokenStats(*(upstream[:, tokens].to(wide) / scale))
    goals = _at(targets, tokens)
    if goals is None or up.logprob is None:
        up = up._replace(logprob=None)
    else:
        up = up._replace(logprob=up.logprob.masked_fill(goals == reference.IGNORE_INDEX, 0))
    vocab_size, first = (len(weight), 0) if shard is None else (sum(shard.sizes), shard.start)
    local_goals = None if goals is None else goals - first
    dh = h.new_zeros(h.shape if needs.hidden else (0,), dtype=wide)
    dw = weight.new_empty(weight.shape if needs.weight else (0,))
    db = weight.new_empty(len(weight) if needs.bias else 0)
    for words, w, y, row_arguments in _slabs(
        h, weight, transform, tokens, local_goals, chunk_bytes
    ):
        dy = _row_gradient(
            y, row_arguments, m[tokens], log_s[tokens], stats, up, vocab_size, weight.dtype
        )
        if needs.hidden:
            gemm(dh, dy, w, accumulate=True)
        if needs.weight:
            dw[words] = gemm(y.new_empty(w.shape), dy.t(), h).mul_(scale).to(dw.dtype)
        if needs.bias:
            db[words] = (dy.sum(0, dtype=wide) * scale).to(db.dtype)
    if needs.hidden and shard is not None:
        shard.sum(dh)
    dh = dh.mul_(scale).to(hidden.dtype)
    if needs.hidden and active is not None:
        dh = hidden.new_zeros(hidden.shape).index_copy_(0, active, dh)
    return dh, dw, db
