"""`em-kernels study`: does the choice of the prompt matter, and does training do more than a lower
temperature? The unit is the prompt.
"""

import json
import random
import shutil
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import norm, permutation_test
from scipy.stats import t as student
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .completions import TaskSettings, digest, open_model
from .config import Positive, Sampling, TrainConfig, UserError, from_flags
from .data import Problem, few_shot
from .evaluate import known_answers, percent, score
from .records import CONFIG, resumable, write_whole
from .select import Candidate, SelectConfig, select
from .setup import fingerprint
from .trainer import train

ARMS = ("selected", "random", "always wrong")
EXAMPLES = 8
RESAMPLES = 4000
HELP = """Three arms of prompts of one pool: those of highest variance of correctness, random ones,
and such that no sample gets right. Each prompt is trained on alone, with one seed, for a number of
updates that is fixed beforehand; all are scored on the same held-out problems, teacher-forced. The
same command again goes on where it was stopped; a prompt takes about a minute on two cores. The
default learning rate was found on addition.

Examples: em-kernels study; em-kernels study --data gym:letter_counting --output
runs/study-letters"""


class StudyConfig(TaskSettings):
    """Does selecting the prompt matter, and does entropy minimisation do more than a lower
    temperature? Trains a model on many prompts, one at a time, and compares.
    """

    model: str = "demo"
    data: str = "addition"
    template: Annotated[str, Field(pattern="^few-shot$")] = "few-shot"  # type: ignore[assignment]
    """few-shot: answers must be such that can be written in one way."""
    sampling: Sampling = Sampling(
        temperature=1, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=24
    )
    """Of the selection and the training."""
    pool: Positive = 200
    """Prompts to choose from."""
    samples: Annotated[int, Field(ge=2)] = 16
    """Completions of each, to estimate how often it is right; training samples others."""
    prompts: Annotated[int, Field(ge=4)] = 8
    """Of each arm."""
    held_out: Positive = 1000
    """Problems that every trained model is scored on."""
    updates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2, 5)
    """Of the optimizer, after which a model is scored; the last is the one that is judged by."""
    lr: Annotated[float, Field(gt=0, lt=1)] = 5e-6
    """Learning rate, constant."""
    rollouts: Positive = 32
    """Completions per update."""
    temperatures: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (
        1.0,
        0.5,
        0.25,
    )
    """Of the untrained model; a trained one, at T = 1, must beat the best of them."""
    output: Path = Path("runs/study")
    """Folder of the study; holds every verdict, and a run's records for each prompt."""


def arms_of(ranked: Sequence[Candidate], size: int, seed: int) -> dict[str, list[Candidate]]:
    """Random ones of the whole pool first, so that they stay random; then of the others those that
    vary most, and random ones of those that are never right.
    """
    rng = random.Random(seed)
    arms = {"random": rng.sample(sorted(ranked, key=lambda c: c.index), size)}
    left = [c for c in ranked if c not in arms["random"]]
    arms["selected"] = left[:size]
    wrong = [c for c in left[size:] if c.pass_rate == 0]
    if len(wrong) < 4:
        raise UserError(
            f"pool: of {len(ranked)} prompts {len(wrong)} more are always wrong, and 4 are needed: "
            "take a larger pool, or harder data"
        )
    arms["always wrong"] = rng.sample(wrong, min(size, len(wrong)))
    return {name: arms[name] for name in ARMS}


def only_form(examples: Sequence[Problem]) -> list[Problem]:
    """Each with the answer of the next that has another: they show how an answer is written, not
    what is right.
    """
    found = []
    for i, problem in enumerate(examples):
        own, later = problem.answer or "", [*examples[i:], *examples[:i]]
        other = next((e.answer for e in later if e.answer and e.answer != own), None)
        if other is None:
            raise UserError(f"data: the first {len(examples)} problems all have the answer {own}")
        worked = (problem.worked or own).removesuffix(own) + other
        found.append(Problem(problem.prompt, other, worked))
    return found


def run_study(config: StudyConfig, console: Console) -> dict[str, Any]:
    """Select, train, score, and write study.json, which is returned."""
    if config.pool < (least := 2 * config.prompts + 4):
        raise UserError(f"pool: {config.pool} do not make three arms; take {least} or more")
    if config.count is not None:
        raise UserError("count: goes with select and eval; a study takes pool and held_out")
    count = config.pool + config.held_out + EXAMPLES
    task = config.model_copy(update={"count": count})
    problems, shots = task.problems()
    if any(problem.answer is None for problem in problems + shots):
        raise UserError(f"data: not every problem of {config.data} has an answer to compare with")
    formats, problems = problems[:EXAMPLES], problems[EXAMPLES:]
    pool, held_out = problems[: config.pool], problems[config.pool :]
    model, tokenizer = open_model(config, console)
    asked = digest(problems, [few_shot(shots, problem) for problem in problems])
    with resumable(config.output, config, model=fingerprint(config.model), data=asked):
        base, arms = _untrained(config, model, tokenizer, pool, held_out, shots, formats, console)
        del model, tokenizer  # their memory is the training's
        units = [(arm, candidate) for arm in ARMS for candidate in arms[arm]]
        scores, began, fresh = dict[str, list[Any]](), time.perf_counter(), 0
        for n, (arm, candidate) in enumerate(units):
            path = config.output / f"prompt-{candidate.index:04d}.json"
            if path.exists():  # killed before they went, perhaps
                shutil.rmtree(config.output / "runs" / path.stem / "checkpoints", True)
            else:
                fresh += 1
                _trained(config, pool[candidate.index], candidate, held_out, shots, path, console)
            found = json.loads(path.read_text())
            scores.setdefault(arm, []).append(found)
            greedy = " ".join(percent(np.mean(s["greedy"])) for s in found["scores"])
            each = (time.perf_counter() - began) / max(fresh, 1)
            left = f", about {each * (len(units) - n - 1) / 60:.0f} min left" if fresh else ""
            console.print(
                f"{n + 1}/{len(units)} {arm}, right in {candidate.pass_rate:.0%}: greedy "
                f"{percent(np.mean(base['greedy']))} to {greedy} %{left}",
                soft_wrap=True,
            )
        report = analyse(config, base, arms, scores)
        write_whole(config.output / "study.json", json.dumps(report) + "\n")
    return report


def _untrained(
    config: StudyConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pool: Sequence[Problem],
    held_out: Sequence[Problem],
    shots: Sequence[Problem],
    formats: Sequence[Problem],
    console: Console,
) -> tuple[dict[str, Any], dict[str, list[Candidate]]]:
    """The untrained model's scores, also with more examples and with such that only show the form;
    and the arms.
    """
    path = config.output / "untrained.json"
    own = config.model_dump(include=set(TaskSettings.model_fields) & set(config.model_fields_set))
    own |= {"sampling": config.sampling, "template": config.template, "model": config.model}
    own |= {"data": config.data, "samples": config.samples, "more": 0}
    chosen = SelectConfig(**own, output=config.output / "pool")
    ranked = select(chosen, pool, shots, model, tokenizer, console)
    if not path.exists():
        answers = [problem.completion for problem in held_out]
        base = dict[str, Any]()
        for name, examples in (("", shots), ("more", formats), ("form", only_form(formats))):
            prompts = [few_shot(examples, problem) for problem in held_out]
            title = f"untrained, {len(examples)} examples {name}"
            temperatures = (1.0,) if name else config.temperatures
            known = known_answers(tokenizer, prompts, answers)
            found = score(model, known, temperatures, console, title)
            base[name or "greedy"] = found.greedy.tolist()
            if not name:
                base["probability"] = np.exp(found.logprob).tolist()
        write_whole(path, json.dumps(base) + "\n")
    return json.loads(path.read_text()), arms_of(ranked, config.prompts, config.seed)


def _trained(
    config: StudyConfig,
    problem: Problem,
    candidate: Candidate,
    held_out: Sequence[Problem],
    shots: Sequence[Problem],
    path: Path,
    console: Console,
) -> None:
    """Train on one prompt and score what its checkpoints hold, which are not kept."""
    run = config.output / "runs" / path.stem
    settings = TrainConfig(
        model=config.model,
        prompt=candidate.prompt,
        answer=problem.answer,
        chat_template=False,
        output=run,
        steps=max(config.updates),
        save_at=config.updates,
        save_optimizer=False,
        rollouts=config.rollouts,
        sampling=config.sampled(),
        lr=config.lr,
        seed=config.seed + candidate.index,
        dtype=config.dtype,
        device=config.device,
        attention=config.attention,
    )
    with console.status(f"{path.stem}: training"):
        result = train(settings, console=Console(quiet=True), resume=(run / CONFIG).exists())
    prompts = [few_shot(shots, other) for other in held_out]
    answers = [other.completion for other in held_out]
    rows = []
    for update in config.updates:
        folder = run / "checkpoints" / f"step-{update:05d}"
        model, tokenizer = open_model(config.model_copy(update={"model": str(folder)}), console)
        title = f"{path.stem}, update {update}"
        known = known_answers(tokenizer, prompts, answers)
        found = score(model, known, (1.0,), console, title)
        rows.append(
            {
                "update": update,
                "greedy": found.greedy.tolist(),
                "probability": np.exp(found.logprob[0]).tolist(),
            }
        )
    entropy = [row["entropy"] for row in result.metrics]
    facts = {"index": candidate.index, "pass_rate": candidate.pass_rate, "entropy": entropy}
    facts["majority_right"] = candidate.majority_right
    write_whole(path, json.dumps({**facts, "scores": rows}) + "\n")
    shutil.rmtree(run / "checkpoints")


def mean_and_interval(change: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean of a change (prompts, problems), and its 95 % interval by resampling both."""
    prompts, problems = change.shape
    by_prompt = rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES) / prompts
    # few prompts: resampling knows neither that they scatter around their own mean nor Student's t
    wider = np.sqrt(prompts / (prompts - 1)) * student.ppf(0.975, prompts - 1) / norm.ppf(0.975)
    by_prompt = 1 / prompts + wider * (by_prompt - 1 / prompts)
    by_problem = rng.multinomial(problems, np.full(problems, 1 / problems), RESAMPLES) / problems
    draws = ((by_prompt @ change) * by_problem).sum(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(change.mean()), float(low), float(high)


def analyse(
    config: StudyConfig,
    base: dict[str, Any],
    arms: dict[str, list[Candidate]],
    scores: dict[str, list[Any]],
) -> dict[str, Any]:
    """Means, intervals and tests, and the sentences that they support."""
    rng = np.random.default_rng(config.seed)
    greedy, sampled = np.array(base["greedy"], float), np.array(base["probability"])
    best, form = int(sampled.mean(1).argmax()), np.array(base["form"], float)
    rows, means = list[dict[str, Any]](), dict[tuple[str, int], np.ndarray]()
    everything = []
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
                    "change": mean_and_interval(now - greedy, rng),
                    "sampled": float(drawn.mean()),
                    "over_temperature": mean_and_interval(drawn - sampled[best], rng),
                }
            )
            if u == len(config.updates) - 1:
                everything.append((now - greedy, drawn - sampled[best], now - form))
    pairs = [(u, a, b) for u in config.updates for a, b in combinations(ARMS, 2)]
    contrasts = []
    for update, a, b in pairs:
        test = permutation_test(
            (means[a, update], means[b, update]), _difference, n_resamples=20000, rng=rng
        )
        adjusted = min(1.0, test.pvalue * len(pairs))  # Bonferroni
        contrasts.append(
            {"update": update, "arms": [a, b], "difference": float(test.statistic), "p": adjusted}
        )
    changed, over, over_form = (np.concatenate(parts) for parts in zip(*everything, strict=True))
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
        "all_change": mean_and_interval(changed, rng),
        "all_over_temperature": mean_and_interval(over, rng),
        "all_over_form": mean_and_interval(over_form, rng),
    }
    report["reading"] = reading(report, config.updates[-1])
    return report


def _difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return a.mean(axis) - b.mean(axis)


def points(interval: Sequence[float]) -> str:
    """A change and its interval, in points of a percent."""
    mean, low, high = (100 * x for x in interval)
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


def relation(interval: Sequence[float]) -> str:
    """Of one thing to another, by the interval of their difference."""
    _, low, high = interval
    return "above" if low > 0 else "below" if high < 0 else "not shown to differ from"


def reading(report: dict[str, Any], update: int) -> str:
    """What the numbers show and do not show, from the numbers."""
    told = []
    for contrast in report["contrasts"]:
        a, b = contrast["arms"]
        if contrast["update"] != update or a != "selected":
            continue
        shown = contrast["p"] < 0.05
        better = "better" if contrast["difference"] > 0 else "worse"
        verdict = f"did {better} than" if shown else "is not shown to differ from"
        told.append(
            f"training on selected prompts {verdict} training on {b} ones "
            f"({100 * contrast['difference']:+.1f} points greedy, p = {contrast['p']:.2g} adjusted)"
        )
    _, low, high = report["all_change"]
    moved = "rose" if low > 0 else "fell" if high < 0 else "is not shown to have changed"
    beats, beats_form = (relation(report[f"all_over_{what}"]) for what in ("temperature", "form"))
    temperature = report["best_temperature"]
    change, over = points(report["all_change"]), points(report["all_over_temperature"])
    chosen = next(
        row["change"] for row in report["rows"] if (row["arm"], row["update"]) == (ARMS[0], update)
    )
    before, tempered = report["base_greedy"], report["base_sampled"][str(temperature)]
    return (
        f"On {report['data']}, after {update} updates, {'; '.join(told)}. Greedy accuracy, which "
        f"no temperature changes, went from {percent(before)} % by {points(chosen)} points with "
        f"selected prompts; over all prompts it {moved} ({change}), and is {beats_form} the "
        f"{percent(report['form_only'])} % of the untrained model when {EXAMPLES} examples show it "
        f"only the form ({points(report['all_over_form'])}). Sampled at T = 1 the trained "
        f"models are {beats} what the untrained one has at T = {temperature:g} ({over} points from "
        f"{percent(tempered)} %)."
    )


def table_of(report: dict[str, Any]) -> Table:
    """Arms by updates, under the untrained model."""
    best = report["best_temperature"]
    sampled = {float(t): percent(share) for t, share in report["base_sampled"].items()}
    table = Table(
        title=f"{report['model']} on {report['held_out']} held-out problems of {report['data']}, "
        "in %: means over prompts,\n95 % intervals over prompts and problems",
        caption="Untrained, sampled: "
        + ", ".join(f"{share} at T = {t:g}" for t, share in sampled.items())
        + ".\nVote right: prompts whose most frequent answer was right before training.",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    names = ("vote\nright", "greedy", "change", "T = 1")
    for name in (*names, f"less untrained\nT = {best:g}"):
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


def study_command(arguments: list[str]) -> int:
    """Run it, show the table and what it says."""
    config = from_flags(StudyConfig, "study", arguments, HELP)
    report = run_study(config, Console(stderr=True))
    console = Console()
    console.print(table_of(report))
    console.print(report["reading"], markup=False)
    print(config.output / "study.json")
    return 0
