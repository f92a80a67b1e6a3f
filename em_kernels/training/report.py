"""Runs as one HTML page: what happened, curves, completions by entropy, how the logits moved."""

import argparse
import sys
from bisect import bisect
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from .. import __version__
from .config import UserError
from .figures import COLOURS, curves, density
from .records import write_whole
from .shift import Measures, Shift, sample, shift
from .summary import Run, read_run

LEVELS = (0.01, 0.1, 0.3, 0.7, 1.5, 3.0)  # nats, at which a token's background changes
SHOWN, LONGEST = 12, 256  # completions of an update, of all runs together; tokens of each
RANKS = {"1": 1, "2": 2, "3 to 5": 5, "6 to 10": 10, "11 to 100": 100, "over 100": sys.maxsize}


def visible(text: str) -> str:
    """Control characters as pictures of themselves."""
    pictures = {c: 0x2400 + c for c in range(32) if c not in b"\n\t"}
    return text.translate(pictures | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD))


def pieces(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> list[str]:
    """What each token adds to the text; nothing where a character goes on in the next."""
    start = before[-4:]  # some tokenizers drop a text's first space
    parts = [start + ids[:i] for i in range(len(ids) + 1)]
    texts = tokenizer.batch_decode(parts, clean_up_tokenization_spaces=False)
    return [text[len(old) :] for old, text in pairwise(t.rstrip("\ufffd") for t in texts)]


def completions(
    run: Run, update: int, tokenizer: Any, measured: Measures | None, shown: int
) -> list[dict[str, Any]]:
    """The first ones of an update, as recorded; their tokens where these are measured."""
    at, found = 0, list[dict[str, Any]]()
    for record in run.records[update][:shown]:
        ids, length = record["response_ids"][:LONGEST], len(record["response_ids"])
        tokens = list[dict[str, Any]]()
        if measured:
            names = tokenizer.convert_ids_to_tokens(ids)
            texts = pieces(tokenizer, record["prompt_ids"], ids)
            numbers = measured.entropy[at:].tolist(), measured.probability[at:].tolist()
            for name, text, entropy, p in zip(names, texts, *numbers, strict=False):
                token = {"text": visible(text).replace("\n", "↵\n") or "·"}
                token["told"] = f"{visible(name or '')}   {entropy:.3f} nats, probability {p:.3g}"
                special = name in tokenizer.all_special_tokens
                tokens.append(token | {"level": bisect(LEVELS, entropy), "special": special})
        at += length
        text = visible(record["text"])[: 8 * LONGEST]
        found.append(record | {"tokens": tokens, "more": length - LONGEST, "text": text})
    return found


def models_of(run: Run, models: bool, console: Console) -> tuple[Shift | None, str]:
    """What the run's models say of its completions; or why they say nothing."""
    if not models:
        return None, "left out, as --no-models asks"
    if not run.rollouts:
        return None, "no completions of a whole update are recorded"
    if run.checkpoint is None:
        return None, "the run has no checkpoint yet"
    last = sample(run.rollouts[run.last]) if run.last > 1 else None
    try:
        return shift(run.config, run.checkpoint, sample(run.rollouts[1]), last, console), ""
    except UserError as error:
        return None, str(error)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            return None, "out of memory"
        raise


def part_of(run: Run, number: int, shown: int, moved: Shift | None, folder: Path) -> dict[str, Any]:
    """A run's own part of the page."""
    part: dict[str, Any] = {"run": run, "colour": COLOURS[number % len(COLOURS)]}
    if run.rollouts:
        tokenizer, before, after, own = moved or (None, None, None, None)
        part["before"] = completions(run, 1, tokenizer, before, shown)
        part["after"] = completions(run, run.last, tokenizer, own or after, shown)
    if moved:
        part |= {"measured": [], "densities": []}
        for update, key, found in ((1, "", before), (1, "same", after), (run.last, "own", own)):
            if found is None:
                continue
            rollouts = run.rollouts[update]
            texts = f"update {update}, {len(sample(rollouts))} of {len(rollouts)}"
            part["measured"].append((texts, "trained" if key else "base", found))
            if key:
                png = folder / f"logits-{key}-{number}.png"
                part["densities"].append(density(moved.before, found, f"{key} texts", png))
        upto = [(moved.after.rank <= rank).double().mean().item() for rank in RANKS.values()]
        part["ranks"] = list(zip(RANKS, np.diff(upto, prepend=0), strict=True))
    return part


def write_report(
    runs: Sequence[Path], output: Path, console: Console | None = None, models: bool = True
) -> Path:
    """One HTML page that needs nothing else, and its plots as PNGs in a folder beside it.

    Args:
        runs: folders of runs, finished or not.
        models: load base and trained models, one at a time, for what needs them.

    Raises: UserError for a folder that is no run's, and where output cannot be written.
    """
    console = console or Console(stderr=True)
    names = [run.resolve().name for run in runs]
    names = [n if names.count(n) == 1 else str(r) for n, r in zip(names, runs, strict=True)]
    found = [read_run(run, name) for run, name in zip(runs, names, strict=True)]
    plots = output.with_name(f"{output.stem}-plots")
    if output.is_dir():
        raise UserError(f"output: {output} is a folder; name a file, {output / 'report.html'} say")
    try:
        plots.mkdir(parents=True, exist_ok=True)
        parts, shown = list[dict[str, Any]](), max(1, min(3, SHOWN // (2 * len(found))))
        for number, run in enumerate(found):
            moved, why = models_of(run, models, console)
            if models and why:
                console.print(f"{run.name}: {why}", markup=False, soft_wrap=True)
            parts.append({"why": why, **part_of(run, number, shown, moved, plots)})
        source = Path(__file__).with_suffix(".html.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        page = environment.from_string(source).render(
            parts=parts, curves=curves(found, plots), levels=LEVELS, version=__version__
        )
        write_whole(output, page.encode("utf-8", "replace").decode())  # text may be no UTF-8
    except OSError as error:
        raise UserError(f"output: cannot write {output}: {error}") from error
    return output


def report_command(arguments: list[str]) -> int:
    """`em-kernels report`."""
    parser = argparse.ArgumentParser(
        prog="em-kernels report",
        description="Write one self-contained HTML page about runs of em-kernels train: what "
        "happened, curves over updates, completions before and after coloured by each token's "
        "entropy, and how the logits moved (mean, deviation, skewness, reranked tokens). Its plots "
        "lie beside it as PNGs. Several runs are drawn over one another.",
        epilog="Example: em-kernels report runs/seed15 runs/seed16 --output seeds.html",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    default = "default RUN/report.html, of several runs report.html"
    add("--output", type=Path, metavar="FILE", help=default)
    only = "load no model: only what the run wrote down; takes seconds"
    add("--no-models", action="store_true", help=only)
    known = parser.parse_args(arguments)
    alone = known.runs[0] / "report.html" if len(known.runs) == 1 else Path("report.html")
    print(write_report(known.runs, known.output or alone, models=not known.no_models))
    return 0
