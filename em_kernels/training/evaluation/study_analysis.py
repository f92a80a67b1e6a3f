"""A study's settings, and its statistics: means, intervals, tests, and what they support."""

from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy.stats import permutation_test

from ..config import Sampling
from ..settings import Positive
from .evaluate import Temperatures
from .statistics import mean_over_prompts, percent
from .task import TaskSettings

PROMPTS = ("selected", "random", "always wrong")  # arms in which entropy is minimised
MAXIMISED = "maximised"  # a control: the selected prompts, with the entropy raised
ARMS = (*PROMPTS, MAXIMISED)
EXAMPLES = 8  # worked examples of the untrained model's two controls


class StudyConfig(TaskSettings):
    """Test whether the choice of the prompt matters, and whether training does more than a lower
    sampling temperature: train a model on many prompts, one at a time, and compare.
    """

    model: str = "demo"
    """Hub id, local folder, GGUF file, or "demo" (135M)."""
    data: str = "addition"
    """Problems with answers: a .jsonl or .parquet file, a hub dataset (owner/name), "addition", or
    gym:TASK[?setting=value&...] (a reasoning-gym task).
    """
    count: Positive | None = None
    """Not for a study: it takes --pool and --held-out problems."""
    template: Annotated[str, Field(pattern="^few-shot$")] = "few-shot"  # type: ignore[assignment]
    """Only few-shot: answers are teacher-forced, so each must have one written form."""
    sampling: Sampling = Sampling(
        temperature=1, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=24
    )
    """Sampling settings for selection and training."""
    pool: Positive = 200
    """Prompts to choose from."""
    samples: Annotated[int, Field(ge=2)] = 16
    """Completions of each prompt of the pool, to estimate how often the model is right."""
    prompts: Annotated[int, Field(ge=4)] = 8
    """Prompts trained on in each arm."""
    held_out: Positive = 1000
    """Held-out problems on which every trained model is scored."""
    updates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2, 5)
    """Optimizer updates after which the model is evaluated; conclusions use the last."""
    lr: Annotated[float, Field(gt=0, lt=1)] = 5e-6
    """Learning rate, constant."""
    rollouts: Positive = 32
    """Completions per update."""
    temperatures: Temperatures = (1.0, 0.5, 0.25)
    """Sampling temperatures of the untrained model; the trained one, at 1, must beat the best."""
    output: Path = Path("runs/study")
    """Folder for scores and results, and each run's records."""


def analyse(
    config: StudyConfig, base: dict[str, Any], scores: dict[str, list[Any]]
) -> dict[str, Any]:
    """Return the content of study.json, from untrained.json, and prompt-*.json by arm."""
    rng = np.random.default_rng(config.seed)
    greedy, sampled = np.array(base["greedy"], float), np.array(base["probability"])
    best, form = int(sampled.mean(1).argmax()), np.array(base["form"], float)
    # Trained models: whether greedy is right, and the answer's probability; (prompts, problems).
    now, drawn = {}, {}  # by update and arm
    rows, contrasts = [], []
    for (u, update), arm in product(enumerate(config.updates), ARMS):
        given = [prompt["scores"][u] for prompt in scores[arm]]
        right = now[update, arm] = np.array([score["greedy"] for score in given], float)
        rates = drawn[update, arm] = np.array([score["probability"] for score in given])
        rows.append(
            {
                "arm": arm,
                "update": update,
                "prompts": len(given),
                "pass_rate": float(np.mean([prompt["pass_rate"] for prompt in scores[arm]])),
                "majority_right": sum(prompt["majority_right"] for prompt in scores[arm]),
                "greedy": float(right.mean()),
                "change": mean_over_prompts(right - greedy, rng),
                "sampled": float(rates.mean()),
                "over_temperature": mean_over_prompts(rates - sampled[best], rng),
            }
        )
    pairs = [(u, a, b) for u in config.updates for a, b in combinations(ARMS, 2)]
    for update, a, b in pairs:
        means = now[update, a].mean(1), now[update, b].mean(1)
        test = permutation_test(
            means, lambda x, y, axis: x.mean(axis) - y.mean(axis), n_resamples=20000, rng=rng
        )
        adjusted = min(1.0, test.pvalue * len(pairs))  # Bonferroni
        contrasts.append(
            {"update": update, "arms": [a, b], "difference": float(test.statistic), "p": adjusted}
        )
    last = config.updates[-1]
    right, rates = (np.concatenate([found[last, arm] for arm in PROMPTS]) for found in (now, drawn))
    base_sampled = zip(map(str, config.temperatures), sampled.mean(1).tolist(), strict=True)
    report: dict[str, Any] = {
        "settings": config.model_dump(mode="json", exclude={"output"}),
        "model": config.model,
        "data": config.data,
        "held_out": len(greedy),
        "base_greedy": float(greedy.mean()),
        "base_sampled": dict(base_sampled),
        "best_temperature": config.temperatures[best],
        "more_examples": float(np.mean(base["more"])),
        "form_only": float(np.mean(base["form"])),
        "rows": rows,
        "contrasts": contrasts,
        "all_change": mean_over_prompts(right - greedy, rng),
        "all_over_temperature": mean_over_prompts(rates - sampled[best], rng),
        "all_over_form": mean_over_prompts(right - form, rng),
    }
    return report | {"reading": reading(report, last)}


def points(estimate: Sequence[float]) -> str:
    """Format an estimated change, with its interval, in percentage points."""
    mean, low, high = (100 * x for x in estimate)
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


def verdict(estimate: Sequence[float], above: str, below: str, neither: str) -> str:
    """Choose the words that the interval of a difference supports."""
    return above if estimate[1] > 0 else below if estimate[2] < 0 else neither


def reading(report: dict[str, Any], update: int) -> str:
    """Say what the numbers show and what they do not."""
    told = []
    for contrast in report["contrasts"]:
        a, b = contrast["arms"]
        if contrast["update"] != update or a != ARMS[0]:
            continue
        better = "better" if contrast["difference"] > 0 else "worse"
        shown = f"did {better} than" if contrast["p"] < 0.05 else "is not shown to differ from"
        others = "raising the entropy on the same" if b == MAXIMISED else f"training on {b} ones"
        told.append(
            f"training on selected prompts {shown} {others} "
            f"({100 * contrast['difference']:+.1f} points greedy, p = {contrast['p']:.2g} adjusted)"
        )
    moved = verdict(report["all_change"], "rose", "fell", "is not shown to have changed")
    beats, beats_form = (
        verdict(report[f"all_over_{what}"], "above", "below", "not shown to differ from")
        for what in ("temperature", "form")
    )
    changes = {row["arm"]: row["change"] for row in report["rows"] if row["update"] == update}
    raised = ""
    if MAXIMISED in changes:
        raised = f", and by {points(changes[MAXIMISED])} where training raised the entropy instead"
    temperature = report["best_temperature"]
    before, tempered = report["base_greedy"], report["base_sampled"][str(temperature)]
    return (
        f"On {report['data']}, after {update} updates, {'; '.join(told)}. Greedy accuracy, which "
        f"no temperature changes, went from {percent(before)} % by {points(changes[ARMS[0]])} "
        f"points with selected prompts{raised}; over all prompts it {moved} "
        f"({points(report['all_change'])}), and is "
        f"{beats_form} the {percent(report['form_only'])} % of the untrained model when {EXAMPLES} "
        f"examples show it only the form ({points(report['all_over_form'])}). Sampled at T = 1 the "
        f"trained models are {beats} what the untrained one has at T = {temperature:g} "
        f"({points(report['all_over_temperature'])} points from {percent(tempered)} %)."
    )


def table_of(report: dict[str, Any]) -> Table:
    """Return a table of the arms after each update, below the untrained model."""
    sampled = {float(t): percent(share) for t, share in report["base_sampled"].items()}
    table = Table(
        title=f"{report['model']} on {report['held_out']} held-out problems of {report['data']}:\n"
        "means over prompts in %, 95 % intervals over prompts and problems",
        caption="Untrained, sampled: "
        + ", ".join(f"{share} at T = {t:g}" for t, share in sampled.items())
        + ".\nVote right: prompts whose most frequent answer was right before training.",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    less = f"less untrained\nT = {report['best_temperature']:g}"
    table.add_column("", no_wrap=True)
    for name in ("vote\nright", "greedy", "change", "T = 1", less):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("untrained", "", percent(report["base_greedy"]), "", sampled.get(1.0, ""), "")
    for name, what in (("more_examples", "examples"), ("form_only", "form only")):
        table.add_row(f"  {EXAMPLES} {what}", "", percent(report[name]), "", "", "")
    for row in report["rows"]:
        if row["arm"] == ARMS[0]:
            table.add_row(f"after update {row['update']}")
        table.add_row(
            f"  {row['arm']}",
            f"{row['majority_right']}/{row['prompts']}",
            percent(row["greedy"]),
            points(row["change"]),
            percent(row["sampled"]),
            points(row["over_temperature"]),
        )
    return table
