"""`em-kernels study`: does the choice of the prompt matter, and does training do more than a lower
temperature? The unit is the prompt.
"""

import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import TrainConfig
from ..data.problems import Problem, few_shot, texts_of
from ..models.loading import fingerprint, refuse_adapters, resolve_source
from ..run_folder import CHECKPOINTS, CONFIG, checkpoint_folder
from ..runs.records import resumable, write_whole
from ..settings import UserError
from ..trainer import train
from .completions import TaskSettings, digest, open_model
from .evaluate import known_answers, percent, score
from .select import Candidate, SelectConfig, select
from .study_analysis import ARMS, EXAMPLES, analyse
from .study_config import StudyConfig


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
    refuse_adapters(resolve_source(config.model))  # as train would, much later
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
                shutil.rmtree(config.output / "runs" / path.stem / CHECKPOINTS, True)
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
        report = analyse(config, base, scores)
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
        prompt=texts_of(candidate.prompt)[0],  # of template few-shot, which is one text
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
        folder = checkpoint_folder(run, update)
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
    shutil.rmtree(run / CHECKPOINTS)
