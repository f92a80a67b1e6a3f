"""`em-kernels study`: does the choice of the prompt matter, is training more than sharpening?"""

import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from ..config import TrainConfig
from ..data.columns import Problem, texts_of
from ..data.problems import few_shot
from ..models.loading import fingerprint, refuse_adapters, resolve_source
from ..run_folder import CHECKPOINTS, CONFIG, checkpoint_folder
from ..runs.records import resumable, write_whole
from ..settings import UserError
from ..trainer import train
from .select import Candidate, SelectConfig, select
from .statistics import percent
from .study_analysis import ARMS, EXAMPLES, MAXIMISED, StudyConfig, analyse
from .task import Opened, TaskSettings, digest, open_model
from .teacher_forcing import known_answers, score_answers


def arms_of(ranked: Sequence[Candidate], size: int, seed: int) -> dict[str, list[Candidate]]:
    """Draw the arms: random prompts first, so that they stay random; then the best of the others,
    for minimising and for maximising; then random ones of the rest that are always wrong.
    """
    rng = random.Random(seed)
    by_chance = rng.sample(sorted(ranked, key=lambda c: c.index), size)
    left = [c for c in ranked if c not in by_chance]
    wrong = [c for c in left[size:] if c.pass_rate == 0]
    if len(wrong) < 4:
        few = f"of {len(ranked)} prompts {len(wrong)} outside the other arms are always wrong"
        raise UserError(f"pool: {few}, and 4 are needed; take a larger pool, or harder data")
    by_failure = rng.sample(wrong, min(size, len(wrong)))
    return dict(zip(ARMS, (left[:size], by_chance, by_failure, left[:size]), strict=True))


def only_form(examples: Sequence[Problem]) -> list[Problem]:
    """Give each example another one's answer: only the form of the answers is right."""
    found = []
    for i, problem in enumerate(examples):
        own, later = problem.answer or "", [*examples[i:], *examples[:i]]
        if not (other := next((e.answer for e in later if e.answer and e.answer != own), None)):
            same = f"the first {len(examples)} problems all have the answer {own}"
            raise UserError(f"data: {same}; use others")
        worked = (problem.worked or own).removesuffix(own) + other
        found.append(Problem(problem.prompt, other, worked))
    return found


def run_study(config: StudyConfig, console: Console) -> dict[str, Any]:
    """Rank the pool, train on prompts, score; write study.json and return its content."""
    if config.pool < (least := 2 * config.prompts + 4):
        raise UserError(f"pool: {config.pool} do not make the arms; take {least} or more")
    refuse_adapters(resolve_source(config.model))  # Training would refuse them, but only later.
    if config.count is not None:
        raise UserError("count: goes with select and eval; a study takes pool and held_out")
    count = config.pool + config.held_out + EXAMPLES
    problems, shots, left_out = config.model_copy(update={"count": count}).problems()
    if left_out or any(problem.answer is None for problem in problems):
        why = f"not every problem of {config.data} has an answer to compare with"
        raise UserError(f"data: {why}; em-kernels data shows its rows")
    examples, problems = problems[:EXAMPLES], problems[EXAMPLES:]
    pool, held_out = problems[: config.pool], problems[config.pool :]
    study = _Study(config, shots, held_out, console)
    opened = open_model(config, console)
    facts = {"data": digest(problems, [few_shot(shots, problem) for problem in problems])}
    with resumable(config.output, config, model=fingerprint(config.model), **facts):
        same = config.model_dump(include=set(TaskSettings.model_fields) & config.model_fields_set)
        for name in ("sampling", "template", "model", "data", "samples"):
            same[name] = getattr(config, name)
        selection = SelectConfig(**same, more=0, output=config.output / "pool")
        ranked = select(selection, pool, shots, opened, console)
        base = study.untrained(opened, examples)
        del opened  # Training needs its memory.
        arms = arms_of(ranked, config.prompts, config.seed)
        trials = [(arm, candidate) for arm in ARMS for candidate in arms[arm]]
        scores, began, fresh = dict[str, list[Any]](), time.perf_counter(), 0
        for n, (arm, candidate) in enumerate(trials, 1):
            end = "-maximised" if arm == MAXIMISED else ""
            path = config.output / f"prompt-{candidate.index:04d}{end}.json"
            if path.exists():  # A kill may have come before the checkpoints were removed.
                shutil.rmtree(config.output / "runs" / path.stem / CHECKPOINTS, True)
            else:
                fresh += 1
                study.train(pool[candidate.index], candidate, path, arm)
            found = json.loads(path.read_text())
            scores.setdefault(arm, []).append(found)
            greedy = " ".join(percent(np.mean(s["greedy"])) for s in found["scores"])
            each = (time.perf_counter() - began) / max(fresh, 1)
            left = f", about {each * (len(trials) - n) / 60:.0f} min left" if fresh else ""
            line = f"{n}/{len(trials)} {arm}, right in {candidate.pass_rate:.0%}: greedy "
            line += f"{percent(np.mean(base['greedy']))} to {greedy} %{left}"
            console.print(line, soft_wrap=True)
        report = analyse(config, base, scores)
        write_whole(config.output / "study.json", json.dumps(report) + "\n")
    return report


class _Study(NamedTuple):
    """A study's settings, worked examples and held-out problems."""

    config: StudyConfig
    shots: list[Problem]
    held_out: list[Problem]
    console: Console

    def score(
        self, opened: Opened, examples: list[Problem], temperatures: Sequence[float], title: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score the held-out answers after worked examples."""
        prompts = [few_shot(examples, problem) for problem in self.held_out]
        known = known_answers(opened[1], prompts, [problem.completion for problem in self.held_out])
        return score_answers(opened[0], known, temperatures, self.console, title)

    def untrained(self, opened: Opened, more: list[Problem]) -> dict[str, Any]:
        """Score the untrained model after the usual examples, after more, after only_form(more)."""
        path = self.config.output / "untrained.json"
        if not path.exists():
            title = f"untrained, {len(self.shots)} examples"
            temperatures = self.config.temperatures
            greedy, logprob = self.score(opened, self.shots, temperatures, title)
            base = {"greedy": greedy.tolist(), "probability": np.exp(logprob).tolist()}
            for name, examples in (("more", more), ("form", only_form(more))):
                title = f"untrained, {len(examples)} examples {name}"
                base[name] = self.score(opened, examples, (1.0,), title)[0].tolist()
            write_whole(path, json.dumps(base) + "\n")
        return json.loads(path.read_text())

    def train(self, problem: Problem, candidate: Candidate, path: Path, arm: str) -> None:
        """Train on one prompt and score its checkpoints, which are then deleted."""
        config, run = self.config, self.config.output / "runs" / path.stem
        same = {"model", "rollouts", "lr", "dtype", "device", "attention"}
        settings = TrainConfig(
            **config.model_dump(include=same),
            prompt=texts_of(candidate.prompt)[0],  # A few-shot prompt is one text.
            answer=problem.answer,
            chat_template=False,
            output=run,
            steps=max(config.updates),
            save_at=config.updates,
            save_optimizer=False,
            sampling=config.sampled(),
            seed=config.seed + candidate.index,
            objective="maximise" if arm == MAXIMISED else "minimise",
        )
        with self.console.status(f"{path.stem}: training"):
            result = train(settings, console=Console(quiet=True), resume=(run / CONFIG).exists())
        scores = []
        for update in config.updates:
            checkpoint = str(checkpoint_folder(run, update))
            opened = open_model(config.model_copy(update={"model": checkpoint}), self.console)
            title = f"{path.stem}, update {update}"
            greedy, logprob = self.score(opened, self.shots, (1.0,), title)
            probability = np.exp(logprob[0]).tolist()
            scores.append({"update": update, "greedy": greedy.tolist(), "probability": probability})
        found = {
            "index": candidate.index,
            "pass_rate": candidate.pass_rate,
            "entropy": [row["entropy"] for row in result.metrics],
            "majority_right": candidate.majority_right,
            "scores": scores,
        }
        write_whole(path, json.dumps(found) + "\n")
        shutil.rmtree(run / CHECKPOINTS)
