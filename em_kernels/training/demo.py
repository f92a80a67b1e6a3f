"""The demo: One-shot EM of a 135M model on two-digit addition, with the controls that it needs."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from .config import DEMO_SHOTS, PRESETS, TrainConfig, preset
from .data import Problem
from .demo_model import fetch_demo
from .evaluate import evaluate, paired_change, wilson
from .records import check_output
from .select import select
from .session import progress_on
from .setup import find_device, load_model
from .trainer import TrainResult, train

POOL, SAMPLES, HELD_OUT = 24, 16, 200
PLAIN = preset("demo").sampling
LOWER_TEMPERATURES = (0.5, 0.25)  # of the untrained model: what EM has to beat when sampled


def addition(a: int, b: int) -> Problem:
    """A raw two-shot prompt and its answer."""
    return Problem(f"{DEMO_SHOTS}Q: What is {a} + {b}?\nA:", str(a + b))


def addition_problems(seed: int, count: int) -> list[Problem]:
    """Distinct problems of two two-digit numbers, none of them a shot."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    pairs = [(a, b) for a, b in pairs if f"What is {a} + {b}?" not in DEMO_SHOTS]
    return [addition(a, b) for a, b in random.Random(seed).sample(pairs, count)]


def demo_config(model: Path, problem: Problem, seed: int, output: Path) -> TrainConfig:
    """The preset on a problem, on a CPU or a GPU in fp32."""
    own = {"model": str(model), "prompt": problem.prompt, "answer": problem.answer}
    return TrainConfig(
        **{**PRESETS["demo"], **own, "seed": seed, "output": output, "dtype": "float32"}
    )


def run_demo(seed: int, output: Path, console: Console) -> dict[str, Any]:
    """Select a prompt, train on it, and measure before and after on held-out problems.

    Leaves the run in output, with demo.json holding every verdict; returns what demo.json holds.
    """
    check_output(output)
    folder = fetch_demo()
    problems = addition_problems(seed, POOL + HELD_OUT)
    pool, held_out = problems[:POOL], problems[POOL:]
    config = demo_config(folder, pool[0], seed, output)
    model = load_model(str(folder), config, find_device(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def measure(title: str, temperature: float) -> np.ndarray:
        with progress_on(console) as progress:
            bar = progress.add_task(title, total=HELD_OUT)
            right = evaluate(
                model,
                tokenizer,
                held_out,
                PLAIN.model_copy(update={"temperature": temperature}),
                seed=seed,
                chat_template=False,
                batch_size=100,
                on_done=lambda n: progress.advance(bar, n),
            )[:, 0]
        console.print(f"{title}: {_percent(right)} %")
        return right

    console.print(f"One-shot EM, SmolLM2-135M-Instruct, two-digit addition, seed {seed}")
    with progress_on(console) as progress:
        bar = progress.add_task(f"selecting 1 of {POOL} prompts", total=POOL * SAMPLES)
        ranked = select(
            model,
            tokenizer,
            pool,
            PLAIN,
            samples=SAMPLES,
            seed=seed,
            chat_template=False,
            on_done=lambda n: progress.advance(bar, n),
        )
    chosen = ranked[0]
    question = chosen.problem.prompt.rsplit("Q: ", 1)[1].splitlines()[0]
    console.print(
        f"prompt: {question}  right in {chosen.pass_rate:.0%} of {SAMPLES} samples; "
        f"of {POOL} prompts the one whose correctness varies most"
    )
    before = {t: measure(f"before, {_named(t)}", t) for t in (0.0, 1.0, *LOWER_TEMPERATURES)}
    result = train(demo_config(folder, chosen.problem, seed, output), console=console, model=model)
    after = {t: measure(f"after, {_named(t)}", t) for t in (0.0, 1.0)}
    console.print(_table(before, after))
    console.print(_reading(before, after, result))
    report = {
        "seed": seed,
        "prompt": chosen.problem.prompt,
        "pass_rate": chosen.pass_rate,
        "held_out": HELD_OUT,
        "before": {str(t): right.tolist() for t, right in before.items()},
        "after": {str(t): right.tolist() for t, right in after.items()},
        "metrics": result.metrics,
    }
    (output / "demo.json").write_text(json.dumps(report), encoding="utf-8")
    console.print(
        f"The run is in {output}; the trained model in {result.checkpoint}",
        soft_wrap=True,
        markup=False,
    )
    return report


def _named(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"T = {temperature:g}"


def _table(before: dict[float, np.ndarray], after: dict[float, np.ndarray]) -> Table:
    table = Table(
        title=f"Accuracy in % on {HELD_OUT} held-out problems, with 95 % intervals",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for column in ("before", "after", "change in points", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for temperature, base in before.items():
        cells = [_percent(base), "-", "-", "-"]
        if temperature in after:
            *interval, p = paired_change(base, after[temperature])
            change, low, high = (100 * x for x in interval)
            cells[1:] = [
                _percent(after[temperature]),
                f"{change:+.1f} [{low:+.1f}, {high:+.1f}]",
                f"{p:.2g}",
            ]
        table.add_row(_named(temperature), *cells)
    return table


def _mean(right: np.ndarray) -> str:
    return f"{100 * right.mean():.1f}"


def _percent(right: np.ndarray) -> str:
    low, high = wilson(right)
    return f"{_mean(right)} [{100 * low:.1f}, {100 * high:.1f}]"


def _reading(
    before: dict[float, np.ndarray], after: dict[float, np.ndarray], result: TrainResult
) -> str:
    """What the numbers show and do not show, from the numbers."""
    change, low, high, p = paired_change(before[0.0], after[0.0])
    if p < 0.05:
        verb = "rose" if change > 0 else "fell"
        points = f"{100 * abs(change):.1f} points"
        verdict = f"{verb} by {points}, more than chance explains (p = {p:.2g})"
    else:
        verdict = (
            f"changed by {change * 100:+.1f} points, which {HELD_OUT} problems cannot tell from no "
            f"change (interval {low * 100:+.1f} to {high * 100:+.1f}, p = {p:.2g})"
        )
    best = max(LOWER_TEMPERATURES, key=lambda t: before[t].mean())
    margin, _, _, margin_p = paired_change(before[best], after[1.0])
    relation = "above" if margin > 0 else "below"
    if margin_p >= 0.05:
        relation = "not distinguishable from"
    entropies = [row["entropy"] for row in result.metrics]
    return (
        f"Greedy accuracy {verdict}.\n"
        f"Sampled at T = 1 the trained model has {_mean(after[1.0])} %, the untrained one "
        f"{_mean(before[1.0])} %; but merely sampling the untrained one at T = {best:g} gives "
        f"{_mean(before[best])} %, and the trained model is {relation} that "
        f"({margin * 100:+.1f} points). A sampled gain that a lower temperature also gives is "
        "sharpening, not learning.\n"
        f"Entropy went from {entropies[0]:.3f} to {entropies[-1]:.3f} nats in {len(entropies)} "
        "updates. One seed, one prompt, one small model: other seeds move these numbers by "
        "several points."
    )
