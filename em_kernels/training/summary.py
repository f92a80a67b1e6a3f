"""What a run's folder holds, and what happened there in words."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import fisher_exact

from .config import TrainConfig, UserError, read_yaml
from .records import CONFIG, ROLLOUTS, read_metrics, read_rollouts
from .rollout import Rollout

SIGNIFICANT = 0.05  # p values below


@dataclass
class Run:
    """A finished run, a stopped one, or one that is going on."""

    folder: Path
    name: str
    config: TrainConfig
    metrics: list[dict[str, Any]]
    rollouts: dict[int, list[Rollout]]  # by update
    records: dict[tuple[int, int], dict[str, Any]]  # by update and index
    checkpoint: Path | None  # the last

    @property
    def last(self) -> int:
        """The last update whose completions are recorded; 0 where there is none."""
        return max(self.rollouts, default=0)

    def settings(self) -> dict[str, str]:
        """The main ones."""
        config, sampling = self.config, self.config.sampling
        rank = f", rank {config.lora_rank}" if config.mode == "lora" else ""
        return {
            "model": config.model,
            "trained": f"{config.mode}{rank}, {config.dtype}",
            "updates": f"{len(self.metrics)} of {config.steps}",
            "completions an update": str(config.rollouts),
            "sampling": f"T {sampling.temperature:g}, top_k {sampling.top_k}, "
            f"top_p {sampling.top_p:g}, repetition penalty {sampling.repetition_penalty:g}, "
            f"at most {sampling.max_new_tokens} tokens",
            "loss": f"entropy at T {config.temperature:g}" + ", official" * config.official_loss,
            "learning rate": f"{config.lr:g}" if config.lr else "",
            "gradient tolerance": f"{config.grad_tolerance:g}",
            "seed": str(config.seed),
            "answer": config.answer or "",
            "completions from": str(config.rollouts_from or ""),
            "folder": str(self.folder),
        }

    def prompt(self) -> str:
        """As the settings have it."""
        rows = ", ".join(map(str, self.config.prompt_rows))
        return self.config.prompt or f"rows {rows} of {self.config.prompt_from}"

    def happened(self) -> str:
        """In a sentence or two."""
        if not self.metrics:
            return "No finished update is recorded: the run was stopped before."
        first, last = self.metrics[0], self.metrics[-1]
        if first is last:
            text = f"One update, before which the entropy was {first['entropy']:.3g} nats a token"
            text += "; after it nothing was sampled."
        else:
            text = f"From update 1 to {last['update']} the entropy went from {first['entropy']:.3g}"
            text += f" to {last['entropy']:.3g} nats a token."
        if first["accuracy"] is None:
            return f"{text} Accuracy is not known: the prompt came without an answer."
        if first is last:
            return f"{text} Accuracy on the training prompt was {first['accuracy']:.0%}."
        p = self._p(first, last)
        told = "more than chance explains" if p < SIGNIFICANT else "a change is not shown"
        return (
            f"{text} Accuracy on the training prompt went from {first['accuracy']:.0%} to "
            f"{last['accuracy']:.0%} of the completions; {told} (Fisher's exact p = {p:.2g})."
        )

    def warnings(self) -> Iterator[str]:
        """What a reader should know first."""
        rows = self.metrics
        if cut := [row["update"] for row in rows if row["ended"] < 0.5]:
            where = f"{len(cut)} of {len(rows)} updates" if len(rows) > 1 else "the only update"
            yield f"Most completions were cut off at sampling.max_new_tokens in {where}."
        if not rows:
            return
        first, last = rows[0], rows[-1]
        if last["repetition"] > max(0.05, 2 * first["repetition"]):
            yield (
                f"Repetition rose from {first['repetition']:.1%} to {last['repetition']:.1%} of "
                "the 4-grams: collapse shows there first."
            )
        if last["accuracy"] is None:
            return
        best = max(rows, key=lambda row: row["accuracy"])
        if last["accuracy"] < best["accuracy"] and last["entropy"] < best["entropy"]:
            p = self._p(best, last)
            fell = (
                f"accuracy on the training prompt fell from {best['accuracy']:.0%} in update "
                f"{best['update']} to {last['accuracy']:.0%} in update {last['update']} while "
                f"entropy fell on (p = {p:.2g})"
            )
            if p < SIGNIFICANT:
                yield f"Overtrained: {fell}; an earlier checkpoint may be better."
            else:
                yield f"Overtraining is neither shown nor excluded: {fell}."

    def right(self, row: dict[str, Any]) -> np.ndarray:
        """Of an update's graded completions, which are: a bool each, in no order."""
        graded = [self.records.get((1, i), {}).get("correct") for i in range(self.config.rollouts)]
        count = sum(correct is not None for correct in graded) or self.config.rollouts
        return np.arange(count) < round(row["accuracy"] * count)

    def _p(self, one: dict[str, Any], other: dict[str, Any]) -> float:
        counts = [[right.sum(), (~right).sum()] for right in (self.right(one), self.right(other))]
        return float(fisher_exact(counts).pvalue)


def read_run(folder: Path, name: str) -> Run:
    """Raises: UserError for a folder that is no run's, or whose records are damaged."""
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"RUN: {folder} is not the folder of a run: it has no {CONFIG}; name the --output of "
            "an em-kernels train"
        )
    config = read_yaml(folder / CONFIG)
    rollouts = read_rollouts(folder, config.rollouts)
    path, records = folder / ROLLOUTS, dict[tuple[int, int], dict[str, Any]]()
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        row = json.loads(line)
        records[row["update"], row["index"]] = row
    steps = sorted((folder / "checkpoints").glob("step-*"), key=lambda p: (len(p.name), p.name))
    checkpoint = steps[-1] if steps else None
    return Run(folder, name, config, read_metrics(folder), rollouts, records, checkpoint)
