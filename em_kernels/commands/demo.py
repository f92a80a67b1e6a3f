"""`em-kernels demo`: One-shot EM on two-digit addition, by the commands that a user would type."""

import argparse
import os
import shlex
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console

from ..training.console import Terminal
from ..training.evaluation.evaluate import read_results
from ..training.evaluation.select import SELECTION
from ..training.evaluation.statistics import mean_interval, paired_change, percent
from ..training.run_folder import CONFIG, REPORT
from ..training.settings import UserError
from . import eval as eval_
from . import report, select, train

POOL, HELD_OUT = 24, 1000
PARTS = ("selection", "run", "before", "after", REPORT, "report-plots")
SAMPLING = "--temperature 1 --top-k 0 --top-p 1 --repetition-penalty 1 --max-new-tokens 24"


def run(arguments: list[str]) -> int:
    """Run the demo in --output, by default the first runs/demo-N that does not exist."""
    parser = argparse.ArgumentParser(
        prog="em-kernels demo",
        description="One-shot EM of SmolLM2-135M-Instruct on two-digit addition, which runs the "
        "other commands. select picks, of 24 prompts, the one whose correctness varies most. train "
        "runs 5 updates of 32 completions on it. eval measures accuracy on 1000 held-out problems "
        "before and after, and of the untrained model at lower temperatures. report makes a page "
        "of it all.",
    )
    seed = "seed of problems, samples and training (default: 0)"
    parser.add_argument("--seed", type=int, default=0, help=seed)
    folder = "folder for everything (default: runs/demo-N, the first that does not exist)"
    parser.add_argument("--output", type=Path, help=folder)
    known = parser.parse_args(arguments)
    new = (path for n in count(1) if not (path := Path(f"runs/demo-{n}")).exists())
    output = known.output or next(new)
    try:
        run_demo(known.seed, output, Terminal())
    except KeyboardInterrupt:
        again = f"em-kernels demo --seed {known.seed} --output {output}"
        raise KeyboardInterrupt(f"interrupted; {again} continues it") from None
    return 0


def run_demo(seed: int, output: Path, console: Console) -> str:
    """Run the demo's commands, or go on with a stopped demo; return what the numbers show."""

    def execute(command: ModuleType, text: str, *folders: object) -> None:
        name = command.__name__.rpartition(".")[2]
        arguments = [*shlex.split(text), *map(str, folders)]
        line = f"\n$ em-kernels {name} {shlex.join(arguments)}"
        console.print(line, markup=False, soft_wrap=True)
        command.run(arguments)

    if output.exists() and (not output.is_dir() or {*os.listdir(output)} - {*PARTS}):
        raise UserError(f"output: {output} already holds other files; choose another")
    pool, trained, before, after, page, _ = (output / name for name in PARTS)
    task = "--data addition --template few-shot"
    held_out = f"{task} --skip {POOL} --count {HELD_OUT} --seed {seed} --teacher-forced --model"
    chosen = f"--model demo {task} --count {POOL} {SAMPLING} --seed {seed} --output"
    execute(select, chosen, pool)
    execute(eval_, held_out, "demo", "--output", before)
    if (trained / CONFIG).exists():
        execute(train, "--resume", trained)
    else:
        start = f"--preset demo --seed {seed} --prompt-from"
        execute(train, start, pool / SELECTION, "--output", trained)
    execute(eval_, held_out, trained, "--output", after, "--against", before)
    execute(report, "", trained, "--output", page)
    told = reading(read_results(before), read_results(after))
    console.print(f"\n{told}\nEverything is in {output}.", markup=False, soft_wrap=True)
    return told


def reading(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return in words what the results before and after training show, and what they do not."""
    base, now = (np.array(results["right"])[:, 0] for results in (before, after))
    change, low, high, p = paired_change(base, now)
    if p < 0.05:
        points = f"{100 * abs(change):.1f} points"
        greedy = f"{'rose' if change > 0 else 'fell'} by {points}, more than chance explains"
    else:
        interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
        greedy = f"changed by {100 * change:+.1f} points ({interval}), not shown to be a change"
    drawn = {float(t): np.array(row) for t, row in before["probability"].items()}
    best = max(drawn, key=lambda t: drawn[t].mean())
    trained = np.array({float(t): row for t, row in after["probability"].items()}[1.0])
    low, high = mean_interval(trained - drawn[best])
    relation = "above that" if low > 0 else "below that" if high < 0 else "not shown to differ"
    untrained, tempered = (percent(drawn[t].mean()) for t in (1.0, best))
    return (
        f"Greedy accuracy {greedy} (p = {p:.2g}). Sampled at T = 1 the trained model has "
        f"{percent(trained.mean())} %, the untrained one {untrained} %; but merely sampling the "
        f"untrained one at T = {best:g} gives {tempered} %, and the trained model is {relation}: a "
        "sampled gain that a lower temperature also gives is sharpening, not learning. One seed, "
        "one prompt, one small model: other seeds move these numbers by several points. "
        "em-kernels study tells more."
    )
