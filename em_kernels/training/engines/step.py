"""An update's loss and gradients by micro-batches, behind a prompt that is computed once."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from ...hf import Head, hidden_states
from ...ops.free_memory import return_freed_memory
from ...streamed_loss import entropy_loss_into
from ..config import TrainConfig
from ..rollouts.kv_cache import grouped_attention
from ..rollouts.sampling import Rollout
from .base_penalty import BasePenalty
from .optimizer import MasterAdamW
from .packing import can_pack, packed_inputs
from .shared_prefix import SharedPrefix


class StepLoss(NamedTuple):
    """Loss statistics of one update, over its scored tokens."""

    entropy: float  # mean, in nats
    active_share: float  # of the vocabulary: entries that the head's backward multiplied
    dropped_share: float  # of the mass of the logits' gradient: what grad_tolerance left out
    divergence: float = 0.0  # mean KL from the base model, in nats; 0 without kl_weight


@contextmanager
def recomputation(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Recompute each layer's activations in the backward. transformers' own gradient checkpointing
    would drop the KV cache, and with it the shared prompt.
    """
    layers = [m for m in model.modules() if on and isinstance(m, GradientCheckpointingLayer)]
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    # A layer attends in the backward, outside SharedPrefix.continued(), as it did in the forward.
    options["context_fn"] = lambda: (grouped_attention(), grouped_attention())
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, **options)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class Scoring(NamedTuple):
    """Which logits count, and how they are averaged: ours, or those of the official train.py."""

    official: bool = False
    padding: int | None = None  # the tokenizer's padding: EOS for Qwen2.5's base models

    def positions(self, rollout: Rollout) -> range:
        """Return the positions whose logits count: the state at t scores token t + 1. The official
        ones are those of the response's own tokens that are not padding.
        """
        start, end = len(rollout.prompt_ids), len(rollout)
        if not self.official:
            return range(start - 1, end - 1)
        return range(start, end - (rollout.response_ids[-1:] == [self.padding]))


OURS = Scoring()


def scoring_of(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Scoring:
    """Return the run's scoring; without padding of its own a tokenizer pads with EOS."""
    padding, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    return Scoring(config.official_loss, eos if padding is None else padding)


Groups: TypeAlias = list[tuple[Sequence[int] | None, list[Rollout]]]


def by_prompt(rollouts: Sequence[Rollout], share: bool) -> Groups:
    """Group rollouts by prompts that are worth computing once; the others together, under None."""
    if not share:
        return [(None, list(rollouts))]
    groups: dict[tuple[int, ...], list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(tuple(rollout.prompt_ids), []).append(rollout)
    shared: Groups = [(ids, group) for ids, group in groups.items() if len(group) > 1]
    alone = [group[0] for group in groups.values() if len(group) == 1]
    return [*shared, (None, alone)] if alone else shared


def micro_batches(
    rollouts: Sequence[Rollout],
    tokens: int,
    computed: int = 0,
    rows: int | None = None,
    packed: bool = False,
) -> Iterator[list[Rollout]]:
    """Yield the rollouts in batches of at most `tokens` tokens and `rows` rows; padding counts
    unless they are packed, the first `computed` tokens of each row do not. A longer rollout is a
    batch of its own.
    """
    batch: list[Rollout] = []
    for rollout in rollouts:
        lengths = [len(r) - computed for r in [*batch, rollout]]
        size = sum(lengths) if packed else len(lengths) * max(lengths)
        if batch and (size > tokens or len(batch) == rows):
            yield batch
            batch = []
        batch.append(rollout)
    if batch:
        yield batch


class TokenBatch(NamedTuple):
    """A micro-batch's tokens."""

    ids: Tensor  # (B, T), padded on the right, where causal attention never looks; packed: (1, T)
    scored: Tensor  # indices of the scored positions among the flattened ones
    lengths: list[int]  # of packed rows, those without tokens left out


def token_batch(
    batch: Sequence[Rollout],
    first: int,
    scoring: Scoring,
    device: torch.device,
    packed: bool = False,
) -> TokenBatch:
    """Return the rollouts' tokens from column `first` on."""
    spans = [scoring.positions(rollout) for rollout in batch]
    columns = 0 if packed else max(span.stop for span in spans) - first
    ids, scored, lengths = list[int](), list[int](), list[int]()
    for rollout, span in zip(batch, spans, strict=True):
        row = (rollout.prompt_ids + rollout.response_ids)[first : span.stop]
        scored += [len(ids) + t - first for t in span if t >= first]
        ids += row + [0] * (columns - len(row))
        lengths += [len(row)] if packed and row else []
    both = (torch.tensor(x, dtype=torch.int64, device=device) for x in (ids, scored))
    tokens, index = both
    shape = (1, len(ids)) if packed else (len(batch), columns)
    return TokenBatch(tokens.view(shape), index, lengths)


def scored_states(
    model: PreTrainedModel,
    batch: Sequence[Rollout],
    prompt: SharedPrefix | None,
    scoring: Scoring = OURS,
) -> Tensor:
    """Return hidden states (n, D) at the scored positions, without those of a shared prompt."""
    first, device = 0 if prompt is None else prompt.length, model.device
    ids, scored, lengths = token_batch(batch, first, scoring, device, can_pack(model))
    if ids.shape[1] == 0:
        assert prompt is not None
        return prompt.last[:0]
    if prompt is not None:
        states = prompt.continued(ids, lengths)
    else:
        inputs = packed_inputs(lengths, 0, device) if lengths else {}
        states = hidden_states(model, ids, **inputs)
    return states.flatten(0, 1)[scored]


def step_states(
    model: PreTrainedModel,
    prompt: SharedPrefix | None,
    batch: Sequence[Rollout],
    scoring: Scoring,
    with_first: bool,
) -> Tensor:
    """Return scored_states(), behind the prompt's last state with_first."""
    states = scored_states(model, batch, prompt, scoring)
    if not with_first:
        return states
    assert prompt is not None
    return torch.cat([prompt.last, states])


Work: TypeAlias = list[tuple[Sequence[int] | None, list[list[Rollout]]]]  # micro-batches by prompt


class RankShare(NamedTuple):
    """One rank's share of an update."""

    work: Work
    tokens: int  # scored, on all ranks
    batches: int  # that score any token, on all ranks
    rounds: int  # micro-batches of the rank that has most

    def divisor(self, tokens: int, scoring: Scoring) -> int:
        """Return what each token's entropy is divided by in a micro-batch with so many of them."""
        return tokens * self.batches if scoring.official else self.tokens


def rank_share(
    rollouts: Sequence[Rollout],
    config: TrainConfig,
    micro_batch: int,
    index: int,
    count: int,
    scoring: Scoring = OURS,
    packed: bool = False,
) -> RankShare:
    """Return the share of rank `index` of `count`; the token mean spans all ranks."""
    rows = config.micro_batch_rows

    def work_of(rollouts: Sequence[Rollout], tokens: int) -> Work:
        return [
            (ids, list(micro_batches(group, tokens, len(ids or ()), rows, packed)))
            for ids, group in by_prompt(rollouts, config.share_prefix is True)
        ]

    if scoring.official:  # a mean over micro-batches, so their order and content are fixed
        work = work_of(rollouts, sys.maxsize)
        works: list[Work] = [[(ids, b[i::count]) for ids, b in work] for i in range(count)]
    else:  # Sorting by length keeps padding small and the ranks' work alike.
        rollouts = sorted(rollouts, key=len)
        works = [work_of(rollouts[i::count], micro_batch) for i in range(count)]
    batches = [[batch for _, group in work for batch in group] for work in works]
    tokens = [sum(len(scoring.positions(r)) for r in batch) for batch in chain(*batches)]
    mine = [(ids, group) for ids, group in works[index] if group]
    return RankShare(mine, sum(tokens), sum(n > 0 for n in tokens), max(map(len, batches)))


def loss_options(config: TrainConfig, head: Head) -> dict[str, Any]:
    """Return the keyword arguments of the fused entropy losses, but for the mask."""
    return {
        "reduction": "sum",
        "temperature": config.temperature,
        "grad_tolerance": config.grad_tolerance,
        "chunk_bytes": config.chunk_bytes,
        **head.arguments(),
    }


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
    scoring: Scoring = OURS,
    base: PreTrainedModel | None = None,
) -> StepLoss:
    """Add the gradient of the mean entropy over all scored tokens, or of its negative if that is
    the objective, to the optimizer's, times its scale.

    Args:
        rollouts: those of the whole update, on all ranks.
        micro_batch: tokens of one forward and backward.
        check: called before each micro-batch; may raise to abandon the work.
        index, count: this rank, of so many; only its share is computed and returned.
        base: what kl_weight keeps the model near; None: the model without its LoRA adapters.
    """
    weight, options = head.weight, loss_options(config, head)
    share = rank_share(rollouts, config, micro_batch, index, count, scoring, can_pack(model))
    mean, divergence, reports = 0.0, 0.0, torch.zeros(2)
    # Where memory use turns: before a micro-batch's forward, head and backward, and at the end.
    trim = return_freed_memory if model.device.type == "cpu" else lambda: None

    def add_rows(vocab_indices: slice | Tensor, gradient: Tensor) -> None:
        optimizer.add(weight, gradient, vocab_indices)

    on_weight_grad = add_rows if weight.requires_grad else None
    with recomputation(model, config.gradient_checkpointing is True):
        for ids, batches in share.work:
            penalty = BasePenalty(model, base, ids, config.kl_weight)
            prompt = None if ids is None else SharedPrefix(model, ids)
            # All first tokens are scored by the prompt's last state, in the first micro-batch.
            firsts = 0 if prompt is None or scoring.official else sum(map(len, batches))
            for batch in batches:
                check()
                trim()
                states_of = partial(
                    step_states, batch=batch, scoring=scoring, with_first=firsts > 0
                )
                base_states = penalty.states(states_of)
                states = states_of(model, prompt)
                if len(states) == 0:
                    continue
                weights = torch.ones(len(states), dtype=torch.float64)
                if firsts:
                    weights[0], firsts = firsts, 0
                tokens = weights.sum()
                weights *= optimizer.scale / share.divisor(len(states), scoring)
                mask = weights.to(states.device)
                trim()
                loss, dstates, dbias, report = entropy_loss_into(
                    on_weight_grad,
                    states,
                    weight,
                    mask=config.sign * mask,
                    **options,
                )
                if base_states is not None:
                    found, more, more_bias = penalty.divergence(
                        on_weight_grad, states, base_states, mask, head, config
                    )
                    divergence += found / optimizer.scale
                    dstates += more
                    dbias = dbias if dbias is None or more_bias is None else dbias + more_bias
                if dbias is not None:
                    assert head.bias is not None
                    optimizer.add(head.bias, dbias)
                trim()
                states.backward(dstates)
                mean += config.sign * loss.item() / optimizer.scale
                reports += torch.stack(report[:2]).cpu() * (tokens / share.tokens)
            if prompt is not None:
                prompt.backward()
    trim()
    active_share, dropped_share = reports.tolist()
    return StepLoss(mean, active_share, dropped_share, divergence)
