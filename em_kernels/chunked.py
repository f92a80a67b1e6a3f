"""The loops over a vocabulary too large for its logits: GEMM -> row statistics -> row gradient ->
GEMMs.

Plain functions on flat tensors: hidden (N, D), weight (V, D). Work is counted in units of N*D*V;
one GEMM over the whole vocabulary costs 2. Gradients come back unmultiplied by the caller's
upstream.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .parallel import VocabularyShard
from .reference import RowParts, TokenStats
from .rows import kernels_for

MAX_CHUNK_BYTES = (
    1 << 30
)  # DESIGN: fp32 dW is read and written once a chunk, so few and large chunks
UPCAST_BYTES = (
    16 << 20
)  # of a weight slab, where a GEMM cannot take 16-bit operands and return fp32


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
    parts: RowParts
    stats: TokenStats


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gemm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> Tensor:
    """out (+)= a @ b, computed and returned in out's dtype whatever the operands' dtype."""
    beta = 1 if accumulate else 0
    if a.dtype == b.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, out=out)
    if out.is_cuda and a.dtype == b.dtype:
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
    a = a.to(out.dtype)
    inner, columns = b.shape
    step = max(1, UPCAST_BYTES // (out.element_size() * max(1, min(inner, columns))))
    if columns >= inner:
        for i in range(0, columns, step):
            gemm(out[:, i : i + step], a, b[:, i : i + step].to(out.dtype), accumulate)
    else:
        for i in range(0, inner, step):
            gemm(out, a[:, i : i + step], b[i : i + step].to(out.dtype), accumulate or i > 0)
    return out


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor on this device could take now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not on this system
        return 8 * MAX_CHUNK_BYTES


def chunk_length(total: int, bytes_each: int, chunk_bytes: int | None, device: torch.device) -> int:
    """How many of `total` rows (or columns) of logits fit in the budget, split evenly."""
    budget = chunk_bytes or min(MAX_CHUNK_BYTES, free_bytes(device) // 8)
    fitting = max(1, budget // max(1, bytes_each))
    pieces = max(1, -(-total // fitting))
    return max(1, -(-total // pieces))


def check_values(
    mask: Tensor | None,
    temperature: float | Tensor,
    targets: Tensor | None,
    vocab_size: int,
    negative_mask_allowed: bool,
) -> Tensor | None:
    """Raise ValueError for values out of range; return the indices of the tokens of weight != 0
    (None: all).

    Everything that needs the device's answer is asked in one transfer.
    """
    questions: dict[str, Tensor] = {}
    if mask is not None:
        questions["count"] = mask.count_nonzero()
        if mask.is_floating_point():
            low = -torch.inf if negative_mask_allowed else 0
            questions["mask"] = (~((mask >= low) & mask.isfinite())).sum()
        elif mask.dtype != torch.bool and not negative_mask_allowed:
            questions["mask"] = (mask < 0).sum()
    if isinstance(temperature, Tensor):
        questions["temperature"] = (~((temperature > 0) & temperature.isfinite())).sum()
    if targets is not None:
        in_range = (targets >= 0) & (targets < vocab_size)
        questions["targets"] = (~(in_range | (targets == reference.IGNORE_INDEX))).sum()
    if not questions:
        return None
    answers = dict(zip(questions, torch.stack(list(questions.values())).tolist(), strict=True))
    remedy = {
        "mask": "weights must be finite, and with reduction='mean' not negative",
        "temperature": "must be finite and > 0",
        "targets": f"must be in [0, {vocab_size}), or {reference.IGNORE_INDEX} to be ignored",
    }
    for name, text in remedy.items():
        if answers.get(name):
            raise ValueError(f"{name}: {answers[name]} values out of range; they {text}")
    if mask is None or answers["count"] == mask.numel():
        return None
    return torch.nonzero_static(mask, size=answers["count"])[:, 0]


def _at(x: Tensor | None, tokens: slice | Tensor) -> Tensor | None:
    return None if x is None else x[tokens]


def _inv_temperature(transform: Transform, tokens: slice | Tensor, like: Tensor) -> Tensor:
    """1 / temperature of each of like's rows, in like's dtype."""
    tau = transform.temperature
    if isinstance(tau, Tensor):
        return 1 / tau[tokens].to(like.dtype)
    return torch.full(like.shape[:1], 1 / tau, dtype=like.dtype, device=like.device)


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    transform: Transform,
    targets: Tensor | None,
    active: Tensor | None,
    chunk_bytes: int | None,
    shard: VocabularyShard | None,
) -> Iterator[Chunk]:
    """Token-major: the logits of a few tokens at a time and their statistics, in one reused buffer.
    2 units.
    """
    wide = accumulation_dtype(hidden.dtype)
    count = len(hidden) if active is None else len(active)
    sizes = [len(weight)] if shard is None else shard.sizes
    # a CUDA GEMM wants the gradient in 16 bits: a copy beside the fp32 logits
    each = wide.itemsize + (hidden.dtype.itemsize if hidden.is_cuda and hidden.dtype != wide else 0)
    row_bytes = max(sizes) * each
    if chunk_bytes is not None and chunk_bytes < row_bytes:
        raise ValueError(
            f"chunk_bytes: {chunk_bytes} is less than the logits of one token take; "
            f"give at least {row_bytes}"
        )
    length = chunk_length(count, row_bytes, chunk_bytes, hidden.device)
    if shard is not None:
        length = shard.smallest(length)  # free memory differs, and every chunk is a collective call
    buffer = hidden.new_empty(min(length, count), len(weight), dtype=wide)
    kernels = kernels_for(buffer)
    for start in range(0, count, length):
        tokens = slice(start, start + length) if active is None else active[start : start + length]
        h = hidden[tokens]
        y = gemm(buffer[: len(h)], h, weight.t())
        goals = _at(targets, tokens)
        local_goals = goals if goals is None or shard is None else goals - shard.start
        row_arguments = (
            transform.bias,
            _inv_temperature(transform, tokens, y),
            transform.logit_scale,
            transform.softcap,
            local_goals,
        )
        parts = kernels.row_statistics(y, *row_arguments)
        if shard is not None:
            parts = shard.merge(parts)
        yield Chunk(
            tokens, h, y, row_arguments, parts, reference.statistics(parts, sum(sizes), goals)
        )


def _log_s(parts: RowParts) -> Tensor:
    return torch.log1p(parts.s1)


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
    for chunk in _chunks(hidden, weight, transform, None, active, chunk_bytes, shard):
        losses, upstream = per_token(chunk.stats, chunk.tokens)
        loss += losses.sum()
        if not any(needs):
            continue
        dy = _row_gradient(
            chunk.y,
            chunk.row_arguments,
            chunk.parts.m,
            _log_s(chunk.parts),
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
    """Entropy (3), weighted by mask and summed, or divided by the mask's sum; see
    gradients_in_forward.
    """
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
    """Statistics (5, N) in TokenStats' order, argmax (N,), and m, log s (N,) for the backward. 2
    units, one chunk.
    """
    vocab_size = len(weight) if shard is None else sum(shard.sizes)
    active = check_values(mask, transform.temperature, targets, vocab_size, True)
    wide = accumulation_dtype(hidden.dtype)
    found = hidden.new_zeros(7, len(hidden), dtype=wide)
    argmax = hidden.new_zeros(len(hidden), dtype=torch.int64)
    for chunk in _chunks(hidden, weight, transform, targets, active, chunk_bytes, shard):
        columns = (*chunk.stats[:5], chunk.parts.m, _log_s(chunk.parts))
        zero = torch.zeros_like(chunk.parts.m)
        found[:, chunk.tokens] = torch.stack([zero if x is None else x for x in columns])
        argmax[chunk.tokens] = chunk.parts.argmax
    return found[:5].clone(), argmax, found[5].clone(), found[6].clone()


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
    """Gradients for any upstream (5, N): logits again, a slab of the vocabulary at a time, each for
    all tokens.

    Returns dhidden, dweight, dbias in the inputs' dtypes. Work: 2, +2 for hidden, +2 for weight:
    with the forward's 2, 8 in all. Memory: one slab of logits, fp32 dhidden, and where the mask
    leaves tokens out a copy of the others.
    """
    wide = accumulation_dtype(hidden.dtype)
    active = None if mask is None else mask.nonzero()[:, 0]
    tokens: slice | Tensor = slice(None) if active is None else active
    h = hidden[tokens]
    stats = TokenStats(*statistics[:, tokens])
    up = TokenStats(*upstream[:, tokens].to(wide))
    goals = _at(targets, tokens)
    if goals is None or up.logprob is None:
        up = up._replace(logprob=None)
    else:
        up = up._replace(logprob=up.logprob.masked_fill(goals == reference.IGNORE_INDEX, 0))
    vocab_size, first = (len(weight), 0) if shard is None else (sum(shard.sizes), shard.start)
    dh = h.new_zeros(h.shape if needs.hidden else (0,), dtype=wide)
    dw = weight.new_empty(weight.shape if needs.weight else (0,))
    db = weight.new_empty(len(weight) if needs.bias else 0)
    # a slab's fp32 dweight is larger than its logits where the tokens are few
    word_bytes = max(len(h), weight.shape[1] if needs.weight else 0) * wide.itemsize
    length = chunk_length(len(weight), word_bytes, chunk_bytes, h.device)
    buffer = h.new_empty(len(h) * min(length, len(weight)), dtype=wide)
    for start in range(0, len(weight), length):
        words = slice(start, min(start + length, len(weight)))
        w = weight[words]
        y = gemm(buffer[: len(h) * len(w)].view(len(h), len(w)), h, w.t())
        row_arguments = (
            _at(transform.bias, words),
            _inv_temperature(transform, tokens, y),
            transform.logit_scale,
            transform.softcap,
            None if goals is None else goals - (first + start),
        )
        dy = _row_gradient(
            y, row_arguments, m[tokens], log_s[tokens], stats, up, vocab_size, weight.dtype
        )
        if needs.hidden:
            gemm(dh, dy, w, accumulate=True)
        if needs.weight:
            dw[words] = gemm(y.new_empty(w.shape), dy.t(), h).to(dw.dtype)
        if needs.bias:
            db[words] = dy.sum(0, dtype=wide).to(db.dtype)
    if needs.hidden and shard is not None:
        shard.sum(dh)
    dh = dh.to(hidden.dtype)
    if needs.hidden and active is not None:
        dh = hidden.new_zeros(hidden.shape).index_copy_(0, active, dh)
    return dh, dw, db


def logits_entropy(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy (N,), m and log s (N,) of logits (N, V) that exist; a few rows at a time in the
    accumulation dtype.
    """
    check_values(None, temperature, None, 0, True)
    wide = accumulation_dtype(logits.dtype)
    found = logits.new_empty(3, len(logits), dtype=wide)
    for rows in _logit_blocks(logits):
        y = logits[rows].to(wide)
        tau = _inv_temperature(Transform(temperature=temperature), rows, y)
        parts = kernels_for(y).row_statistics(y, None, tau, 1.0, None, None)
        stats = reference.statistics(parts, logits.shape[1])
        assert stats.entropy is not None
        found[:, rows] = torch.stack([stats.entropy, parts.m, _log_s(parts)])
    return found[0].clone(), found[1].clone(), found[2].clone()


def logits_entropy_backward(
    upstream: Tensor,
    entropy: Tensor,
    m: Tensor,
    log_s: Tensor,
    logits: Tensor,
    temperature: float | Tensor,
) -> Tensor:
    """dlogits (N, V), in the logits' dtype."""
    gradient = torch.empty_like(logits)
    for rows in _logit_blocks(logits):
        y = logits[rows].to(entropy.dtype, copy=True)
        tau = _inv_temperature(Transform(temperature=temperature), rows, y)
        stats = TokenStats(entropy=entropy[rows], log_collision=torch.zeros_like(entropy[rows]))
        factors = reference.coefficients(
            stats, TokenStats(entropy=upstream[rows].to(y.dtype)), logits.shape[1]
        )
        gradient[rows] = kernels_for(y).row_gradient(
            y, None, tau, 1.0, None, None, m[rows], log_s[rows], factors
        )
    return gradient


def _logit_blocks(logits: Tensor) -> Iterator[slice]:
    length = max(1, UPCAST_BYTES // (4 * max(1, logits.shape[1])))
    return (slice(start, start + length) for start in range(0, len(logits), length))
