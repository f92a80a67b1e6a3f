"""Accuracy on problems with known answers, and how far it can be trusted."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import binomtest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import Sampling
from .data import Problem, encode
from .grading import is_correct
from .rollout import generate


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: int = 0,
    stream: int = 1,
    chat_template: bool = True,
    batch_size: int = 64,
    on_done: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Which completions are right: bool (problems, samples).

    Completion k of problem i draws its randomness from (seed, i, k, stream); training's numbers are
    three, so it never shares them.
    """
    prompts = [encode(tokenizer, p.prompt, chat_template) for p in problems for _ in range(samples)]
    seeds = [(seed, i, k, stream) for i in range(len(problems)) for k in range(samples)]
    rollouts = generate(
        model, tokenizer, prompts, seeds, sampling, batch_size=batch_size, on_done=on_done
    )
    texts = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    answers = [p.answer for p in problems for _ in range(samples)]
    right = [a is not None and is_correct(t, a) for t, a in zip(texts, answers, strict=True)]
    return np.array(right).reshape(len(problems), samples)


def wilson(right: np.ndarray) -> tuple[float, float]:
    """95 % Wilson interval of the accuracy."""
    interval = binomtest(int(right.sum()), right.size).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def paired_change(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float, float]:
    """Change of accuracy on the same problems, its 95 % interval, and McNemar's exact p value.

    The interval is the normal approximation for paired proportions.
    """
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n, changed = before.size, gained + lost
    change = (gained - lost) / n
    half = 1.96 * np.sqrt(max(changed - (gained - lost) ** 2 / n, 0)) / n
    p = binomtest(gained, changed).pvalue if changed else 1.0
    return change, change - half, change + half, p
