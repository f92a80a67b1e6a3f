"""Reasons not to begin a run, and to stop one early."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from .config import TrainConfig

SURE = 0.01  # nats; a mean entropy below it is near 0
SIGNIFICANT = 0.05  # p values below this


def doubts(config: TrainConfig, accuracy: float | None, entropy: float) -> Iterator[str]:
    """Yield a warning where minimising the entropy is known to help little, or to do harm.

    Args:
        accuracy: share of the untrained model's completions of the prompt that are right, if known.
        entropy: mean over their tokens, in nats.
    """
    found = []
    if accuracy in (0, 1):
        found.append("no completion is right" if accuracy == 0 else "all completions are right")
    if entropy < SURE:
        found.append(f"the entropy is near 0 ({entropy:.2g} nats)")
    if re.search(r"instruct|chat|(?<![a-z])it(?![a-z])", Path(config.model).name, re.IGNORECASE):
        found.append("the model is tuned to instructions")
    if found and config.objective == "minimise":
        known = "there entropy minimisation is known to help little, or to do harm"
        remedy = "em-kernels select finds prompts that are right half the time, eval shows a gain"
        yield f"Warning: before training {', '.join(found)}; {known}; {remedy}."


def held_out_metrics(before: np.ndarray, now: np.ndarray) -> dict[str, float]:
    """Return the shares of right problems, and the p value of McNemar's one-sided test for a fall.

    Args:
        before, now: for each problem whether it is right before training and now.
    """
    lost, gained = int((before & ~now).sum()), int((now & ~before).sum())
    p = binomtest(lost, lost + gained, alternative="greater").pvalue if lost + gained else 1.0
    shares = {"held_out": float(now.mean()), "held_out_before": float(before.mean())}
    return {**shares, "held_out_p": float(p)}


def why_stop_early(config: TrainConfig, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return the reason to stop after the last of these updates, or an empty string."""
    if not metrics:
        return ""
    now = metrics[-1]
    if now["entropy"] < config.stop_below * metrics[0]["entropy"]:
        return f"entropy below {config.stop_below:g} of its start"
    if now["repetition"] > config.stop_repetition:
        return f"more than {config.stop_repetition:g} of the 4-grams repeat"
    if now.get("held_out_p", 1) < SIGNIFICANT:
        best, before = max(metrics, key=lambda row: row["held_out"]), now["held_out_before"]
        which = f"after update {best['update']}" if best["held_out"] > before else "before training"
        return (
            f"accuracy on {config.stop_on} fell from {before:.0%} to {now['held_out']:.0%} (p = "
            f"{now['held_out_p']:.2g}); it was best {which}, {max(best['held_out'], before):.0%}"
        )
    return ""
