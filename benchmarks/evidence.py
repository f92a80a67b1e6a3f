"""`python -m benchmarks.evidence`: does One-shot EM help a small instruct model? Runs and controls.

Each run trains the model on one prompt, then scores the checkpoints after its first and its last
update greedily on the same problems. Its settings, metrics and verdicts go to one JSON file; its
checkpoints are deleted, and the next call goes on with the next run.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from em_kernels.training.config import read_yaml
from em_kernels.training.evaluation.statistics import paired_change, percent, wilson
from em_kernels.training.runs.records import write_whole

RESULTS = Path(__file__).parent / "results" / "evidence"
POOL, STEPS, SCORED = 24, 5, (1, 5)
HEADS = ("run", "update", "entropy", "right, %", "change, points", "p", "cut off, %")
TRAINING = f"--steps {STEPS} --rollouts 32 --max-new-tokens 256 --save-optimizer False"


class Arm(NamedTuple):
    """One training run: its prompt, learning rate, seed and objective.

    prompt: "pi1", "selected" (the first of the ranking) or "random" (another one of it).
    """

    prompt: str
    lr: float
    seed: int
    objective: str = "minimise"

    @property
    def name(self) -> str:
        """Name of the arm's result file."""
        end = "" if self.objective == "minimise" else f"-{self.objective}"
        return f"{self.prompt}-lr{self.lr:g}-seed{self.seed}{end}"


# In this order. Seeds and updates were fixed before the first result was seen.
ARMS = (
    Arm("pi1", 2e-5, 15),
    Arm("selected", 2e-6, 15),
    Arm("pi1", 2e-6, 15),
    Arm("selected", 2e-5, 15),
    Arm("pi1", 2e-5, 16),
    Arm("selected", 2e-6, 16),
    Arm("pi1", 2e-5, 17),
    Arm("selected", 2e-6, 17),
    Arm("pi1", 2e-5, 15, "maximise"),
    Arm("selected", 2e-6, 15, "maximise"),
    Arm("random", 2e-6, 15),
)


class Study(NamedTuple):
    """Model and data of all arms, and the folder that holds runs and evaluations meanwhile."""

    model: str
    data: Path
    pi1: Path
    work: Path
    problems: int

    def em_kernels(self, command: str, *more: object) -> None:
        """Run a command of em-kernels; SystemExit where it fails."""
        arguments = [sys.executable, "-m", "em_kernels.cli", *command.split(), *map(str, more)]
        print("$ em-kernels", *arguments[3:], flush=True)
        if code := subprocess.run(arguments, check=False).returncode:
            raise SystemExit(code)

    def score(self, model: object, output: Path) -> dict[str, Any]:
        """Score a model greedily on the first problems; return its results."""
        task = f"eval --template qwen25-math-cot --count {self.problems} --max-new-tokens 512"
        self.em_kernels(task, "--data", self.data, "--model", model, "--output", output)
        found = json.loads((output / "results.json").read_text())
        return {**found, "model": Path(str(model)).name, "data": self.data.name}

    def selection(self) -> Path:
        """Rank the problems that follow the scored ones; return the ranking."""
        output = self.work / "selection"
        if not (output / "selection.jsonl").exists():
            task = f"select --template qwen25-math-cot --skip {self.problems} --count {POOL}"
            task += " --max-new-tokens 256 --seed 15"
            self.em_kernels(task, "--data", self.data, "--model", self.model, "--output", output)
        return output / "selection.jsonl"

    def train(self, arm: Arm) -> Path:
        """Train an arm, or go on with it; return its folder."""
        run = self.work / arm.name
        if (run / "config.yaml").exists():
            self.em_kernels("train --resume", run)
            return run
        flags = f"train {TRAINING} --lr {arm.lr} --seed {arm.seed} --save-at 1 {STEPS}"
        if arm.objective != "minimise":
            flags += f" --objective {arm.objective}"
        prompt: list[object] = ["--prompt-from", self.pi1]
        if arm.prompt != "pi1":
            others = random.Random(arm.seed).randrange(1, POOL)  # places in the ranking
            row = 0 if arm.prompt == "selected" else others
            prompt = ["--prompt-from", self.selection(), "--prompt-rows", row]
            prompt.append("--no-chat-template")  # The ranking holds prompts as the model reads them
        self.em_kernels(flags, "--model", self.model, "--output", run, *prompt)
        return run


def measure(study: Study, arm: Arm) -> dict[str, Any]:
    """Train and score an arm; return what its result file holds."""
    run = study.train(arm)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"arm": arm._asdict(), "metrics": metrics, "scores": {}}
    for update in SCORED:
        checkpoint = run / "checkpoints" / f"step-{update:05d}"
        found["scores"][update] = study.score(checkpoint, study.work / f"{arm.name}-{update}")
    settings = read_yaml(run / "config.yaml").flat()
    names = {name: Path(str(settings[name])).name for name in ("model", "prompt_from", "output")}
    return {**found, "settings": settings | names}  # names, as nobody else has these folders


def rows(results: Path) -> list[tuple[str, ...]]:
    """Return the cells under `HEADS` of the base and of the arms that are done."""
    base = json.loads((results / "base.json").read_text())
    before = np.array(base["right"])[:, 0]
    cut = percent(1 - base["ended"])
    found = [("base", "", "", percent(before.mean(), wilson(before)), "", "", cut)]
    for arm in ARMS:
        if not (file := results / f"{arm.name}.json").exists():
            continue
        done = json.loads(file.read_text())
        for update, score in done["scores"].items():
            now = np.array(score["right"])[:, 0]
            change, low, high, p = paired_change(before, now)
            points = f"{100 * change:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            entropy = f"{done['metrics'][int(update) - 1]['entropy']:.3f}"
            right, cut = percent(now.mean(), wilson(now)), percent(1 - score["ended"])
            found.append((arm.name, update, entropy, right, points, f"{p:.2g}", cut))
    return found


def markdown(results: Path = RESULTS) -> str:
    """Return the table as docs/evidence.md shows it."""
    lines = [HEADS, ("---",) * len(HEADS), *rows(results)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def table(results: Path) -> Table:
    """Return a table of the arms that are done: accuracy and its change from the base."""
    shown = Table(*HEADS)
    for cells in rows(results):
        shown.add_row(*cells)
    return shown


def main() -> None:
    """Run the arms that have no result file yet, then print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.evidence", description=__doc__)
    parser.add_argument("--model", required=True, help="model: a folder, hub id or GGUF file")
    parser.add_argument("--data", type=Path, required=True, help="MATH-500 as .jsonl")
    parser.add_argument("--pi1", type=Path, required=True, help="the paper's pi1_r1280.parquet")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs, several GB")
    parser.add_argument("--problems", type=int, default=128, help="problems scored (default: 128)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--only", help="run this arm alone, by name")
    options = parser.parse_args()
    study = Study(options.model, options.data, options.pi1, options.work, options.problems)
    options.results.mkdir(parents=True, exist_ok=True)
    if not (file := options.results / "base.json").exists():
        write_whole(file, json.dumps(study.score(study.model, study.work / "base")) + "\n")
    for arm in ARMS:
        file = options.results / f"{arm.name}.json"
        if file.exists() or (options.only and arm.name != options.only):
            continue
        write_whole(file, json.dumps(measure(study, arm)) + "\n")
        shutil.rmtree(study.work / arm.name / "checkpoints")
        Console().print(table(options.results))
    Console().print(table(options.results))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("benchmarks.evidence: interrupted; the same command goes on")
