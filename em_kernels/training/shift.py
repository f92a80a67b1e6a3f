"""Recorded completions under the base and the trained model: each token's distribution, and how raw
logits lie.
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..functional import fused_token_stats
from ..gemm import accumulation_dtype, gemm
from ..hf import head_of
from ..reference import RowTransform, transform
from .config import TrainConfig, UserError
from .rollout import Rollout
from .session import progress_on
from .setup import find_device, load_model, open_source
from .step import Prompt, by_prompt, micro_batches, scored_states

BINS, LOW, HIGH = 1600, -200.0, 200.0  # of raw logits; those beyond count in the outermost
EDGES = torch.linspace(LOW, HIGH, BINS + 1)
CHUNK = 1 << 22  # logits at a time
FORWARD = 4096  # tokens of a forward
ENOUGH = 4096  # tokens measured, of as many whole completions as that takes
LEAST = 3  # completions, however long
SMALL = 10**9  # parameters that a CPU holds in fp32


class Measures(NamedTuple):
    """Of n tokens under one model; all on the CPU."""

    entropy: Tensor  # (n,) of the distribution that a token was drawn from, in nats
    probability: Tensor  # (n,) of the token in it
    top: Tensor  # (n,) the likeliest word
    rank: Tensor  # (n,) of the words in `tops`, from 1; ones where there are none
    mean: float  # of raw logits, over tokens and vocabulary
    std: float
    skewness: float
    histogram: Tensor  # (BINS,) from LOW to HIGH


class Shift(NamedTuple):
    """One run's, of the completions of its first and its last recorded update."""

    tokenizer: PreTrainedTokenizerBase
    before: Measures  # the first completions, base model
    after: Measures  # the same, trained model
    own: Measures | None  # the last completions, trained model; None where they are the first

    @property
    def changed(self) -> float:
        """Share of the first completions' positions whose likeliest word is another now."""
        return (self.before.top != self.after.top).double().mean().item()


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    temperature: float,
    tops: Tensor | None = None,
    *,
    share_prefix: bool = False,
    on_done: Callable[[int], None] = lambda count: None,
) -> Measures:
    """Statistics of every response token, in order; logits exist a chunk at a time.

    Args:
        temperature: of entropy and probability. Moments, histogram and ranks are of raw logits.
        tops: (n,) words whose rank is asked for.
        share_prefix: compute a prompt once for all its completions.
        on_done: called with the number of completions just measured.
    """
    head = head_of(model)
    shape = RowTransform(head.bias, head.weight.new_ones(1), head.logit_scale, head.softcap)
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    places = dict(zip(map(id, rollouts), torch.arange(sum(lengths)).split(lengths), strict=True))
    targets = torch.tensor([token for rollout in rollouts for token in rollout.response_ids])
    entropy, logprob = torch.empty(2, len(targets), dtype=torch.float64)
    top, rank = torch.zeros_like(targets), torch.ones_like(targets)
    histogram, sums = torch.zeros(BINS, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    centre = None
    for batch, states in _states(model, rollouts, share_prefix):
        at = torch.cat([places[id(rollout)] for rollout in batch])
        stats = fused_token_stats(
            states,
            head.weight,
            targets[at].to(states.device),
            stats=("entropy", "logprob", "argmax"),
            temperature=temperature,
            **head.arguments(),
        )
        assert stats.entropy is not None and stats.logprob is not None and stats.argmax is not None
        entropy[at], logprob[at] = stats.entropy.cpu().double(), stats.logprob.cpu().double()
        top[at] = stats.argmax.cpu()
        rows = max(1, CHUNK // len(head.weight))
        for part, where in zip(states.split(rows), at.split(rows), strict=True):
            y = part.new_empty(len(part), len(head.weight), dtype=accumulation_dtype(part.dtype))
            z = transform(gemm(y, part, head.weight.T), shape)
            if tops is not None:
                old = z.gather(1, tops[where, None].to(z.device))
                rank[where] = 1 + (z > old).sum(dim=1).cpu()
            z = z[z > -torch.inf]  # without words that the model masks
            histogram += torch.histc(z.clamp(LOW, HIGH).float(), BINS, LOW, HIGH).cpu()
            wide = z.double()
            centre = wide.mean() if centre is None else centre  # near it no digits are lost
            wide -= centre
            square = wide * wide
            powers = (square.new_tensor(len(z)), wide.sum(), square.sum(), (square * wide).sum())
            sums += torch.stack(powers).cpu()
        on_done(len(batch))
    assert centre is not None
    count, *moments = sums.tolist()
    first, second, third = (moment / max(count, 1) for moment in moments)
    variance = max(0.0, second - first**2)
    skewness = (third - 3 * first * second + 2 * first**3) / variance**1.5 if variance else 0.0
    mean, std = first + centre.item(), variance**0.5
    return Measures(entropy, logprob.exp(), top, rank, mean, std, skewness, histogram)


def _states(
    model: PreTrainedModel, rollouts: Sequence[Rollout], share_prefix: bool
) -> Iterator[tuple[list[Rollout], Tensor]]:
    """Hidden states (n, D) that made the response tokens of some completions at a time."""
    for ids, group in by_prompt(rollouts, share_prefix):
        prompt = None if ids is None else Prompt(model, ids)
        for batch in micro_batches(group, FORWARD, len(ids or ())):
            states = scored_states(model, batch, prompt, False)
            if prompt is not None:  # it has the first of each
                lengths = [len(rollout.response_ids) - 1 for rollout in batch]
                pairs = [(prompt.last, rest) for rest in states.split(lengths)]
                states = torch.cat([part for pair in pairs for part in pair])
            yield batch, states


def sample(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The first completions, with as many tokens as are enough."""
    taken, tokens = list[Rollout](), 0
    for rollout in rollouts:
        if tokens >= ENOUGH and len(taken) >= LEAST:
            break
        taken.append(rollout)
        tokens += len(rollout.response_ids)
    return taken


def shift(
    config: TrainConfig,
    checkpoint: Path,
    first: Sequence[Rollout],
    last: Sequence[Rollout] | None,
    console: Console,
) -> Shift:
    """Measure completions with config.model and with the checkpoint, one model in memory at a time.

    Raises: UserError where a model cannot be opened.
    """
    with console.status(escape(f"opening {config.model}")):
        source, model_config, tokenizer = open_source(config.model)
    attention = "sdpa" if config.attention.startswith("flash") else config.attention
    config = config.model_copy(update={"device": "auto", "attention": attention})
    config = config.model_copy(update={"dtype": _dtype(config, model_config)})
    words = model_config.get_text_config().vocab_size
    if max(max(r.prompt_ids + r.response_ids) for r in [*first, *(last or ())]) >= words:
        raise UserError(f"model: {config.model} has other tokens than the run's completions")

    def measured(
        of: str, where: Path | None, *texts: tuple[Sequence[Rollout], Tensor | None]
    ) -> list[Measures]:
        with console.status(escape(f"loading {where or config.model}")):
            model = _load(source, config, where)
        with progress_on(console) as progress:
            bar = progress.add_task(
                f"reading completions with {of}", total=sum(len(t) for t, _ in texts)
            )
            return [
                measure(
                    model,
                    text,
                    config.temperature,
                    tops,
                    share_prefix=config.share_prefix,
                    on_done=lambda count: progress.advance(bar, count),
                )
                for text, tops in texts
            ]

    (before,) = measured("the base model", None, (first, None))
    gc.collect()
    rest = [] if last is None else [(last, None)]
    after, *own = measured("the trained model", checkpoint, (first, before.top), *rest)
    return Shift(tokenizer, before, after, own[0] if own else None)


def _dtype(config: TrainConfig, model_config: PreTrainedConfig) -> str:
    """fp32 where a CPU holds it easily."""
    if find_device(config).type != "cpu":
        return "bfloat16"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    small = sum(p.numel() for p in model.parameters()) < SMALL
    return "float32" if small else "bfloat16"


def _load(source: str, config: TrainConfig, checkpoint: Path | None) -> PreTrainedModel:
    """The base model, or a checkpoint; adapters on their base."""
    device = find_device(config)
    if checkpoint is None:
        return load_model(source, config, device).eval()
    if not (checkpoint / "adapter_config.json").exists():
        config = config.model_copy(update={"model": str(checkpoint)})
        return load_model(os.fspath(checkpoint), config, device).eval()
    from peft import PeftModel  # takes seconds

    model = load_model(source, config, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's calls of transformers
        try:
            PeftModel.from_pretrained(model, os.fspath(checkpoint))  # in place
        except Exception as error:  # peft and safetensors raise many kinds
            why = " ".join(str(error).split())[:300]
            raise UserError(f"model: cannot load {checkpoint}: {why}") from error
    return model.eval()
