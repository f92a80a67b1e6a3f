"""`em-kernels select`: which prompt to train on. With answers the one whose correctness varies most
over samples (arXiv 2505.20282), without them the one whose final answers disagree most.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.grading import Grader, boxed
from ..data.problems import Conversation, Problem
from ..models.loading import fingerprint
from ..runs.records import resumable, write_whole
from ..settings import UserError
from .completions import COMPLETIONS, Completion, Local, TaskSettings, collect, digest, token_ids

SELECTION = "selection.jsonl"
STREAM = 2  # of randomness; evaluation's is 1


class SelectConfig(TaskSettings):
    """Rank the prompts of a pool by how much samples of their completions vary: few samples of all,
    more of the promising ones. The sampling is that of the training to come; the defaults are the
    paper's.
    """

    samples: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt."""
    more: Annotated[int, Field(ge=0)] = 24
    """Further ones of the promising."""
    promising: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the prompts, the first by score, that get these."""
    score: Literal["auto", "variance", "disagreement", "entropy"] = "auto"
    """variance: p (1 - p) of correctness, which needs answers. disagreement: 1 less the share of
    the most frequent final answer. entropy: mean of the tokens, in nats. auto: variance where every
    problem has an answer, or else disagreement.
    """
    output: Path = Path("runs/selection")
    """Folder for completions.jsonl and selection.jsonl, which train --prompt-from takes."""


@dataclass
class Candidate:
    """A prompt as the model reads it, and what its samples were like."""

    prompt: str | Conversation
    answer: str | None
    index: int  # in the pool
    samples: int
    pass_rate: float | None
    disagreement: float
    entropy: float
    majority_right: bool | None
    ended: float  # share of the samples

    @property
    def variance(self) -> float:
        """Variance of correctness: highest where the model is right half of the time."""
        p = self.pass_rate or 0.0
        return round(p * (1 - p), 9)  # else p and 1 - p may not tie


def select(
    config: SelectConfig,
    pool: Sequence[Problem],
    shots: Sequence[Problem],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> list[Candidate]:
    """The pool, best first; ties in its order. Those with more samples come first."""
    score = config.score
    if score == "auto":
        answered = all(problem.answer is not None for problem in pool)
        score = "variance" if answered else "disagreement"
    if score == "variance" and (without := [p for p in pool if p.answer is None]):
        raise UserError(f"score: variance needs answers, which {len(without)} problems lack")
    prompts = [config.prompt(problem, shots) for problem in pool]
    ids = token_ids(config, tokenizer, model, prompts)
    sampling = config.sampled()
    source = Local(
        model, tokenizer, ids, sampling, config.seed, STREAM, config.batch_size, with_entropy=True
    )
    path = config.output / COMPLETIONS
    asked = {"model": fingerprint(config.model), "data": digest(pool, prompts)}
    with resumable(config.output, config, **asked), Grader() as grader:

        def ranked(indices: Sequence[int], samples: int, title: str) -> list[Candidate]:
            keys = [(i, k) for i in indices for k in range(samples)]
            kept = collect(source, keys, path, console, title)
            texts = [[answer_of(kept[i, k]) for k in range(samples)] for i in indices]
            with console.status("grading"):
                agreed = grader.agreement(texts)
                right = grader.grade([(kept[i, k].text, pool[i].answer) for i, k in keys])
            found = list[Candidate]()
            for n, (i, (most, share)) in enumerate(zip(indices, agreed, strict=True)):
                verdicts = right[n * samples :][:samples]
                entropies = [kept[i, k].entropy or 0.0 for k in range(samples)]
                known = pool[i].answer is not None
                found.append(
                    Candidate(
                        prompt=prompts[i],
                        answer=pool[i].answer,
                        index=i,
                        samples=samples,
                        pass_rate=sum(verdicts) / samples if known else None,
                        disagreement=1 - share,
                        entropy=float(np.mean(entropies)),
                        majority_right=verdicts[most] and texts[n][most] != "" if known else None,
                        ended=float(np.mean([kept[i, k].ended for k in range(samples)])),
                    )
                )
            return sorted(found, key=lambda c: (-getattr(c, score), c.index))

        first = ranked(range(len(pool)), config.samples, f"sampling {len(pool)} prompts")
        if config.more:
            chosen = [c.index for c in first[: max(1, round(len(pool) * config.promising))]]
            title = f"more of {len(chosen)}"
            best = ranked(sorted(chosen), config.samples + config.more, title)
            first = best + [c for c in first if c.index not in set(chosen)]
        rows = [{**asdict(c), "variance": c.variance} for c in first]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(config.output / SELECTION, lines)
    return first


def answer_of(completion: Completion) -> str:
    """Nothing where it was cut off before it came to a box: its last number is no answer."""
    return completion.text if completion.ended or boxed(completion.text) is not None else ""
