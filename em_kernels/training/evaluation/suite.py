"""`em-kernels eval --suite`: a run's checkpoints, and its base, on several sets of problems."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..config import read_yaml
from ..run_folder import CHECKPOINTS, CONFIG, SUITE, steps_in
from ..runs.records import write_whole
from ..settings import UserError
from .completions import Completion
from .evaluate import EvalConfig, evaluate
from .statistics import paired_change, percent
from .task import open_model
from .vllm import served

QUICK = 100  # problems of each set
BASE = "base"


class ProblemSet(NamedTuple):
    """A set of problems: a file of --suite-data, or else a dataset of the hub."""

    name: str
    file: str  # without .jsonl or .parquet
    hub: str
    published: tuple[float, float]  # accuracy in %, of SUITES' model before and after training


# Sets by suite; add yours. Published: arXiv 2505.20282, Qwen2.5-Math-7B, Qwen's grader.
SUITES = {
    "qwen25-math": (
        ProblemSet("MATH-500", "math500", "HuggingFaceH4/MATH-500", (53.0, 78.8)),
        ProblemSet("Minerva", "minerva_math", "math-ai/minervamath", (11.0, 35.3)),
        ProblemSet("OlympiadBench", "olympiadbench", "math-ai/olympiadbench", (17.2, 39.7)),
        ProblemSet("AMC23", "amc23", "math-ai/amc23", (44.1, 70.3)),
    )
}
PUBLISHED = ("the paper's 7B, before", "the paper's 7B, after")


class SuiteAsked(NamedTuple):
    """A suite's name, where its sets are, how much of them is asked, and what samples."""

    suite: str
    data: Path | None = None  # folder with a file per set; None: the hub
    quick: bool = False
    engine: str = "transformers"  # or vllm


def models_of(model: str) -> dict[str, str]:
    """Return what is evaluated, by name: a run's base and checkpoints, or the model itself."""
    run = Path(model).expanduser()
    checkpoints = steps_in(run / CHECKPOINTS) if model else []
    if not checkpoints:
        return {BASE: model}
    return {BASE: read_yaml(run / CONFIG).model, **{path.name: str(path) for path in checkpoints}}


class _Set(NamedTuple):
    config: EvalConfig
    problems: int


def sets_of(config: EvalConfig, asked: SuiteAsked, console: Console) -> dict[str, _Set]:
    """Return the settings of each set whose problems can be read; say which are missing."""
    if asked.suite not in SUITES:
        raise UserError(f"suite: {asked.suite!r} is unknown; choose one of {', '.join(SUITES)}")
    found = {}
    for each in SUITES[asked.suite]:
        path = None
        if asked.data is not None:
            names = (asked.data / f"{each.file}{end}" for end in (".jsonl", ".parquet"))
            path = next((name for name in names if name.is_file()), None)
        changes: dict[str, Any] = {"data": str(path or each.hub)}
        changes["count"] = QUICK if asked.quick else None
        try:
            if path is None and asked.data is not None:
                raise UserError(f"{asked.data} has no {each.file}.jsonl or .parquet")
            found[each.name] = _set(config.model_copy(update=changes))
        except UserError as error:
            console.print(f"{each.name} is left out: {error}", markup=False, soft_wrap=True)
    if not found:
        raise UserError("suite: none of its sets can be read; name a folder with --suite-data")
    return found


def _set(config: EvalConfig) -> _Set:
    """Read a set's problems: all of them where it has fewer than a quick look takes."""
    try:
        return _Set(config, len(config.problems().problems))
    except UserError as error:
        if config.count is None or not str(error).startswith("count:"):
            raise
        return _set(config.model_copy(update={"count": None}))


class _Progress:
    """Tells before sampling how long it can take, and soon after its begin how long it will."""

    def __init__(self, completions: int, limit: int, enough: int, console: Console) -> None:
        self.completions, self.enough, self.console = completions, enough, console
        self.done, self.tokens, self.seconds = 0, 0, 0.0
        most = completions * limit / 1e6
        console.print(f"{completions} completions, at most {most:.3g} million tokens.")

    def __call__(self, done: Sequence[Completion], seconds: float) -> None:
        if self.done >= self.enough:
            return
        self.done, self.seconds = self.done + len(done), self.seconds + seconds
        self.tokens += sum(completion.tokens or 0 for completion in done)
        if self.done < self.enough or not self.tokens:
            return
        hours = self.completions / self.done * self.seconds / 3600
        rate, mean = self.tokens / self.seconds, self.tokens / self.done
        told = f"At the first batch's {rate:.0f} tokens/s and {mean:.0f} tokens each about"
        self.console.print(f"{told} {hours:.2g} hours.", soft_wrap=True)


def run_suite(config: EvalConfig, asked: SuiteAsked, console: Console) -> dict[str, Any]:
    """Evaluate a run's base and checkpoints, or one model, on every set of a suite.

    Each evaluation has a folder of its own in config.output, and is resumed there. Returns what
    suite.json holds: `models`, by name and set the results; `missing`, the sets left out.
    """
    sets, models = sets_of(config, asked, console), models_of(config.model)
    each = sum(one.problems for one in sets.values())
    limit = config.sampling.max_new_tokens
    enough = config.parallel if config.server or asked.engine == "vllm" else 1
    progress = _Progress(len(models) * each, limit, enough, console)
    results: dict[str, Any] = {}
    for label, model in models.items():
        results[label] = dict(_scores(sets, label, model, asked, progress, console))
    missing = [each.name for each in SUITES[asked.suite] if each.name not in sets]
    facts = {"suite": asked.suite, "quick": asked.quick, "grader": config.grader}
    report = {**facts, "model": config.model, "missing": missing, "models": results}
    write_whole(config.output / SUITE, json.dumps(report) + "\n")
    return report


def _scores(
    sets: dict[str, _Set],
    label: str,
    model: str,
    asked: SuiteAsked,
    progress: Callable[[Sequence[Completion], float], None],
    console: Console,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the results of one model, set by set; it is loaded once, or served once."""
    opened = None
    folder = next(iter(sets.values())).config.output
    gc.collect()  # the model before it
    server: AbstractContextManager[str | None] = nullcontext(None)
    if asked.engine == "vllm":
        server = served(model, folder / f"vllm-{label}.log", console)
    with server as url:
        for name, (config, _) in sets.items():
            output = folder / label / name.lower()
            changes = {"model": model, "output": output, "server": url or config.server}
            one = config.model_copy(update=changes)
            if opened is None and one.server is None:
                opened = open_model(one, console)
            console.print(f"{label} on {name}", markup=False)
            found = evaluate(one, console, opened=opened, on_batch=progress)
            yield name, found


def average(scores: dict[str, Any], grader: str) -> float:
    """Return the mean accuracy over the sets, each with the same weight."""
    return float(np.mean([found["graders"][grader]["accuracy"] for found in scores.values()]))


def table_of(report: dict[str, Any]) -> Table:
    """Return accuracies by model and set under both graders, beside the published ones."""
    models, sets = report["models"], _sets(report)
    first, *others = graders = _graders(report)
    table = Table("%", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.title = f"{report['model']}: by {first}, then by {', '.join(others)}"
    whole = not report["missing"]
    for name in [*sets, *(["average"] if whole else [])]:
        table.add_column(name, justify="right")
    for label, scores in models.items():
        by = [[scores[name]["graders"][g]["accuracy"] for g in graders] for name in sets]
        rows = [*by, *([[average(scores, g) for g in graders]] if whole else [])]
        table.add_row(label, *("  ".join(percent(share) for share in row) for row in rows))
        cut = [f"{scores[name]['cut']} cut off" for name in sets]
        table.add_row("", *cut, *([""] if whole else []), style="dim")
    published = {each.name: each.published for each in SUITES[report["suite"]]}
    for i, label in enumerate(PUBLISHED):
        cells = [f"{published[name][i]:.1f}" for name in sets]
        mean = [f"{np.mean([p[i] for p in published.values()]):.1f}"] if whole else []
        table.add_row(label, *cells, *mean)
    return table


def _sets(report: dict[str, Any]) -> list[str]:
    return list(next(iter(report["models"].values())))


def _graders(report: dict[str, Any]) -> list[str]:
    """Return the graders' names, that of the result first."""
    scores = next(iter(next(iter(report["models"].values())).values()))
    return sorted(scores["graders"], key=lambda name: name != report["grader"])


def readings(report: dict[str, Any]) -> Iterator[str]:
    """Yield what a reader of the table should know."""
    if report["missing"]:
        yield f"No average, as {', '.join(report['missing'])} is missing."
    if report["quick"]:
        yield f"Only the first {QUICK} problems of each set: not comparable with published figures."
    if len(report["models"]) < 3:
        return
    right = {label: _right(scores) for label, scores in report["models"].items()}
    half = {label: rows[::2].mean() for label, rows in right.items()}
    chosen = max(half, key=half.__getitem__)
    told = f"Best on every other problem: {chosen}, {percent(half[chosen])} %"
    if chosen != BASE:
        change, low, high, p = paired_change(right[BASE][1::2], right[chosen][1::2])
        told += (
            f"; on the rest, which did not choose it, {percent(right[chosen][1::2].mean())} %, "
            f"{100 * change:+.1f} points [{100 * low:.1f}, {100 * high:.1f}] from the base, "
            f"p = {p:.2g}"
        )
    yield f"{told}. More updates are not better: entropy falls on, accuracy need not."


def _right(scores: dict[str, Any]) -> np.ndarray:
    """Return the verdicts of all sets, the first sample of each problem."""
    return np.concatenate([np.array(found["right"], bool)[:, 0] for found in scores.values()])


def table_over_runs(reports: Sequence[dict[str, Any]]) -> Table:
    """Return the mean and the standard deviation over runs, by checkpoint and set."""
    first = reports[0]
    sets = [n for n in _sets(first) if all(n in _sets(report) for report in reports)]
    title = f"mean and standard deviation over {len(reports)} runs"
    table = Table("%", box=SIMPLE_HEAD, title=title)
    for name in sets:
        table.add_column(name, justify="right")
    for label in (name for name in first["models"] if all(name in r["models"] for r in reports)):
        shares = [[r["models"][label][name]["accuracy"] for r in reports] for name in sets]
        cells = [f"{100 * np.mean(s):.1f} ± {100 * np.std(s, ddof=1):.1f}" for s in shares]
        table.add_row(label, *cells)
    return table
