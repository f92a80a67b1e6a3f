"""Sampled completions of problems, written to a file as they arrive, so that a stopped command can
be resumed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..console import progress_on
from ..interrupts import doing
from ..out_of_memory import halve_until_it_fits
from ..rollouts.sampling import generate
from ..runs.records import append, read_lines
from ..settings import UserError
from .task import TaskSettings
from .teacher_forcing import mean_entropies

COMPLETIONS = "completions.jsonl"
# Last of the four numbers that seed a sample. Training's samples are seeded by three, so none of
# these streams shares its randomness.
EVAL_STREAM, SELECT_STREAM = 1, 2


class Completion(NamedTuple):
    """One sample for a problem."""

    problem: int
    sample: int
    text: str
    tokens: int | None  # None: a server did not say
    ended: bool
    entropy: float | None = None  # mean over its tokens, in nats


Key: TypeAlias = tuple[int, int]  # problem, sample
OnDone: TypeAlias = Callable[[list[Completion]], None]
Completer: TypeAlias = Callable[[Sequence[Key], OnDone], None]


class LocalModel(NamedTuple):
    """A transformers model, its tokenizer, and a task's prompts as token ids."""

    task: TaskSettings
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    stream: int  # EVAL_STREAM or SELECT_STREAM
    with_entropy: bool = False

    def complete(self, keys: Sequence[Key], on_done: OnDone) -> None:
        """Sample in batches of similar length, longest prompts first."""
        keys = sorted(keys, key=lambda key: -len(self.prompts[key[0]]))
        size = self.task.batch_size

        def on_retry(smaller: int) -> None:
            nonlocal size
            size = smaller

        while keys:
            size = min(size, len(keys))
            sample = partial(self._sample, keys)
            try:
                on_done(halve_until_it_fits(sample, size, 1, on_retry))
            except torch.OutOfMemoryError:
                raise UserError(
                    "batch_size: out of memory with 1; lower sampling.max_new_tokens, or take a "
                    "smaller model"
                ) from None
            keys = keys[size:]

    def _sample(self, keys: Sequence[Key], count: int) -> list[Completion]:
        keys = keys[:count]
        sampling = self.task.sampled()
        prompts = [self.prompts[problem] for problem, _ in keys]
        seeds = [(self.task.seed, *key, self.stream) for key in keys]
        rollouts = generate(
            self.model, self.tokenizer, prompts, seeds, sampling, batch_size=len(keys)
        )
        entropies: Sequence[float | None] = [None] * len(keys)
        if self.with_entropy:
            entropies = mean_entropies(self.model, rollouts, sampling.temperature or 1.0)
        texts = self.tokenizer.batch_decode(
            [rollout.response_ids for rollout in rollouts], skip_special_tokens=True
        )
        rows = zip(keys, texts, rollouts, entropies, strict=True)
        return [Completion(*key, t, len(r.response_ids), r.ended, h) for key, t, r, h in rows]


def collect(
    complete: Completer, keys: Sequence[Key], path: Path, console: Console, title: str
) -> dict[Key, Completion]:
    """Return a completion for every key: those in the file, and new ones, which are added to it."""
    rows = [Completion(**row) for row in read_lines(path, "problem")]
    found = {row[:2]: row for row in rows}
    missing = [key for key in keys if key not in found]
    with progress_on(console) as progress, doing(title):
        bar = progress.add_task(title, total=len(keys), completed=len(keys) - len(missing))

        def on_done(done: list[Completion]) -> None:
            append(path, [completion._asdict() for completion in done])
            found.update({completion[:2]: completion for completion in done})
            progress.advance(bar, len(done))

        if missing:
            complete(missing, on_done)
    return {key: found[key] for key in keys}
