"""The loss of one update and its gradients: micro-batches, the prompt computed once for all of
them, activations recomputed, the head's gradient handed on in slabs.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from ...functional import entropy_loss_into
from ...hf import Head, hidden_states
from ..config import TrainConfig
from ..rollouts.sampling import Rollout
from .optimizer import MasterAdamW


class StepLoss(NamedTuple):
    """Loss statistics of one update, over its scored tokens."""

    entropy: float  # mean, in nats
    active_share: float  # of the vocabulary that the head's backward multiplied
    dropped_share: float  # of the mass of the logits' gradient, where any was left out


class _Kept(DynamicLayer):
    """A prompt's keys and values, with their graph."""

    length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:  # a recomputation comes a second time
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            self.length = key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length


class _Before(DynamicLayer):
    """Prepends the prompt's keys and values to each row's own, which are not kept."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        keys = torch.cat([self.keys, key_states], dim=-2)
        return keys, torch.cat([self.values, value_states], dim=-2)


class SharedPrefix:
    """A prompt's last hidden state, keys and values, computed once for all rows that continue it.

    The rows' backwards end here; their gradients are added up in fp32, and backward() takes them
    through the prompt at last: in one backward the engine would hold each weight's gradient of the
    rows until that of the prompt came, all weights' at a time.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        self.model, self.length = model, len(ids)
        cache = DynamicCache(config=model.config)
        kept: list[Any] = [_Kept() for _ in cache.layers]
        cache.layers = kept
        states = hidden_states(model, torch.tensor([ids], device=model.device), cache)
        if any(layer.keys is None for layer in kept):
            raise TypeError(
                f"model: {type(model).__name__} does not fill the cache it is given; this "
                "architecture is not supported"
            )
        self.outputs: list[Any] = [states[:, -1]]
        for layer in kept:
            self.outputs += [layer.keys, layer.values]
            layer.keys = layer.values = None  # else checkpoint's frames hold a graph unused
        self.leaves = [x.detach() for x in self.outputs]
        for i, x in enumerate(self.outputs):
            if x.requires_grad:  # of adapters on some layers only, those before them have none
                wide = torch.promote_types(x.dtype, torch.float32)
                self.leaves[i] = x.detach().to(wide).requires_grad_()

    @property
    def last(self) -> Tensor:
        """Hidden state (1, D) that scores the first token of a response."""
        return self.leaves[0].to(self.outputs[0].dtype)

    def continued(self, ids: Tensor) -> Tensor:
        """Hidden states (B, T, D) of rows (B, T) that come after it."""
        pairs = zip(self.leaves[1:], self.outputs[1:], strict=True)
        wide = [leaf.to(x.dtype).expand(len(ids), -1, -1, -1) for leaf, x in pairs]
        cache = DynamicCache(config=self.model.config)
        cache.layers = [_Before(k, v) for k, v in zip(wide[::2], wide[1::2], strict=True)]
        return hidden_states(self.model, ids, cache)

    def backward(self) -> None:
        """Backpropagate the accumulated gradients through the prompt."""
        pairs = zip(self.outputs, self.leaves, strict=True)
        reached = [(x, leaf.grad.to(x.dtype)) for x, leaf in pairs if leaf.grad is not None]
        if reached:
            torch.autograd.backward([x for x, _ in reached], [gradient for _, gradient in reached])


@torch.no_grad()
def can_share_prefix(model: PreTrainedModel) -> bool:
    """True if continuing a SharedPrefix gives the model's own states; not with sliding windows."""
    if {type(layer) for layer in DynamicCache(config=model.config).layers} != {DynamicLayer}:
        return False
    ids = (
        torch.arange(2, 26, device=model.device).view(2, 12)
        % model.config.get_text_config().vocab_size
    )
    ids[:, :6] = ids[0, :6]
    expected = hidden_states(model, ids)[:, 6:].float()
    found = SharedPrefix(model, ids[0, :6].tolist()).continued(ids[:, 6:])
    errors = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # rounding alone, of another batch size, moves single tokens of a real model by 1e-3 in fp32
    return bool(errors.median() <= 0.02)


@contextmanager
def recomputation(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Layers keep only their input for the backward. Not transformers' own way, which takes the
    prompt's keys and values from them.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers if on else ():
        layer.forward = partial(  # type: ignore[method-assign]
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer in layers if on else ():
            del layer.forward


def scored(rollout: Rollout, official: bool) -> range:
    """Positions whose logits count: the state at t scores token t + 1. The official train.py takes
    those of the response's own tokens, EOS left out.
    """
    start, end = len(rollout.prompt_ids), len(rollout)
    return range(start, end - rollout.ended) if official else range(start - 1, end - 1)


def by_prompt(
    rollouts: Sequence[Rollout], share: bool
) -> list[tuple[Sequence[int] | None, list[Rollout]]]:
    """Prompts that are computed once and their rollouts; the others together, under None."""
    if not share:
        return [(None, list(rollouts))]
    groups: dict[tuple[int, ...], list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(tuple(rollout.prompt_ids), []).append(rollout)
    found: list[tuple[Sequence[int] | None, list[Rollout]]] = [
        (ids, group) for ids, group in groups.items() if len(group) > 1
    ]
    alone = [group[0] for group in groups.values() if len(group) == 1]
    return found + ([(None, alone)] if alone else [])


def micro_batches(
    rollouts: Sequence[Rollout], tokens: int, computed: int = 0, rows: int | None = None
) -> Iterator[list[Rollout]]:
    """The rollouts in turn, in batches whose padded size, less the `computed` first tokens of each,
    stays within a number of tokens; of so many rows at most.
    """
    batch: list[Rollout] = []
    for rollout in rollouts:
        longest = max(map(len, [*batch, rollout])) - computed
        if batch and ((len(batch) + 1) * longest > tokens or len(batch) == rows):
            yield batch
            batch = []
        batch.append(rollout)
    if batch:
        yield batch


def padded(
    batch: Sequence[Rollout], first: int, official: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Their ids (B, T) from column `first` on, and of their flattened positions those that are
    scored. Padding is on the right, where causal attention never looks.
    """
    spans = [scored(rollout, official) for rollout in batch]
    columns = max(span.stop for span in spans) - first
    rows: list[list[int]] = []
    index: list[int] = []
    for row, (rollout, span) in enumerate(zip(batch, spans, strict=True)):
        tokens = (rollout.prompt_ids + rollout.response_ids)[first : span.stop]
        rows.append(tokens + [0] * (columns - len(tokens)))
        index += [row * columns + t - first for t in span if t >= first]
    ids = torch.tensor(rows, dtype=torch.int64, device=device)
    return ids, torch.tensor(index, dtype=torch.int64, device=device)


def scored_states(
    model: PreTrainedModel, batch: Sequence[Rollout], prompt: SharedPrefix | None, official: bool
) -> Tensor:
    """Hidden states (n, D) at the scored positions; where there is a prompt, at those behind it."""
    first = 0 if prompt is None else prompt.length
    ids, index = padded(batch, first, official, model.device)
    if ids.shape[1] == 0:
        assert prompt is not None
        return prompt.last[:0]
    states = hidden_states(model, ids) if prompt is None else prompt.continued(ids)
    return states.flatten(0, 1)[index]


Work: TypeAlias = list[tuple[Sequence[int] | None, list[list[Rollout]]]]  # micro-batches, by prompt


class RankShare(NamedTuple):
    """A rank's of an update."""

    work: Work
    tokens: int  # scored, of all ranks
    batches: int  # that score any, of all ranks
    rounds: int  # micro-batches of the rank that has most

    def divisor(self, tokens: int, official: bool) -> int:
        """Divisor of each token's entropy in a micro-batch that scores this many tokens."""
        return tokens * self.batches if official else self.tokens


def part_of(
    rollouts: Sequence[Rollout], config: TrainConfig, micro_batch: int, index: int, count: int
) -> RankShare:
    """Assign rollouts of all lengths to one rank; the token mean spans all ranks."""
    official, rows = config.official_loss, config.micro_batch_rows

    def work_of(rollouts: Sequence[Rollout], tokens: int) -> Work:
        return [
            (ids, list(micro_batches(group, tokens, len(ids or ()), rows)))
            for ids, group in by_prompt(rollouts, config.share_prefix)
        ]

    if official:  # its mean is of the micro-batches' means: these are dealt, in the given order
        work = work_of(rollouts, sys.maxsize)
        works: list[Work] = [[(ids, b[i::count]) for ids, b in work] for i in range(count)]
    else:  # by length: little padding, ranks alike
        rollouts = sorted(rollouts, key=len)
        works = [work_of(rollouts[i::count], micro_batch) for i in range(count)]
    batches = [[batch for _, group in work for batch in group] for work in works]
    counts = [sum(len(scored(r, official)) for r in batch) for own in batches for batch in own]
    own = [(ids, group) for ids, group in works[index] if group]
    return RankShare(own, sum(counts), sum(n > 0 for n in counts), max(map(len, batches)))


def entropy_step(
    model: PreTrainedModel,
    head: Head,
    rollouts: Sequence[Rollout],
    config: TrainConfig,
    optimizer: MasterAdamW,
    micro_batch: int,
    check: Callable[[], None],
    index: int = 0,
    count: int = 1,
) -> StepLoss:
    """Add the gradient of the mean entropy over all scored tokens to the optimizer's.

    Args:
        rollouts: of the update, all of them.
        config: with nothing "auto" left.
        micro_batch: tokens of one forward and backward.
        check: called before each; may raise to abandon the work.
        index, count: of this rank, and of all: only its part is computed, and returned.
    """
    official = config.official_loss
    part = part_of(rollouts, config, micro_batch, index, count)
    sink = partial(_add_rows, optimizer, head.weight) if head.weight.requires_grad else None
    mean, reports = 0.0, torch.zeros(2)
    with recomputation(model, config.gradient_checkpointing is True):
        for ids, batches in part.work:
            prompt = None if ids is None else SharedPrefix(model, ids)
            firsts = 0 if prompt is None or official else sum(map(len, batches))
            for batch in batches:
                check()
                states = scored_states(model, batch, prompt, official)
                weights = torch.ones(len(states), dtype=torch.float64)
                if prompt is not None and firsts:
                    states = torch.cat([prompt.last, states])
                    weights = torch.cat([weights.new_tensor([firsts]), weights])
                    firsts = 0
                elif len(states) == 0:
                    continue
                loss, dstates, dbias, report = entropy_loss_into(
                    sink,
                    states,
                    head.weight,
                    reduction="sum",
                    mask=(weights / part.divisor(len(states), official)).to(states.device),
                    temperature=config.temperature,
                    grad_tolerance=config.grad_tolerance,
                    chunk_bytes=config.chunk_bytes,
                    **head.arguments(),
                )
                if dbias is not None:
                    assert head.bias is not None
                    optimizer.add(head.bias, dbias)
                states.backward(dstates)
                mean += loss.item()
                reports += torch.stack(report).cpu() * (weights.sum() / part.tokens)
            if prompt is not None:
                prompt.backward()
    return StepLoss(mean, *reports.tolist())


def _add_rows(
    optimizer: MasterAdamW, weight: Tensor, words: slice | Tensor, values: Tensor
) -> None:
    optimizer.add(weight, values, words)
