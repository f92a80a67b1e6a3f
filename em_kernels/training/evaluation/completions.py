"""Sampled completions of problems, kept in a file as they arrive, to resume a stopped command."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from rich.console import Console
from transformers import LogitsProcessor

from ..console import progress_on
from ..data.columns import Conversation
from ..device_memory import halve_until_it_fits
from ..interrupts import doing
from ..rollouts.sampling import generate
from ..runs.records import append, read_lines
from ..settings import UserError
from ..task import context_of
from .task import Opened, TaskSettings, token_ids
from .teacher_forcing import mean_entropies

COMPLETIONS = "completions.jsonl"
# The last of the four numbers that seed a sample; training's samples are seeded by three.
EVAL_STREAM, SELECT_STREAM = 1, 2


class Completion(NamedTuple):
    """One sample for a problem."""

    problem: int
    sample: int
    text: str
    tokens: int | None  # None: a server did not say
    ended: bool
    entropy: float | None = None  # mean over its tokens, in nats
    capped: bool = False  # cut off where the model's context ends, before max_new_tokens


Key: TypeAlias = tuple[int, int]  # problem, sample
OnDone: TypeAlias = Callable[[list[Completion]], None]
OnBatch: TypeAlias = Callable[[Sequence[Completion], float], None]
Completer: TypeAlias = Callable[[Sequence[Key], OnDone], None]


def local_completer(
    task: TaskSettings,
    opened: Opened,
    prompts: Sequence[str | Conversation],
    stream: int,
    with_entropy: bool = False,
    processors: Sequence[LogitsProcessor] = (),
) -> Completer:
    """Return a function that samples in batches of similar length, longest prompts first.

    A prompt that leaves less room in the model's context than max_new_tokens has fewer new tokens.
    """
    model, tokenizer = opened
    prompt_ids, sampling = token_ids(task, opened, prompts), task.sampled()
    context = context_of(model.config) or sys.maxsize

    def limit(key: Key) -> int:
        return min(sampling.max_new_tokens, context - len(prompt_ids[key[0]]))

    def sample(keys: Sequence[Key], count: int) -> list[Completion]:
        alike = groupby(keys[:count], limit)  # whose keys come longest prompt first
        return [done for new, group in alike for done in sample_alike(list(group), new)]

    def sample_alike(keys: Sequence[Key], new: int) -> list[Completion]:
        rows = [prompt_ids[problem] for problem, _ in keys]
        seeds = [(task.seed, *key, stream) for key in keys]
        limited = sampling.model_copy(update={"max_new_tokens": new})
        given = model, tokenizer, rows, seeds, limited
        rollouts = generate(*given, processors=processors, batch_size=len(keys))
        entropies: Sequence[float | None] = [None] * len(keys)
        if with_entropy:
            entropies = mean_entropies(model, rollouts, sampling.temperature or 1.0)
        responses = [rollout.response_ids for rollout in rollouts]
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        is_less = new < sampling.max_new_tokens
        return [
            Completion(*key, text, len(r.response_ids), r.ended, entropy, is_less and not r.ended)
            for key, text, r, entropy in zip(keys, texts, rollouts, entropies, strict=True)
        ]

    def complete(keys: Sequence[Key], on_done: OnDone) -> None:
        keys = sorted(keys, key=lambda key: -len(prompt_ids[key[0]]))
        size = task.batch_size

        def on_retry(smaller: int) -> None:
            nonlocal size
            size = smaller

        while keys:
            size = min(size, len(keys))
            try:
                on_done(halve_until_it_fits(partial(sample, keys), size, 1, on_retry))
            except torch.OutOfMemoryError:
                remedy = "lower sampling.max_new_tokens, or take a smaller model"
                raise UserError(f"batch_size: out of memory with 1; {remedy}") from None
            keys = keys[size:]

    return complete


def collect(
    complete: Completer,
    keys: Sequence[Key],
    path: Path,
    console: Console,
    title: str,
    on_batch: OnBatch = lambda done, seconds: None,
) -> dict[Key, Completion]:
    """Return a completion for every key: those in the file, and new ones, which are added to it.

    on_batch: called with the completions that arrive together, and the seconds since others did.
    """
    rows = [Completion(**row) for row in read_lines(path, "problem")]
    found = {row[:2]: row for row in rows}
    missing = [key for key in keys if key not in found]
    with progress_on(console) as progress, doing(title):
        bar = progress.add_task(title, total=len(keys), completed=len(keys) - len(missing))

        last = time.perf_counter()

        def on_done(done: list[Completion]) -> None:
            nonlocal last
            now = time.perf_counter()
            on_batch(done, now - last)
            last = now
            append(path, [completion._asdict() for completion in done])
            found.update({completion[:2]: completion for completion in done})
            progress.advance(bar, len(done))

        if missing:
            complete(missing, on_done)
    return {key: found[key] for key in keys}
