"""`em-kernels select`: rank prompts to train on, by what their samples do (arXiv 2505.20282)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from rich.console import Console

from ..data.columns import Conversation, Problem
from ..data.grading import Grader
from ..data.math_verify_grading import boxed
from ..models.loading import fingerprint
from ..runs.records import resumable, write_whole
from ..settings import UserError
from .completions import COMPLETIONS, SELECT_STREAM, collect, local_completer
from .task import Opened, TaskSettings, digest

SELECTION = "selection.jsonl"


class SelectConfig(TaskSettings):
    """Rank the prompts of a pool by how much sampled completions vary: a few samples of every
    prompt, then more of the promising ones. Give the sampling settings of the planned training run;
    the defaults are the paper's.
    """

    samples: Annotated[int, Field(ge=2)] = 8
    """Completions of every prompt, in the first stage."""
    more: Annotated[int, Field(ge=0)] = 24
    """Further completions of each promising prompt, in the second stage; 0 skips it."""
    promising: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the prompts, highest scores first, that enter the second stage."""
    score: Literal["auto", "variance", "disagreement", "entropy"] = "auto"
    """variance: p (1 - p), where p is the share of right completions; needs answers. disagreement:
    1 minus the share of the most frequent final answer. entropy: mean entropy per token, in nats.
    auto: variance if the data has answers, else disagreement.
    """
    output: Path = Path("runs/selection")
    """Folder for completions.jsonl and selection.jsonl; the latter goes to train --prompt-from."""


@dataclass
class Candidate:
    """A prompt as the model reads it, and statistics of its samples."""

    prompt: str | Conversation
    answer: str | None
    index: int  # in the pool
    samples: int
    pass_rate: float | None
    disagreement: float
    entropy: float
    majority_right: bool | None  # the most frequent answer is right; None if not known
    ended: float  # share of the samples that were not cut off

    @property
    def variance(self) -> float:
        """Variance of correctness: highest where the model is right half of the time."""
        p = self.pass_rate or 0.0
        return round(p * (1 - p), 9)  # rounded, so that rates p and 1 - p tie


def select(
    config: SelectConfig,
    pool: Sequence[Problem],
    shots: Sequence[Problem],
    opened: Opened,
    console: Console,
) -> list[Candidate]:
    """Rank the pool by score, prompts of the second stage first; write selection.jsonl too."""
    score, lacking = config.score, any(problem.answer is None for problem in pool)
    if score == "auto":
        score = "disagreement" if lacking else "variance"
    if score == "variance" and lacking:
        raise UserError(f"score: variance needs answers, which {config.data} lacks; use auto")
    prompts = [config.prompt(problem, shots) for problem in pool]
    complete = local_completer(config, opened, prompts, SELECT_STREAM, with_entropy=True)
    facts = {"model": fingerprint(config.model), "data": digest(pool, prompts)}
    with resumable(config.output, config, **facts), Grader() as grader:

        def ranked(indices: Sequence[int], samples: int, title: str) -> list[Candidate]:
            keys = [(i, k) for i in indices for k in range(samples)]
            kept = collect(complete, keys, config.output / COMPLETIONS, console, title)
            groups = [[kept[i, k] for k in range(samples)] for i in indices]
            # The last number of a completion that was cut off is not its answer, but a box is.
            texts = [
                [c.text if c.ended or boxed(c.text) is not None else "" for c in group]
                for group in groups
            ]
            with console.status("grading"):
                agreed = grader.agreement(texts)
                right = grader.grade([(c.text, pool[c.problem].answer) for c in kept.values()])
            found = []
            for n, (i, group) in enumerate(zip(indices, groups, strict=True)):
                majority, share = agreed[n]
                verdicts = right[n * samples :][:samples]
                known, voted = pool[i].answer is not None, texts[n][majority] != ""
                candidate = Candidate(
                    prompt=prompts[i],
                    answer=pool[i].answer,
                    index=i,
                    samples=samples,
                    pass_rate=sum(verdicts) / samples if known else None,
                    disagreement=1 - share,
                    entropy=float(np.mean([c.entropy or 0.0 for c in group])),
                    majority_right=verdicts[majority] and voted if known else None,
                    ended=float(np.mean([c.ended for c in group])),
                )
                found.append(candidate)
            return sorted(found, key=lambda c: (-getattr(c, score), c.index))

        ranking = ranked(range(len(pool)), config.samples, f"sampling {len(pool)} prompts")
        if config.more:
            count = max(1, round(len(pool) * config.promising))
            chosen = sorted(c.index for c in ranking[:count])
            best = ranked(chosen, config.samples + config.more, f"more of {count}")
            ranking = best + ranking[count:]
        rows = [{**asdict(c), "variance": c.variance} for c in ranking]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(config.output / SELECTION, lines)
    return ranking
