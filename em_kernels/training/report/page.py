"""Runs as one HTML page: what happened, curves, completions by entropy, how the logits moved."""

import json
import shutil
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from rich.console import Console
from scipy.stats import fisher_exact
from transformers import PreTrainedTokenizerBase

from ... import __version__
from ..config import TrainConfig, read_yaml
from ..console import Terminal
from ..data.grading import final_answer
from ..device_memory import is_out_of_memory
from ..rollouts.sampling import Rollout
from ..run_folder import CONFIG, ROLLOUTS, SUITE, SUITES, newest_checkpoint
from ..runs.records import read_metrics, read_rollouts, write_whole
from ..settings import UserError
from ..stopping import SIGNIFICANT
from .figures import COLOURS, CURVES, curves, density, suite_curves
from .logit_shift import Measures, Shift, shift

LEVELS = (0.01, 0.1, 0.3, 0.7, 1.5, 3.0)  # nats, at which a token's background changes
SHOWN, LONGEST = 12, 256  # completions on a page, 1 to 3 per run and update; tokens of each
RANKS = {"1": 1, "2": 2, "3 to 5": 5, "6 to 10": 10, "11 to 100": 100, "over 100": sys.maxsize}
SPREAD = ("entropy", "accuracy", "mean_length", "repetition", "grad_norm")  # shown over runs


class Run(NamedTuple):
    """Records of a finished, a stopped or a running run."""

    folder: Path
    config: TrainConfig
    metrics: list[dict[str, Any]]  # each with `right`: bools of the graded completions, unordered
    rollouts: dict[int, list[Rollout]]  # by update
    records: dict[int, list[dict[str, Any]]]  # lines of rollouts.jsonl, by update
    checkpoint: Path | None  # the newest
    suite: dict[str, Any] | None = None  # results of em-kernels eval --suite

    @property
    def last(self) -> int:
        """The last update whose completions are recorded; 0 if there is none."""
        return max(self.rollouts, default=0)


def read_run(folder: Path) -> Run:
    """Read a run's records; UserError for a folder that is no run's, or damaged records."""
    if not (folder / CONFIG).is_file():
        why = f"{folder} is not the folder of a run: it has no {CONFIG}"
        raise UserError(f"RUN: {why}; name the --output of an em-kernels train")
    config, metrics = read_yaml(folder / CONFIG), read_metrics(folder)
    rollouts, n = read_rollouts(folder, config.rollouts), config.rollouts
    lines = (folder / ROLLOUTS).read_bytes().split(b"\n") if rollouts else []
    records = {i: [json.loads(line) for line in lines[i * n - n : i * n]] for i in rollouts}
    answered = sum(record["correct"] is not None for record in records.get(1, ())) or n
    for row in metrics:
        row["right"] = np.arange(answered) < round((row["accuracy"] or 0) * answered)
    newest, suite = newest_checkpoint(folder), folder / SUITES / SUITE
    found = json.loads(suite.read_text("utf-8")) if suite.is_file() else None
    return Run(folder, config, metrics, rollouts, records, newest, found)


def settings_of(run: Run) -> dict[str, str]:
    """Describe the main settings; an empty one is left out of the page."""
    config, sampling = run.config, run.config.sampling
    rank = f", rank {config.lora_rank}" if config.mode == "lora" else ""
    return {
        "model": config.model,
        "trained": f"{config.mode}{rank}, {config.dtype}",
        "updates": f"{len(run.metrics)} of {config.steps}",
        "completions per update": str(config.rollouts),
        "sampling": f"T {sampling.temperature:g}, top_k {sampling.top_k}, "
        f"top_p {sampling.top_p:g}, repetition penalty {sampling.repetition_penalty:g}, "
        f"at most {sampling.max_new_tokens} tokens",
        "loss": f"entropy at T {config.temperature:g}" + ", official" * config.official_loss,
        "learning rate": f"{config.lr:g}" if config.lr else "",
        "gradient tolerance": f"{config.grad_tolerance:g}",
        "seed": str(config.seed),
        "answer": config.answer or "",
        "completions from": str(config.rollouts_from or ""),
        "folder": str(run.folder),
    }


def p_value(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return Fisher's exact p value for two updates having the same accuracy."""
    return float(fisher_exact([np.bincount(row["right"], minlength=2) for row in (one, other)])[1])


def happened(metrics: list[dict[str, Any]]) -> str:
    """Say in a sentence or two how entropy and accuracy changed."""
    if not metrics:
        return "No update has finished yet."
    first, last, accuracy = metrics[0], metrics[-1], "Accuracy on the training prompt"
    n, (start, end) = last["update"], (f"{row['entropy']:.3g}" for row in (first, last))
    text = f"From update 1 to {n} the entropy went from {start} to {end} nats per token."
    if first is last:
        text = f"One update was made; the entropy before it was {start} nats per token, "
        text += "and nothing was sampled after it."
    # An answer may have been added on resume.
    if not (known := [row for row in metrics if row["accuracy"] is not None]):
        return f"{text} Accuracy is not known: the prompt came without an answer."
    since = "" if known[0] is first else f" in update {known[0]['update']}"
    first, last = known[0], known[-1]
    if first is last:
        return f"{text} {accuracy} was {first['accuracy']:.0%}{since}."
    p = p_value(first, last)
    verdict = "more than chance explains" if p < SIGNIFICANT else "a change is not shown"
    return (
        f"{text} {accuracy} went from {first['accuracy']:.0%}{since} to {last['accuracy']:.0%} of "
        f"the completions; {verdict} (Fisher's exact p = {p:.2g})."
    )


def warnings(metrics: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the sentences that a reader should see first."""
    if not metrics:
        return
    if cut := sum(row["ended"] < 0.5 for row in metrics):
        where = f"{cut} of {len(metrics)} updates" if len(metrics) > 1 else "the only update"
        yield f"Most completions were cut off at sampling.max_new_tokens in {where}."
    first, last = metrics[0]["repetition"], metrics[-1]["repetition"]
    if last > max(0.05, 2 * first):
        risen = f"Repetition rose from {first:.1%} to {last:.1%} of the 4-grams"
        yield f"{risen}: an early sign of collapse."
    if not (known := [row for row in metrics if row["accuracy"] is not None]):
        return
    now, best = known[-1], max(known, key=lambda row: row["accuracy"])
    fell = now["accuracy"] < best["accuracy"] and now["entropy"] < best["entropy"]
    if fell and (p := p_value(best, now)) < SIGNIFICANT:
        yield (
            f"Overtrained: accuracy on the training prompt fell from {best['accuracy']:.0%} in "
            f"update {best['update']} to {now['accuracy']:.0%} in update {now['update']} while "
            f"entropy kept falling (p = {p:.2g}); an earlier checkpoint may be better."
        )


def over_runs(metrics: Sequence[list[dict[str, Any]]]) -> list[list[str]]:
    """Return a table, its heads first: mean and standard deviation over runs, of each update that
    all have made; empty for a single run.
    """
    common = set.intersection(*({row["update"] for row in rows} for rows in metrics))
    if len(metrics) < 2 or not common:
        return []
    table = {"update": [str(update) for update in sorted(common)]}
    for key in SPREAD:
        title, unit, factor, _ = CURVES[key]
        cells = []
        for update in sorted(common):
            values = [row.get(key) for rows in metrics for row in rows if row["update"] == update]
            known = factor * np.array([value for value in values if value is not None])
            whole = len(known) == len(metrics)
            cells.append(f"{known.mean():.3g} ± {known.std(ddof=1):.2g}" if whole else "")
        if any(cells):
            table[f"{title}, {unit}"] = cells
    return [list(table), *map(list, zip(*table.values(), strict=True))]


def majority_lost(run: Run) -> Iterator[str]:
    """Name the update from which on half as many completions give the answer that most gave first.

    Answers are compared as they are written; of several prompts each has its own.
    """
    answers: dict[tuple[int, ...], dict[int, list[str]]] = {}  # by prompt and update
    for update in sorted(run.records):
        for record in run.records[update]:
            by_update = answers.setdefault(tuple(record["prompt_ids"]), {})
            answer = final_answer(record["text"]) or record["text"]
            by_update.setdefault(update, []).append(answer)
    kept: dict[int, list[bool]] = {}
    for by_update in answers.values():
        ((most, _),) = Counter(next(iter(by_update.values()))).most_common(1)
        for update, given in by_update.items():
            kept.setdefault(update, []).extend(answer == most for answer in given)
    for update in sorted(kept)[1:]:
        before, now = kept[min(kept)], kept[update]
        p = fisher_exact([np.bincount(row, minlength=2) for row in (before, now)])[1]
        if np.mean(now) <= np.mean(before) / 2 and p < SIGNIFICANT:
            yield (
                f"The commonest answer of update {min(kept)}, in {np.mean(before):.0%} of its "
                f"completions, was in {np.mean(now):.0%} of those of update {update} (p = {p:.2g}):"
                " training lost what it was to make surer. Look at the checkpoints before."
            )
            return


def visible(text: str) -> str:
    """Replace control characters by pictures of them."""
    pictures = {c: 0x2400 + c for c in range(32) if c not in b"\n\t"}
    return text.translate(pictures | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD))


def pieces(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> list[str]:
    """Return the text that each token adds; empty if a character continues in the next token."""
    start = before[-4:]  # Some tokenizers drop a text's first space.
    parts = [start + ids[:i] for i in range(len(ids) + 1)]
    texts = tokenizer.batch_decode(parts, clean_up_tokenization_spaces=False)
    return [text[len(old) :] for old, text in pairwise(t.rstrip("\ufffd") for t in texts)]


def completions(
    run: Run, update: int, tokenizer: Any, measured: Measures | None, shown: int
) -> list[dict[str, Any]]:
    """Return an update's first completions as recorded, with their tokens if these are measured."""
    start, found = 0, []
    for record in run.records[update][:shown]:
        ids, length = record["response_ids"][:LONGEST], len(record["response_ids"])
        tokens = []
        if measured:
            names = tokenizer.convert_ids_to_tokens(ids)
            texts = pieces(tokenizer, record["prompt_ids"], ids)
            numbers = measured.entropy[start:].tolist(), measured.probability[start:].tolist()
            for name, text, entropy, p in zip(names, texts, *numbers, strict=False):
                token = {"text": visible(text).replace("\n", "↵\n") or "·"}
                token["told"] = f"{visible(name or '')}   {entropy:.3f} nats, probability {p:.3g}"
                special = name in tokenizer.all_special_tokens
                tokens.append(token | {"level": bisect(LEVELS, entropy), "special": special})
        start += length
        text = visible(record["text"])[: 8 * LONGEST]
        found.append(record | {"tokens": tokens, "more": length - LONGEST, "text": text})
    return found


def shift_of(run: Run, models: bool, console: Console) -> tuple[Shift | None, str]:
    """Measure the run's completions with its models, or say why that is not possible."""
    if not models:
        return None, "left out, as --no-models asks"
    if not run.rollouts:
        return None, "no completions of a whole update are recorded"
    if run.checkpoint is None:
        return None, "the run has no checkpoint yet"
    last = run.rollouts[run.last] if run.last > 1 else None
    try:
        return shift(run.config, run.checkpoint, run.rollouts[1], last, console), ""
    except UserError as error:
        return None, str(error)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return None, "out of memory"
        raise


def part_of(run: Run, number: int, shown: int, moved: Shift | None, plots: Path) -> dict[str, Any]:
    """Return what the template needs of one run."""
    rows = ", ".join(map(str, run.config.prompt_rows))
    part: dict[str, Any] = {
        "run": run,
        "colour": COLOURS[number % len(COLOURS)],
        "happened": happened(run.metrics),
        "warnings": [*warnings(run.metrics), *majority_lost(run)],
        "settings": settings_of(run),
        "prompt": run.config.prompt or f"rows {rows} of {run.config.prompt_from}",
        "moved": moved,
    }
    if run.rollouts:
        tokenizer, before, after, own = moved or (None, None, None, None)
        part["before"] = completions(run, 1, tokenizer, before, shown)
        part["after"] = completions(run, run.last, tokenizer, own or after, shown)
    if run.suite:
        png = plots / f"suite-{number}.png"
        part["suite"] = suite_curves(run.folder.resolve().name, run.suite, png)
    if moved:
        part["densities"] = [
            density(moved.before, found, f"{key} texts", plots / f"logits-{key}-{number}.png")
            for key, found in (("same", moved.after), ("own", moved.own))
            if found
        ]
        upto = [(moved.after.rank <= rank).double().mean().item() for rank in RANKS.values()]
        part["ranks"] = list(zip(RANKS, np.diff(upto, prepend=0), strict=True))
    return part


def write_report(
    runs: Sequence[Path], output: Path, console: Console | None = None, models: bool = True
) -> Path:
    """Write one self-contained HTML page, with its plots as PNGs beside it, and return its path.

    Args:
        models: also load each run's base and trained model, to measure the recorded completions.
    """
    console = console or Terminal(stderr=True)
    names = [run.resolve().name for run in runs]
    names = [n if names.count(n) == 1 else str(r) for n, r in zip(names, runs, strict=True)]
    found = [read_run(run) for run in runs]
    if output.is_dir():
        raise UserError(f"output: {output} is a folder; name a file, {output / 'report.html'} say")
    plots = output.with_name(f"{output.stem}-plots")
    is_new = not plots.exists()
    try:
        plots.mkdir(parents=True, exist_ok=True)
        parts, shown = [], max(1, min(3, SHOWN // (2 * len(found))))
        for number, (name, run) in enumerate(zip(names, found, strict=True)):
            moved, why = shift_of(run, models, console)
            if models and why:
                console.print(f"{name}: {why}", markup=False, soft_wrap=True)
            part = part_of(run, number, shown, moved, plots)
            parts.append({"name": name, "why": why, **part})
        source = Path(__file__).with_suffix(".html.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        drawn = curves(names, [run.metrics for run in found], plots)
        spread = over_runs([run.metrics for run in found])
        given = {
            "parts": parts,
            "spread": spread,
            "curves": drawn,
            "levels": LEVELS,
            "version": __version__,
        }
        page = environment.from_string(source).render(given)
        write_whole(output, page.encode("utf-8", "replace").decode())  # Text may hold surrogates.
    except BaseException as error:  # Ctrl-C too
        if is_new:
            shutil.rmtree(plots, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"output: cannot write {output}: {error}") from error
        raise
    return output
