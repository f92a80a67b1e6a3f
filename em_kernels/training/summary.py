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
    records: dict[int, list[dict[str, Any]]]  # the same, as rollouts.jsonl has them
    checkpoint: Path | None  # the last

    @property
    def last(self) -> int:
        """The last update whose completions are recorded; 0 where there is none."""
        return max(self.rollouts, default=0)

    @property
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

    @property
    def prompt(self) -> str:
        """As the settings have it."""
        rows = ", ".join(map(str, self.config.prompt_rows))
        return self.config.prompt or f"rows {rows} of {self.config.prompt_from}"

    def happened(self) -> str:
        """In a sentence or two."""
        if not self.metrics:
            return "No finished update is recorded: the run was stopped before."
        first, last = self.metrics[0], self.metrics[-1]
        entropy, accuracy = f"{first['entropy']:.3g}", "Accuracy on the training prompt"
        if first is last:
            text = f"One update, before which the entropy was {entropy} nats a token; after it "
            text += "nothing was sampled."
        else:
            text = f"From update 1 to {last['update']} the entropy went from {entropy} to "
            text += f"{last['entropy']:.3g} nats a token."
        if first["accuracy"] is None:
            return f"{text} Accuracy is not known: the prompt came without an answer."
        if first is last:
            return f"{text} {accuracy} was {first['accuracy']:.0%}."
        p = self.p_value(first, last)
        told = "more than chance explains" if p < SIGNIFICANT else "a change is not shown"
        return (
            f"{text} {accuracy} went from {first['accuracy']:.0%} to {last['accuracy']:.0%} of the "
            f"completions; {told} (Fisher's exact p = {p:.2g})."
        )

    def warnings(self) -> Iterator[str]:
        """What a reader should know first."""
        if not (rows := self.metrics):
            return
        if cut := sum(row["ended"] < 0.5 for row in rows):
            where = f"{cut} of {len(rows)} updates" if len(rows) > 1 else "the only update"
            yield f"Most completions were cut off at sampling.max_new_tokens in {where}."
        before, now = rows[0]["repetition"], rows[-1]["repetition"]
        if now > max(0.05, 2 * before):
            yield (
                f"Repetition rose from {before:.1%} to {now:.1%} of the 4-grams: collapse shows "
                "there first."
            )
        if (last := rows[-1])["accuracy"] is None:
            return
        best = max(rows, key=lambda row: row["accuracy"])
        if last["accuracy"] < best["accuracy"] and last["entropy"] < best["entropy"]:
            p = self.p_value(best, last)
            told = (
                "Overtrained" if p < SIGNIFICANT else "Overtraining is neither shown nor excluded"
            )
            yield (
                f"{told}: accuracy on the training prompt fell from {best['accuracy']:.0%} in "
                f"update {best['update']} to {last['accuracy']:.0%} in update {last['update']} "
                f"while entropy fell on (p = {p:.2g}); an earlier checkpoint may be better."
            )

    def right(self, row: dict[str, Any]) -> np.ndarray:
        """Of an update's graded completions, which are: a bool each, in no order."""
        graded = [record["correct"] is not None for record in self.records.get(1, ())]
        count = sum(graded) or self.config.rollouts
        return np.arange(count) < round(row["accuracy"] * count)

    def p_value(self, one: dict[str, Any], other: dict[str, Any]) -> float:
        """Of their accuracies being the same."""
        counts = [np.bincount(self.right(row), minlength=2) for row in (one, other)]
        return float(fisher_exact(counts).pvalue)


def read_run(folder: Path, name: str) -> Run:
    """Raises: UserError for a folder that is no run's, or whose records are damaged."""
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"RUN: {folder} is not the folder of a run: it has no {CONFIG}; name the --output of "
            "an em-kernels train"
        )
    config = read_yaml(folder / CONFIG)
    rollouts, n = read_rollouts(folder, config.rollouts), config.rollouts
    lines = (folder / ROLLOUTS).read_bytes().split(b"\n") if rollouts else []
    records = {i: [json.loads(line) for line in lines[i * n - n : i * n]] for i in rollouts}
    steps = (folder / "checkpoints").glob("step-*")
    checkpoint = max(steps, key=lambda path: (len(path.name), path.name), default=None)
    return Run(folder, name, config, read_metrics(folder), rollouts, records, checkpoint)
