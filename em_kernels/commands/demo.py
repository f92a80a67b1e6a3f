"""The demo: One-shot EM of a 135M model on two-digit addition, by the commands that a user types,
with the controls that it needs.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console

from ..training.config import UserError
from ..training.console import Terminal
from ..training.evaluation.evaluate import read_results
from ..training.evaluation.statistics import mean_interval, paired_change, percent
from ..training.run_folder import CONFIG
from . import eval as eval_
from . import report, select, train

POOL, HELD_OUT = 24, 1000
PARTS = ("selection", "run", "before", "after", "report.html", "report-plots")
TASK = "--model demo --data addition --template few-shot"
SAMPLING = "--temperature 1 --top-k 0 --top-p 1 --repetition-penalty 1 --max-new-tokens 24"


def run(arguments: list[str]) -> int:
    """Select, train and compare on the demo model, in the first free folder unless one is named."""
    parser = argparse.ArgumentParser(
        prog="em-kernels demo",
        description="One-shot EM of SmolLM2-135M-Instruct on two-digit addition, by the other "
        "commands: select picks the prompt of 24 whose correctness varies most, train trains 5 "
        "updates of 32 completions on it, eval compares accuracy on 1000 held-out problems before "
        "and after, beside the untrained model at lower temperatures, report draws what happened.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of problems, samples and training")
    parser.add_argument(
        "--output", type=Path, help="folder of it all; None is runs/demo-N, the first free"
    )
    known = parser.parse_args(arguments)
    output = known.output
    if output is None:
        free = (Path(f"runs/demo-{n}") for n in range(1, sys.maxsize))
        output = next(folder for folder in free if not folder.exists())
    try:
        run_demo(known.seed, output, Terminal())
    except KeyboardInterrupt:
        again = f"em-kernels demo --seed {known.seed} --output {output}"
        raise KeyboardInterrupt(f"interrupted; {again} goes on") from None
    return 0


def run_demo(seed: int, output: Path, console: Console) -> str:
    """Select a prompt, train on it, measure before and after on held-out problems, draw a report;
    returns what the numbers show. In the folder of a demo that was stopped it goes on.
    """

    def type_(command: ModuleType, name: str, text: str, *folders: object) -> None:
        arguments = [*shlex.split(text), *map(str, folders)]
        console.print(
            f"\n$ em-kernels {name} {shlex.join(arguments)}", markup=False, soft_wrap=True
        )
        command.run(arguments)

    if output.exists() and (not output.is_dir() or {*os.listdir(output)} - {*PARTS}):
        raise UserError(f"output: {output} already holds other files; choose another")
    pool, trained, before, after, page, _ = (output / name for name in PARTS)
    same = f"--seed {seed}"
    held_out = f"--data addition --template few-shot --skip {POOL} --count {HELD_OUT} {same}"
    scored = f"{held_out} --teacher-forced --model"
    type_(select, "select", f"{TASK} --count {POOL} {SAMPLING} {same} --output", pool)
    type_(eval_, "eval", scored, "demo", "--output", before)
    rows = pool / "selection.jsonl"
    text = f"--preset demo {same} --prompt-from"
    if (trained / CONFIG).exists():
        type_(train, "train", "--resume", trained)
    else:
        type_(train, "train", text, rows, "--output", trained)
    type_(eval_, "eval", scored, trained, "--output", after, "--against", before)
    type_(report, "report", "", trained, "--output", page)
    told = reading(read_results(before), read_results(after))
    console.print(f"\n{told}\nEverything is in {output}.", markup=False, soft_wrap=True)
    return told


def reading(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Say what the numbers show and what they do not."""
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
