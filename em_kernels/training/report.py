"""Runs as one HTML page: what happened, curves, completions by entropy, how the logits moved."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from .. import __version__
from .config import UserError
from .figures import COLOURS, curves, density
from .records import write_whole
from .rollout import Rollout
from .shift import Measures, Shift, sample, shift
from .summary import Run, read_run

LEVELS = (0.01, 0.1, 0.3, 0.7, 1.5, 3.0)  # nats, at which a token's background changes
SHOWN, LONGEST = 12, 256  # completions of an update, of all runs together; tokens of each
RANKS = ((1, 1), (2, 2), (3, 5), (6, 10), (11, 100), (101, sys.maxsize))


class Token(NamedTuple):
    """As the page shows it."""

    text: str
    level: int  # of the background
    special: bool
    told: str


def visible(text: str) -> str:
    """Control characters as pictures of themselves."""
    pictures = {c: 0x2400 + c for c in range(32) if c not in b"\n\t"}
    return text.translate(pictures | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD))


def pieces(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> list[str]:
    """What each token adds to the text; nothing where a character goes on in the next."""
    whole, found = before[-4:] + ids, list[str]()  # some tokenizers drop a text's first space
    start, done = 0, len(whole) - len(ids)
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    for end in range(done + 1, len(whole) + 1):
        if whole[end - 1] in tokenizer.all_special_ids:  # ends a character that was begun
            start = done = end - 1
        known, text = str(decode(whole[start:done])), str(decode(whole[start:end]))
        if text.endswith("\ufffd") and end < len(whole) and end - done < 4:
            found.append("")
        else:
            found.append(text[len(known) :])
            start, done = done, end
    return found


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, measured: Measures, rollout: Rollout, at: int
) -> Iterator[Token]:
    """Of a completion whose first token has that place among the measured."""
    ids, special = rollout.response_ids[:LONGEST], set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(ids)
    for i, text in enumerate(pieces(tokenizer, rollout.prompt_ids, ids)):
        entropy, probability = measured.entropy[at + i].item(), measured.probability[at + i].item()
        told = f"{visible(names[i] or '')}   {entropy:.3f} nats, probability {probability:.3g}"
        level = sum(entropy >= edge for edge in LEVELS)
        yield Token(visible(text).replace("\n", "↵\n") or "·", level, ids[i] in special, told)


def completions(
    run: Run, update: int, measured: tuple[PreTrainedTokenizerBase, Measures] | None, shown: int
) -> list[dict[str, Any]]:
    """What the page shows of an update's; tokens where they are measured."""
    at, found = 0, list[dict[str, Any]]()
    for index, rollout in enumerate(run.rollouts[update][:shown]):
        tokens = [] if measured is None else [*tokens_of(*measured, rollout, at)]
        at += len(rollout.response_ids)
        record, more = run.records[update, index], len(rollout.response_ids) - LONGEST
        text = visible(record.get("text") or "")[: 8 * LONGEST]
        facts = {"index": index, "correct": record.get("correct"), "ended": rollout.ended}
        found.append({**facts, "tokens": tokens, "more": more, "text": text})
    return found


def ranks(moved: Shift) -> list[tuple[str, float]]:
    """Where the words that were likeliest are now: rank, share of positions."""
    rank = moved.after.rank
    names = [f"{a}" if a == b else f"{a} to {b}" for a, b in RANKS[:-1]] + [f"over {RANKS[-2][1]}"]
    shares = [((rank >= a) & (rank <= b)).double().mean().item() for a, b in RANKS]
    return list(zip(names, shares, strict=True))


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
        first = sample(run.rollouts[1])
        return shift(run.config, run.checkpoint, first, last, console), ""
    except UserError as error:
        return None, str(error)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            return None, "out of memory"
        raise


def part_of(
    run: Run, number: int, shown: int, moved: tuple[Shift | None, str], folder: Path
) -> dict[str, Any]:
    """A run's own part of the page."""
    found, why = moved
    part: dict[str, Any] = {"run": run, "colour": COLOURS[number % len(COLOURS)], "why": why}
    part |= {"settings": run.settings(), "prompt": run.prompt()}
    if run.rollouts:
        before = (found.tokenizer, found.before) if found else None
        last = (found.tokenizer, found.own or found.after) if found else None
        part["before"] = completions(run, 1, before, shown)
        part["after"] = completions(run, run.last, last, shown)
    if found:
        count, after = len(sample(run.rollouts[1])), run.last
        texts = f"update 1, {count} of {len(run.rollouts[1])}"
        part["measured"] = [(texts, "base", found.before), (texts, "trained", found.after)]
        compared = [(found.after, "the same texts", "same")]
        if found.own:
            count = len(sample(run.rollouts[after]))
            texts = f"update {after}, {count} of {len(run.rollouts[after])}"
            part["measured"].append((texts, "trained", found.own))
            compared.append((found.own, "own texts", "own"))
        part["densities"] = [
            density(found.before, trained, title, folder / f"logits-{key}-{number}.png")
            for trained, title, key in compared
        ]
        part["ranks"] = ranks(found)
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
        parts = []
        for number, run in enumerate(found):
            moved = models_of(run, models, console)
            if models and moved[1]:
                console.print(f"{run.name}: {moved[1]}", markup=False, soft_wrap=True)
            shown = max(1, min(3, SHOWN // (2 * len(found))))
            parts.append(part_of(run, number, shown, moved, plots))
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
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default RUN/report.html, of several runs report.html",
    )
    parser.add_argument(
        "--no-models",
        action="store_true",
        help="load no model: only what the run wrote down; takes seconds",
    )
    known = parser.parse_args(arguments)
    alone = known.runs[0] / "report.html" if len(known.runs) == 1 else Path("report.html")
    print(write_report(known.runs, known.output or alone, models=not known.no_models))
    return 0
