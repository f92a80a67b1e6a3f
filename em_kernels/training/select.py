"""Which prompt to train on: the one whose correctness varies most over samples (arXiv
2505.20282).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import Sampling
from .data import Problem
from .evaluate import evaluate


class Candidate(NamedTuple):
    """A problem, and the share of its samples that are right."""

    problem: Problem
    pass_rate: float

    @property
    def variance(self) -> float:
        """Of correctness: highest where the model is right half of the time."""
        return round(self.pass_rate * (1 - self.pass_rate), 9)  # else p and 1 - p may not tie


def select(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pool: Sequence[Problem],
    sampling: Sampling,
    *,
    samples: int = 16,
    seed: int = 0,
    chat_template: bool = True,
    on_done: Callable[[int], None] | None = None,
) -> list[Candidate]:
    """The pool, highest variance first; ties in the pool's order."""
    right = evaluate(
        model,
        tokenizer,
        pool,
        sampling,
        samples=samples,
        seed=seed,
        stream=2,  # not that of the evaluations
        chat_template=chat_template,
        on_done=on_done,
    )
    candidates = [Candidate(p, float(r.mean())) for p, r in zip(pool, right, strict=True)]
    return sorted(candidates, key=lambda c: -c.variance)
