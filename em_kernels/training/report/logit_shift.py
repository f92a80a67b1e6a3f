"""A run's completions under the base and the trained model: distributions of tokens and logits."""

import gc
import os
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...hf import Head, head_of
from ...ops.gemm import accumulation_dtype, gemm
from ...reference import RowTransform, transform
from ..config import TrainConfig
from ..console import progress_on
from ..evaluation.teacher_forcing import response_states
from ..models.loading import load_model, open_source
from ..rollouts.sampling import Rollout
from ..settings import UserError
from ..task import find_device

BINS, LOW, HIGH = 1600, -200.0, 200.0  # of the histogram; logits beyond go to the outermost bins
LOGITS_AT_ONCE = 1 << 22
ENOUGH_TOKENS, LEAST_COMPLETIONS = 4096, 3  # Whole completions are measured until both are reached.


class Measures(NamedTuple):
    """Measurements of n tokens under one model; all on the CPU."""

    completions: int
    entropy: Tensor  # (n,) nats, of the distribution that each token was drawn from
    probability: Tensor  # (n,) of each token in it
    top: Tensor  # (n,) most probable vocabulary entry
    rank: Tensor  # (n,) of the entries in `tops`, from 1
    mean: float  # of raw logits, over tokens and vocabulary
    std: float
    skewness: float
    histogram: Tensor  # (BINS,) from LOW to HIGH


class Shift(NamedTuple):
    """A run's first and last recorded completions, measured."""

    tokenizer: PreTrainedTokenizerBase
    before: Measures  # first completions, base model
    after: Measures  # first completions, trained model
    own: Measures | None  # last completions, trained model; None if they are the first


def logits_of(states: Tensor, head: Head) -> Tensor:
    """Return the model's logits (n, V) at hidden states (n, D), in the accumulation dtype."""
    shape = RowTransform(head.bias, head.weight.new_ones(1), head.logit_scale, head.softcap)
    y = states.new_empty(len(states), len(head.weight), dtype=accumulation_dtype(states.dtype))
    return transform(gemm(y, states, head.weight.T), shape)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    temperature: float,  # of entropy and probability; all else is of raw logits
    console: Console,
    tops: Tensor | None = None,  # (n,) vocabulary entries to rank; default: the most probable
) -> Measures:
    """Measure every response token, in order, a chunk of logits at a time."""
    head = head_of(model)
    rows = max(1, LOGITS_AT_ONCE // len(head.weight))
    targets = torch.tensor([token for rollout in rollouts for token in rollout.response_ids])
    places = torch.arange(len(targets)).split([len(r.response_ids) for r in rollouts])
    entropy, probability = torch.empty(2, len(targets), dtype=torch.float64)
    top, rank = torch.empty(2, len(targets), dtype=torch.int64)
    histogram, sums = torch.zeros(BINS, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    with progress_on(console) as progress:
        bar = progress.add_task("reading completions", total=len(rollouts))
        for members, states in response_states(model, rollouts):
            at = torch.cat([places[i] for i in members])
            for part, where in zip(states.split(rows), at.split(rows), strict=True):
                z = logits_of(part, head).double()
                p = (z / temperature).softmax(-1)
                entropy[where] = torch.special.entr(p).sum(-1).cpu()
                probability[where] = p.gather(1, targets[where, None].to(p.device))[:, 0].cpu()
                top[where] = z.argmax(-1).cpu()
                asked = (top if tops is None else tops)[where, None].to(z.device)
                rank[where] = 1 + (z > z.gather(1, asked)).sum(-1).cpu()
                z = z[z > -torch.inf]  # The model may mask entries, whose logits have no moments.
                histogram += torch.histc(z.clamp(LOW, HIGH), BINS, LOW, HIGH).cpu()
                sums += torch.stack([z.pow(k).sum() for k in range(4)]).cpu()
            progress.advance(bar, len(members))
    mean, second, third = (sums[1:] / sums[0]).tolist()
    std = max(0.0, second - mean**2) ** 0.5
    skewness = (third - 3 * mean * std**2 - mean**3) / std**3 if std else 0.0
    return Measures(len(rollouts), entropy, probability, top, rank, mean, std, skewness, histogram)


def shift(
    config: TrainConfig,
    checkpoint: Path,
    first: Sequence[Rollout],
    last: Sequence[Rollout] | None,
    console: Console,
) -> Shift:
    """Measure completions with config.model, then with the checkpoint, one in memory at a time."""
    attention = "sdpa" if config.attention.startswith("flash") else config.attention
    device = find_device("auto")
    source, model_config, tokenizer = open_source(config.model)
    entries = model_config.get_text_config().vocab_size
    if max(max(r.prompt_ids + r.response_ids) for r in [*first, *(last or ())]) >= entries:
        why = "it lacks tokens that were sampled"
        raise UserError(f"model: {config.model} is not the run's: {why}")

    def opened(source: str) -> PreTrainedModel:
        gc.collect()
        with console.status(escape(f"loading {source}")):
            return load_model(source, config.dtype, attention, device).eval()

    def enough(rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        ends = list(accumulate(len(rollout.response_ids) for rollout in rollouts))
        return rollouts[: max(LEAST_COMPLETIONS, 1 + bisect_left(ends, ENOUGH_TOKENS))]

    first = enough(first)
    model = opened(source)
    before = measure(model, first, config.temperature, console)
    del model
    model = opened(os.fspath(checkpoint))  # Adapters are loaded on their base.
    after = measure(model, first, config.temperature, console, before.top)
    own = measure(model, enough(last), config.temperature, console) if last else None
    return Shift(tokenizer, before, after, own)
