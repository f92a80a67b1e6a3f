"""Token-major loops: GEMM -> row statistics -> row gradient -> GEMMs, for some tokens at a time.

Losses that are known token by token get their gradients in the same pass. Work is counted in units
of N*D*V; one GEMM over the whole vocabulary costs 2.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels, reference
from ..kernels import FinishedRows, RowTerms, row_stride
from ..reference import RowTransform, TokenStats
from .chosen import ChosenEntries
from .gemm import gemm
from .gradients import GradAccumulator, Gradients, PendingChunk
from .inputs import GradMask, HeadInputs, StatsOutput, part_of, scale_upstream
from .memory import TILE, chunk_length, large_empty
from .vocab_parallel import VocabularyShard
from .weight_gradient import WeightGradCallback

DIFFERENTIABLE = (*TokenStats._fields[:5], "top_logprobs")
# (statistics of n tokens, their positions) -> losses (n,), derivatives by each statistic
PerToken = Callable[[TokenStats, slice | Tensor], tuple[Tensor, TokenStats]]


class Chunk(NamedTuple):
    """Some tokens, their raw logits and the statistics of these."""

    tokens: slice | Tensor  # positions among the N
    hidden: Tensor  # (n, D)
    y: Tensor  # (n, V) raw logits, free to overwrite until the buffer's next turn
    row: RowTransform
    finished: FinishedRows


def _chunks(
    inputs: HeadInputs,
    active: Tensor | None,
    with_collision_and_argmax: bool,
    accumulator: GradAccumulator,
    top_k: int,
) -> Iterator[Chunk]:
    """Yield the active tokens' chunks, their logits in one buffer or in two that take turns.

    When the accumulator stops wanting two, the same memory becomes one larger buffer.
    """
    hidden, weight, shard = inputs.hidden, inputs.weight, inputs.shard
    count = len(hidden) if active is None else len(active)
    widest = row_stride(max(inputs.shard_sizes), hidden.device)
    stride = row_stride(len(weight), hidden.device)
    selector, batch = accumulator.selector, accumulator.batch
    memory = hidden.new_empty(0)
    all_rows = inputs.row_transform()

    def fit_rows(remaining: int, row_bytes: int, at_least_a_tile: bool = True) -> int:
        length = chunk_length(
            remaining,
            row_bytes,
            inputs.chunk_bytes,
            hidden.device,
            at_least_a_tile=at_least_a_tile,
        )
        # Ranks differ in free memory, but need the same chunks: each is a collective call.
        return length if shard is None else shard.smallest(length)

    if accumulator.keeps_dy:
        batch.capacity = count
    start = buffers = 0
    while start < count:
        if buffers != selector.buffers:
            buffers, remaining = selector.buffers, count - start
            logit_bytes = inputs.dtype.itemsize if accumulator.keeps_dy else inputs.logit_bytes
            row_bytes = widest * (logit_bytes + (buffers - 1) * inputs.dtype.itemsize)
            length = fit_rows(remaining, row_bytes)
            if 1 < batch.chunks < length < remaining:
                # Shorter chunks, where the budget then also holds dy of a batch of them.
                batched_dy = widest * (batch.chunks - 1) * inputs.operand.itemsize
                shorter = fit_rows(remaining, row_bytes + batched_dy, at_least_a_tile=False)
                if shorter >= TILE:
                    length, batch.capacity = shorter, min(batch.chunks * shorter, remaining)
            if start == 0:
                memory_rows = min(buffers, -(-remaining // length)) * length
                memory = large_empty((memory_rows * stride,), inputs.dtype, hidden)
            length = min(length, memory_rows)
            buffer_count = memory_rows // length
            used = memory[: buffer_count * length * stride]
            turns = cycle(used.view(buffer_count, length, stride))
        buffer = next(turns)
        end = min(count, start + length)
        tokens = slice(start, end) if active is None else active[start:end]
        start = end
        h = hidden[tokens]
        y = gemm(buffer[: len(h), : len(weight)], h, weight.t())
        row = part_of(all_rows, tokens)
        parts = kernels.row_statistics(y, row, with_collision_and_argmax)
        if shard is not None:
            parts = shard.gather(parts)
        targets = None if inputs.targets is None else inputs.targets[tokens]
        finished = kernels.finish_rows(parts, inputs.vocab_size, targets)
        chunk = Chunk(tokens, h, y, row, finished)
        several = targets is not None and targets.dim() == 2
        if several or top_k > 0:
            chunk = _with_chosen(chunk, ChosenEntries(targets, top_k), shard)
        yield chunk


def _with_chosen(chunk: Chunk, chosen: ChosenEntries, shard: VocabularyShard | None) -> Chunk:
    """Add the statistics of several targets and of the largest entries."""
    chosen.add(chunk.y, chunk.row, 0)
    if shard is not None:
        chosen.gather(shard)
    log_p, top_indices, tail_logprob = chosen.finish(chunk.finished)
    stats, several = chunk.finished.stats, log_p.shape[1] - chosen.top_k
    if chosen.targets is not None:
        stats = stats._replace(logprob=log_p[:, :several])
    if chosen.top_k > 0:
        of_top = {"top_logprobs": log_p[:, several:], "top_indices": top_indices}
        stats = stats._replace(**of_top, tail_logprob=tail_logprob)
    return chunk._replace(finished=chunk.finished._replace(stats=stats))


def _top_as_targets(
    chunk: Chunk, upstream: TokenStats, shard: VocabularyShard | None
) -> tuple[RowTransform, TokenStats]:
    """Return transform and upstream gradients with the largest entries among several targets."""
    row, indices, of_top = chunk.row, chunk.finished.stats.top_indices, upstream.top_logprobs
    if of_top is None or indices is None:
        return row, upstream
    targets = indices if shard is None else indices - shard.start
    if upstream.logprob is not None and row.targets is not None:
        targets = torch.cat([row.targets.view(len(indices), -1), targets], dim=1)
        of_top = torch.cat([upstream.logprob.view(len(indices), -1), of_top], dim=1)
    return row._replace(targets=targets), upstream._replace(logprob=of_top, top_logprobs=None)


def sum_losses(
    inputs: HeadInputs,
    per_token: PerToken,
    needs: GradMask,
    active: Tensor | None = None,
    with_collision_and_argmax: bool = False,
    on_weight_grad: WeightGradCallback | None = None,
    keep_dy: bool = False,
    top_k: int = 0,
) -> tuple[Tensor, Gradients]:
    """Sum per-token losses (), with their gradients, in one pass over the tokens.

    Work: 2 without gradients, +2 for hidden, +2 for weight; with a tolerance, +2 times the share of
    the columns that are multiplied. Memory: one chunk and what is returned; where the mask leaves
    tokens out, a copy of each chunk's hidden. With keep_dy, where it takes no more memory, dy is
    returned in place of the weight's gradient, in the chunk's memory where there is only one.
    """
    loss = inputs.hidden.new_zeros((), dtype=inputs.dtype)
    accumulator = GradAccumulator(inputs, needs, on_weight_grad, keep_dy and inputs.keeps_dy(needs))
    pending: deque[PendingChunk] = deque()
    for chunk in _chunks(inputs, active, with_collision_and_argmax, accumulator, top_k):
        losses, upstream = per_token(chunk.finished.stats, chunk.tokens)
        loss += losses.sum(dtype=inputs.dtype)
        if not any(needs):
            continue
        row, upstream = _top_as_targets(chunk, upstream, inputs.shard)
        upstream, scale = scale_upstream(upstream, inputs.operand)
        per_row = kernels.gradient_factors(chunk.finished, upstream, inputs.vocab_size)
        terms = RowTerms(chunk.y, row, per_row)
        given = chunk.tokens, chunk.hidden, terms, scale, upstream.logprob
        pending.append(accumulator.begin(*given))
        # The next chunk's logits overwrite the oldest buffer.
        while len(pending) >= accumulator.selector.buffers:
            accumulator.finish(pending.popleft())
    for waiting in pending:
        accumulator.finish(waiting)
    return loss, accumulator.result()


def sum_entropy(
    inputs: HeadInputs,
    mean: bool,
    needs: GradMask,
    on_weight_grad: WeightGradCallback | None = None,
    keep_dy: bool = False,
) -> tuple[Tensor, Gradients]:
    """Sum or average entropy (3), weighted by the mask, with its gradients."""
    active = inputs.check_and_find_active(negative_mask_allowed=not mean)
    weights = inputs.token_weights(mean)

    def per_token(stats: TokenStats, tokens: slice | Tensor) -> tuple[Tensor, TokenStats]:
        assert stats.entropy is not None
        return weights[tokens] * stats.entropy, TokenStats(entropy=weights[tokens])

    return sum_losses(
        inputs, per_token, needs, active, on_weight_grad=on_weight_grad, keep_dy=keep_dy
    )


class TokenRecord(dict[str, Tensor]):
    """Detached values (count, ...) of all tokens, by name; 0 for those never stored."""

    def __init__(self, count: int) -> None:
        self.count = count

    def store(self, tokens: slice | Tensor, values: dict[str, Tensor]) -> None:
        for name, x in values.items():
            if name not in self:
                self[name] = x.new_zeros(self.count, *x.shape[1:])
            self[name][tokens] = x.detach()


class CustomLoss(NamedTuple):
    """A custom loss summed over all tokens, its gradients, and what was recorded on the way."""

    loss: Tensor  # ()
    gradients: Gradients
    stats: TokenRecord  # the statistics that were asked for
    extras: TokenRecord  # what loss_fn returned beside its losses


def sum_custom_loss(
    inputs: HeadInputs,
    loss_fn: Callable[[TokenStats, Tensor], Tensor | tuple[Tensor, dict[str, Tensor]]],
    needs: GradMask,
    grad_enabled: bool = True,
    keep_dy: bool = False,
    return_stats: Sequence[str] | None = None,
    top_k: int = 0,
) -> CustomLoss:
    """Sum loss_fn's losses, weighted by the mask, with their gradients.

    Autograd differentiates loss_fn inside the chunk. grad_enabled: whether gradients were enabled
    in the caller. return_stats: statistics to record; None also refuses loss_fn's extras.
    """
    inputs.check_top_k(top_k)
    active = inputs.check_and_find_active(negative_mask_allowed=True)
    positions = torch.arange(len(inputs.hidden), device=inputs.hidden.device)
    depends: list[bool] = []
    recorded, extras = (TokenRecord(len(inputs.hidden)) for _ in range(2))

    def call(stats: TokenStats, given: TokenStats, tokens: slice | Tensor) -> Tensor:
        """Return loss_fn's losses for copies of the statistics; record what was asked for."""
        recorded.store(tokens, {name: getattr(stats, name) for name in return_stats or ()})
        index = positions[tokens].clone()
        losses, more = _split(loss_fn(given, index), len(index), return_stats is not None)
        extras.store(tokens, more)
        return losses

    def per_token(stats: TokenStats, tokens: slice | Tensor) -> tuple[Tensor, TokenStats]:
        # Copies, which loss_fn may overwrite one by one: hence .data, as views would not do.
        there = {name: x for name, x in stats._asdict().items() if x is not None}
        given = {name: there.pop(name) for name in DIFFERENTIABLE if name in there}
        parts = torch.cat([x.flatten() for x in given.values()])
        copies = parts.split([x.numel() for x in given.values()])
        floats = [copy.data.view_as(x) for copy, x in zip(copies, given.values(), strict=True)]
        others = {name: x.clone() for name, x in there.items()}
        leaves = TokenStats(**dict(zip(given, floats, strict=True)), **others)
        with torch.set_grad_enabled(grad_enabled):
            for x in floats:
                x.requires_grad_(any(needs))
            losses = call(stats, leaves, tokens)
            _check_losses(losses, len(floats[0]), floats)
            losses = losses.to(inputs.dtype)
            if inputs.mask is not None:
                losses = losses * inputs.mask[tokens].to(inputs.dtype)
            gradients: tuple[Tensor | None, ...] = (None,) * len(floats)
            if losses.requires_grad:
                ones = torch.ones_like(losses)
                gradients = torch.autograd.grad(losses, floats, ones, allow_unused=True)
        depends.append(any(x is not None for x in gradients))
        upstream = TokenStats(**dict(zip(given, gradients, strict=True)))
        if upstream.logprob is not None and inputs.targets is not None:
            ignored = inputs.targets[tokens] == reference.IGNORE_INDEX
            upstream = upstream._replace(logprob=upstream.logprob.masked_fill(ignored, 0))
        return losses.detach(), upstream

    loss, gradients = sum_losses(
        inputs,
        per_token,
        needs,
        active,
        with_collision_and_argmax=True,
        keep_dy=keep_dy,
        top_k=top_k,
    )
    if any(needs) and depends and not any(depends):
        raise ValueError("loss_fn: its losses do not depend on the statistics it was given")
    if return_stats is not None and not depends:
        # Without tokens only a call tells which extras there are, and of which dtypes.
        none = inputs.hidden.new_empty(0, dtype=inputs.dtype)
        targets = inputs.targets
        logprob = None if targets is None else none.new_empty(0, *targets.shape[1:])
        empty = TokenStats(none, logprob, none, none, none, none.long())
        if top_k > 0:
            of_top = none.new_empty(0, top_k)
            empty = empty._replace(
                top_logprobs=of_top, top_indices=of_top.long(), tail_logprob=none
            )
        call(empty, empty, slice(0, 0))
    return CustomLoss(loss, gradients, recorded, extras)


def _split(
    returned: Tensor | tuple[Tensor, dict[str, Tensor]], count: int, extras_allowed: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss_fn's losses, which are not checked here, and its extras."""
    if not isinstance(returned, tuple):
        return returned, {}
    if not extras_allowed:
        raise ValueError(
            "loss_fn: returned extras, which nobody gets; pass return_stats, () for extras alone"
        )
    if len(returned) != 2 or not isinstance(returned[1], dict):
        raise TypeError(
            "loss_fn: expected losses, or (losses, a dict of extras), got a tuple of "
            f"{', '.join(type(x).__name__ for x in returned)}"
        )
    for name, x in returned[1].items():
        if not isinstance(x, Tensor) or x.shape != (count,):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"loss_fn: expected extras[{name!r}] to be ({count},), got {got}")
    return returned


def _check_losses(losses: Tensor, count: int, leaves: list[Tensor]) -> None:
    """Check that there is one loss per token, and that no gradient would be lost."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"loss_fn: expected to return a tensor, got {type(losses).__name__}")
    if losses.shape != (count,):
        raise ValueError(
            f"loss_fn: expected one loss per token, ({count},), got {tuple(losses.shape)}"
        )
    if losses.is_complex():
        raise TypeError(f"loss_fn: expected real losses, got {losses.dtype}")
    seen, to_visit = set(), [losses.grad_fn]
    while to_visit:
        node = to_visit.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("AccumulateGrad"):
            variable = node.variable  # type: ignore[attr-defined]
            if not any(variable is leaf for leaf in leaves):
                raise ValueError(
                    f"loss_fn: uses a tensor {tuple(variable.shape)} that requires grad but would "
                    "get no gradient; detach it, or use fused_token_stats"
                )
        to_visit += [parent for parent, _ in node.next_functions]


def token_stats_with_gradient(
    inputs: HeadInputs, name: str, with_collision_and_argmax: bool
) -> StatsOutput:
    """Compute all tokens' statistics, and the gradient of one of them for hidden. Work: 4."""
    active = inputs.check_and_find_active(negative_mask_allowed=True)
    output = inputs.zero_output(with_collision_and_argmax)
    statistics, argmax = output.statistics, output.argmax

    def per_token(stats: TokenStats, tokens: slice | Tensor) -> tuple[Tensor, TokenStats]:
        for row, value in zip(statistics, stats, strict=False):
            if value is not None:
                row[tokens] = value
        if with_collision_and_argmax and stats.argmax is not None:
            argmax[tokens] = stats.argmax
        losses = getattr(stats, name)
        upstream = torch.ones_like(losses)
        if name == "logprob":
            assert inputs.targets is not None
            upstream[inputs.targets[tokens] == reference.IGNORE_INDEX] = 0
        return losses, TokenStats(**{name: upstream})

    needs = GradMask(hidden=True)
    _, gradients = sum_losses(inputs, per_token, needs, active, with_collision_and_argmax)
    nothing = statistics.new_empty(0)
    return output._replace(m=nothing, log_s=nothing.clone(), dhidden=gradients.hidden)
