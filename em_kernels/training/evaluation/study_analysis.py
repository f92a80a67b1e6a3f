"""Statistics of a study: means, intervals, tests, a table, and the sentences they support."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy.stats import permutation_test

from .statistics import mean_over_prompts, percent
from .study_config import StudyConfig

ARMS = ("selected", "random", "always wrong")
EXAMPLES = 8  # worked examples of the untrained model's two controls


def analyse(
    config: StudyConfig, base: dict[str, Any], scores: dict[str, list[Any]]
) -> dict[str, Any]:
    """Return the content of study.json: means, intervals, tests, and the sentences they support.

    Args:
        base: content of untrained.json, the scores of the untrained model.
        scores: contents of prompt-*.json, the scores of each trained prompt, by arm.
    """
    rng = np.random.default_rng(config.seed)
    greedy, sampled = np.array(base["greedy"], float), np.array(base["probability"])
    best, form = int(sampled.mean(1).argmax()), np.array(base["form"], float)
    rows, means = list[dict[str, Any]](), dict[tuple[str, int], np.ndarray]()
    last = []
    for u, update in enumerate(config.updates):
        for arm in ARMS:
            now = np.array([p["scores"][u]["greedy"] for p in scores[arm]], float)
            drawn = np.array([p["scores"][u]["probability"] for p in scores[arm]])
            means[arm, update] = now.mean(1)
            rows.append(
                {
                    "arm": arm,
                    "update": update,
                    "prompts": len(now),
                    "pass_rate": float(np.mean([p["pass_rate"] for p in scores[arm]])),
                    "majority_right": sum(p["majority_right"] for p in scores[arm]),
                    "greedy": float(now.mean()),
                    "change": mean_over_prompts(now - greedy, rng),
                    "sampled": float(drawn.mean()),
                    "over_temperature": mean_over_prompts(drawn - sampled[best], rng),
                }
            )
            if update == config.updates[-1]:
                last.append((now - greedy, drawn - sampled[best], now - form))
    pairs = [(u, a, b) for u in config.updates for a, b in combinations(ARMS, 2)]
    contrasts = []
    for update, a, b in pairs:
        test = permutation_test(
            (means[a, update], means[b, update]),
            lambda x, y, axis: x.mean(axis) - y.mean(axis),
            n_resamples=20000,
            rng=rng,
        )
        adjusted = min(1.0, test.pvalue * len(pairs))  # Bonferroni
        contrasts.append(
            {"update": update, "arms": [a, b], "difference": float(test.statistic), "p": adjusted}
        )
    changed, over, over_form = (np.concatenate(parts) for parts in zip(*last, strict=True))
    report: dict[str, Any] = {
        "settings": config.model_dump(mode="json", exclude={"output"}),
        "model": config.model,
        "data": config.data,
        "held_out": len(greedy),
        "base_greedy": float(greedy.mean()),
        "base_sampled": dict(
            zip(map(str, config.temperatures), sampled.mean(1).tolist(), strict=True)
        ),
        "best_temperature": config.temperatures[best],
        "more_examples": float(np.mean(base["more"])),
        "form_only": float(np.mean(base["form"])),
        "rows": rows,
        "contrasts": contrasts,
        "all_change": mean_over_prompts(changed, rng),
        "all_over_temperature": mean_over_prompts(over, rng),
        "all_over_form": mean_over_prompts(over_form, rng),
    }
    report["reading"] = reading(report, config.updates[-1])
    return report


def points(estimate: Sequence[float]) -> str:
    """Format an estimated change, with its interval, in percentage points."""
    mean, low, high = (100 * x for x in estimate)
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


def verdict(estimate: Sequence[float], above: str, below: str, neither: str) -> str:
    """Choose the words that the interval of a difference supports."""
    _, low, high = estimate
    return above if low > 0 else below if high < 0 else neither


def reading(report: dict[str, Any], update: int) -> str:
    """Say what the numbers show and what they do not."""
    told = []
    for contrast in report["contrasts"]:
        a, b = contrast["arms"]
        if contrast["update"] != update or a != ARMS[0]:
            continue
        better = "better" if contrast["difference"] > 0 else "worse"
        shown = f"did {better} than" if contrast["p"] < 0.05 else "is not shown to differ from"
        told.append(
            f"training on selected prompts {shown} training on {b} ones "
            f"({100 * contrast['difference']:+.1f} points greedy, p = {contrast['p']:.2g} adjusted)"
        )
    moved = verdict(report["all_change"], "rose", "fell", "is not shown to have changed")
    beats, beats_form = (
        verdict(report[f"all_over_{what}"], "above", "below", "not shown to differ from")
        for what in ("temperature", "form")
    )
    chosen = next(
        row["change"] for row in report["rows"] if (row["arm"], row["update"]) == (ARMS[0], update)
    )
    temperature = report["best_temperature"]
    before, tempered = report["base_greedy"], report["base_sampled"][str(temperature)]
    return (
        f"On {report['data']}, after {update} updates, {'; '.join(told)}. Greedy accuracy, which "
        f"no temperature changes, went from {percent(before)} % by {points(chosen)} points with "
        f"selected prompts; over all prompts it {moved} ({points(report['all_change'])}), and is "
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
