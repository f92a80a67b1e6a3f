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
from ..training.evaluation.suite import SuiteAsked, readings, run_suite, table_of, table_over_runs
from ..training.run_folder import CHECKPOINTS, SUITES, steps_in, update_of
from ..training.settings import UserError
from .flags import parse_settings

HELP = """--regrade DIR grades an evaluation's saved completions again; --grader then changes whose
verdicts are its result. --against DIR compares with an earlier evaluation of the same problems by
McNemar's exact test, both by the later one's grader.

--checkpoint N takes that checkpoint of a run, not its newest. --suite qwen25-math evaluates a run's
base and all its checkpoints on the paper's four sets, from the files of --suite-data DIR or from
the hub, into the run's folder; --quick takes 100 problems of each, --runs RUN... adds other runs,
--engine vllm starts a vLLM server for each model.

Examples:
  em-kernels eval --model demo --data math500.jsonl --count 50 --max-new-tokens 512
  em-kernels eval --model Qwen/Qwen2.5-Math-7B --data HuggingFaceH4/MATH-500 \\
    --template qwen25-math-cot --output evals/base
  em-kernels eval --model demo --data addition --template few-shot --teacher-forced
  em-kernels eval --regrade evals/after --against evals/base
  em-kernels eval --regrade evals/after --grader qwen25
  em-kernels eval --suite qwen25-math --model runs/one --grader qwen25"""


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="em-kernels eval", add_help=False, allow_abbrev=False)
    parser.add_argument("--regrade", type=Path)
    parser.add_argument("--against", type=Path)
    known, rest = parser.parse_known_args(arguments)
    console, progress = Terminal(), Terminal(stderr=True)
    if known.against is not None:
        read_results(known.against)  # Refuse a wrong folder before the evaluation, not after it.
    if known.regrade is not None:
        parser.add_argument("--grader")
        known, rest = parser.parse_known_args(arguments)
        if rest:
            raise UserError(f"regrade: goes with --against and --grader, not with {rest[0]}")
        folder, results = known.regrade, regrade(known.regrade, progress, known.grader)
    else:
        parser.add_argument("--checkpoint", type=int)
        parser.add_argument("--suite")
        parser.add_argument("--suite-data", type=Path)
        parser.add_argument("--quick", action="store_true")
        parser.add_argument("--runs", nargs="+", default=[])
        parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
        known, rest = parser.parse_known_args(arguments)
        if known.suite is not None:
            return _suite(known, rest, console, progress)
        for name in ("suite_data", "quick", "runs"):
            if getattr(known, name):
                raise UserError(f"{name}: goes with suite, which names the sets")
        if known.engine != "transformers":
            raise UserError("engine: goes with suite; a server of yours is named by --server")
        config = parse_settings(EvalConfig(), "eval", rest, HELP)
        config = config.model_copy(update={"model": _checkpoint(config.model, known, progress)})
        folder, results = config.output, evaluate(config, progress, known.against)
    show_results(results, console)
    if known.against is not None:
        console.print(compare(known.against, folder), markup=False, soft_wrap=True)
    console.print(f"Kept in {folder}", markup=False, soft_wrap=True)
    return 0


def _checkpoint(model: str, known: argparse.Namespace, console: Console) -> str:
    """Return the model, or the checkpoint that is meant by a run's folder; tell which."""
    found = steps_in(Path(model).expanduser() / CHECKPOINTS) if model else []
    if known.checkpoint is None:
        if len(found) > 1:
            told = f"{model}: {found[-1].name} of {len(found)} checkpoints, the newest"
            console.print(f"{told}. More updates are not better: --checkpoint N takes another.")
        return model
    if known.checkpoint not in map(update_of, found):
        have = " and ".join(str(update_of(path)) for path in found) or "none"
        raise UserError(f"checkpoint: {known.checkpoint} is not in {model}, which has {have}")
    return str(next(path for path in found if update_of(path) == known.checkpoint))


def _suite(known: argparse.Namespace, rest: list[str], console: Console, progress: Console) -> int:
    """Evaluate runs or models on a suite; print tables, and how to read them."""
    if known.against or known.checkpoint is not None:
        name = "against" if known.against else "checkpoint"
        raise UserError(f"{name}: goes without suite, which compares all checkpoints with the base")
    default = EvalConfig().model_copy(update={"template": "qwen25-math-cot"})
    asked = SuiteAsked(known.suite, known.suite_data, known.quick, known.engine)
    given = parse_settings(default, "eval", rest, HELP)
    if given.data:
        raise UserError("suite: goes without data; it names its sets")
    reports = []
    for model in (given.model, *known.runs):
        config, run = given.model_copy(update={"model": model}), Path(model).expanduser()
        if config.output == default.output:
            output = run / SUITES if (run / CHECKPOINTS).is_dir() else Path("evals/suite")
            config = config.model_copy(update={"output": output})
        elif known.runs:
            raise UserError("output: of several runs each is evaluated in its own folder")
        reports.append(run_suite(config, asked, progress))
        console.print(table_of(reports[-1]))
        for told in readings(reports[-1]):
            console.print(told, markup=False, soft_wrap=True)
        console.print(f"Kept in {config.output}", markup=False, soft_wrap=True)
    if len(reports) > 1:
        console.print(table_over_runs(reports))
    return 0


def show_results(results: Mapping[str, Any], console: Console) -> None:
    """Print accuracies as a table, and how many completions were cut off."""
    n, k, rates = results["problems"], results["samples"], results.get("probability", {})
    table = Table("", "%", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    name = "greedy, teacher-forced" if rates else "accuracy" if k == 1 else f"avg@{k}"
    graders = results.get("graders", {})
    by = f", by {results['grader']}" if graders else ""
    table.add_row(name + by, percent(results["accuracy"], results["interval"]))
    for other, scores in graders.items():
        if other != results["grader"]:
            table.add_row(f"{name}, by {other}", percent(scores["accuracy"], scores["interval"]))
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
