"""`em-kernels eval`: accuracy on problems with known answers."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..training.console import Terminal
from ..training.evaluation.evaluate import EvalConfig, compare, evaluate, read_results, regrade
from ..training.evaluation.statistics import mean_interval, percent
from ..training.settings import UserError
from .flags import parse_settings

HELP = """--regrade DIR grades an evaluation's saved completions again; --against DIR compares with
an earlier evaluation of the same problems, by McNemar's exact test.

Examples:
  em-kernels eval --model demo --data math500.jsonl --count 50 --max-new-tokens 512
  em-kernels eval --model Qwen/Qwen2.5-Math-7B --data HuggingFaceH4/MATH-500 \\
    --template qwen25-math-cot --output evals/base
  em-kernels eval --model demo --data addition --template few-shot --teacher-forced
  em-kernels eval --regrade evals/after --against evals/base"""


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="em-kernels eval", add_help=False, allow_abbrev=False)
    parser.add_argument("--regrade", type=Path)
    parser.add_argument("--against", type=Path)
    known, rest = parser.parse_known_args(arguments)
    console, progress = Terminal(), Terminal(stderr=True)
    if known.against is not None:
        read_results(known.against)  # Refuse a wrong folder before the evaluation, not after it.
    if known.regrade is not None:
        if rest:
            raise UserError(f"regrade: goes with --against alone, not with {rest[0]}")
        folder, results = known.regrade, regrade(known.regrade, progress)
    else:
        config = parse_settings(EvalConfig(), "eval", rest, HELP)
        folder, results = config.output, evaluate(config, progress, known.against)
    show_results(results, console)
    if known.against is not None:
        console.print(compare(known.against, folder), markup=False, soft_wrap=True)
    console.print(f"Kept in {folder}", markup=False, soft_wrap=True)
    return 0


def show_results(results: Mapping[str, Any], console: Console) -> None:
    """Print accuracies as a table, and how many completions were cut off."""
    n, k, rates = results["problems"], results["samples"], results.get("probability", {})
    table = Table("", "%", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    name = "greedy, teacher-forced" if rates else "accuracy" if k == 1 else f"avg@{k}"
    table.add_row(name, percent(results["accuracy"], results["interval"]))
    for pass_k, share in results["pass_at"].items() if k > 1 else ():
        table.add_row(f"pass@{pass_k}", percent(share))
    for temperature, values in rates.items():
        cells = percent(np.mean(values), mean_interval(np.array(values)))
        table.add_row(f"probability of the answer, T = {float(temperature):g}", cells)
    title = f"{results['model']} on {n} problems of {results['data']}"
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
    if cut := round((1 - results.get("ended", 1)) * n * k):
        console.print(f"{cut} of {n * k} completions were cut off by sampling.max_new_tokens.")
