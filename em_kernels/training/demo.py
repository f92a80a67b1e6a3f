"""The demo: One-shot EM of a 135M model on two-digit addition, by the commands that a user types,
with the controls that it needs.
"""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..cli import train
from .config import UserError
from .evaluate import eval_command, of_problems, paired_change, percent, read_results
from .report import report_command
from .select import select_command

POOL, HELD_OUT = 24, 1000
PARTS = ("selection", "run", "before", "after", "report.html", "report-plots")
TASK = "--model demo --data addition --template few-shot"
SAMPLING = "--temperature 1 --top-k 0 --top-p 1 --repetition-penalty 1 --max-new-tokens 24"


def run_demo(seed: int, output: Path, console: Console) -> str:
    """Select a prompt, train on it, measure before and after on held-out problems, draw a report;
    returns what the numbers show. In the folder of a demo that was stopped it goes on.
    """

    def run(command: Callable[[list[str]], int], name: str, text: str, *folders: object) -> None:
        arguments = [*shlex.split(text), *map(str, folders)]
        console.print(
            f"\n$ em-kernels {name} {shlex.join(arguments)}", markup=False, soft_wrap=True
        )
        command(arguments)

    if output.exists() and (not output.is_dir() or {*os.listdir(output)} - {*PARTS}):
        raise UserError(f"output: {output} already holds other files; choose another")
    pool, trained, before, after, page, _ = (output / name for name in PARTS)
    same = f"--seed {seed}"
    held_out = f"--data addition --template few-shot --skip {POOL} --count {HELD_OUT} {same}"
    scored = f"{held_out} --teacher-forced --model"
    run(select_command, "select", f"{TASK} --count {POOL} {SAMPLING} {same} --output", pool)
    run(eval_command, "eval", scored, "demo", "--output", before)
    rows = pool / "selection.jsonl"
    text = f"--preset demo {same} --prompt-from"
    if (trained / "config.yaml").exists():
        run(train, "train", "--resume", trained)
    else:
        run(train, "train", text, rows, "--output", trained)
    run(eval_command, "eval", scored, trained, "--output", after, "--against", before)
    run(report_command, "report", "", trained, "--output", page)
    told = reading(read_results(before), read_results(after))
    console.print(f"\n{told}\nEverything is in {output}.", markup=False, soft_wrap=True)
    return told


def reading(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What the numbers show and do not show, from the numbers."""
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
    low, high = of_problems(trained - drawn[best])
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
