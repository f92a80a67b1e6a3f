"""`em-kernels eval`: accuracy on problems with known answers, with intervals and a paired test."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field
from rich.console import Console
from transformers import LogitsProcessor

from ...decoding import EntropyMinimizationLogitsProcessor
from ..config import Sampling
from ..console import progress_on
from ..data.columns import Conversation, Problem
from ..data.grading import GRADERS, Grader, GraderName
from ..data.problems import as_problem, few_shot, read_rows
from ..models.loading import fingerprint
from ..run_folder import CONFIG
from ..runs.records import MAY_CHANGE, differing, resumable, write_config, write_whole
from ..settings import Positive, UserError, in_one_line, json_object
from .completions import (
    COMPLETIONS,
    EVAL_STREAM,
    Completer,
    Completion,
    Key,
    OnBatch,
    OnDone,
    collect,
    local_completer,
)
from .statistics import mean_interval, paired_change, pass_at, wilson
from .task import Opened, TaskSettings, digest, open_model
from .teacher_forcing import known_answers, score_answers

PROBLEMS, RESULTS = "problems.jsonl", "results.json"
Temperatures = Annotated[tuple[Annotated[float, Field(ge=0.01, le=100)], ...], Field(min_length=1)]
MAY_DIFFER = (*MAY_CHANGE, "model", "temperatures")  # settings of two evaluations that are compared


class EvalConfig(TaskSettings):
    """Measure a model's accuracy on problems with known answers: greedy by default, avg@k and
    pass@k with --samples. The same command again resumes one that was stopped.
    """

    sampling: Sampling = Sampling(
        temperature=0, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=3072
    )
    """How completions are sampled. Of the model's generation_config only the EOS tokens apply."""
    decoding: Literal["plain", "em-inf"] = "plain"
    """em-inf: lower the entropy of each next-token distribution before the choice, as EM-INF does,
    with its published settings. Greedy choices stay the same: sample at --temperature 0.1.
    """
    samples: Positive = 1
    """Completions per problem; more than one needs a temperature above 0."""
    grader: GraderName = "math-verify"
    """Whose verdicts are the result; both are recorded. qwen25 has the rules of the Qwen2.5-Math
    evaluation, to compare with figures that it gave, such as the paper's: numbers may be off by a
    relative 1e-4 or by a factor of 100. math-verify is strict about values, lenient about notation.
    """
    output: Path = Path("evals/eval")
    """Folder for settings, problems, completions and results."""
    teacher_forced: bool = False
    """Sample nothing: score the known answer, written as in the worked examples, in one forward. It
    is right if each of its tokens is the most probable one, as greedy decoding would write it; its
    probability is given at each of --temperatures. Needs template few-shot, and answers that have
    one written form.
    """
    temperatures: Temperatures = (1.0, 0.5, 0.25)
    """Temperatures at which --teacher-forced gives the answer's probability."""
    server: str | None = None
    """Sample from this OpenAI-compatible server, such as vLLM's http://localhost:8000/v1, instead
    of loading the model; --model is then the model's name on the server.
    """
    parallel: Positive = 32
    """Concurrent requests to the server."""

    def processors(self) -> tuple[LogitsProcessor, ...]:
        """Return what changes the logits between the repetition penalty and the temperature."""
        return (EntropyMinimizationLogitsProcessor(),) if self.decoding == "em-inf" else ()


def evaluate(
    config: EvalConfig,
    console: Console,
    against: Path | None = None,
    opened: Opened | None = None,
    on_batch: OnBatch = lambda done, seconds: None,
) -> dict[str, Any]:
    """Evaluate a model; write results.json and return its content.

    A folder whose result is of the other grader is continued too.

    Args:
        against: folder of an evaluation to compare with later; refused now if it cannot be.
        opened: the model, already loaded.
        on_batch: called with the completions that arrive together, and the seconds since others.
    """
    if (k := config.samples) > 1 and config.sampling.temperature == 0:
        raise UserError(f"samples: {k} are all the same at sampling.temperature 0; raise it")
    if config.teacher_forced and (config.template != "few-shot" or config.server):
        raise UserError("teacher_forced: needs template few-shot, and no server")
    if config.decoding == "em-inf" and (config.teacher_forced or config.server):
        where = "samples on this machine"
        raise UserError(f"decoding: em-inf {where}: leave out server and teacher_forced")
    if config.decoding == "em-inf" and config.sampling.temperature == 0:
        raise UserError("decoding: em-inf leaves greedy choices as they are; take temperature 0.1")
    problems, shots, left_out = config.problems()
    if any(problem.answer is None for problem in problems):
        why = f"no problem of {config.data} has an answer to compare with"
        raise UserError(f"data: {why}; name its column with answer_column")
    if left_out:
        console.print(left_out, markup=False, soft_wrap=True)
    prompts, name = [config.prompt(problem, shots) for problem in problems], config.model
    rows = "".join(json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in problems)
    if against is not None:
        grader = None if config.teacher_forced else config.grader
        _check_comparable(against, config.samples, rows, grader)
    if config.teacher_forced:
        model, tokenizer = open_model(config, console)
        texts = [few_shot(shots, problem) for problem in problems]
        known = known_answers(tokenizer, texts, [problem.completion for problem in problems])
    elif config.server is not None:
        name, complete = _on_server(config, config.server, prompts)
    else:
        opened, processors = opened or open_model(config, console), config.processors()
        complete = local_completer(config, opened, prompts, EVAL_STREAM, processors=processors)
    served = name if config.server else fingerprint(config.model)
    with resumable(config.output, config, model=served, data=digest(problems, prompts)):
        write_whole(config.output / PROBLEMS, rows)
        if config.teacher_forced:
            greedy, logprob = score_answers(model, known, config.temperatures, console)
            rates = zip(config.temperatures, np.exp(logprob).tolist(), strict=True)
            return _finish(config, name, greedy[:, None], probability=dict(rates))
        return _sampled(config, name, problems, complete, console, on_batch)


def regrade(folder: Path, console: Console, grader: GraderName | None = None) -> dict[str, Any]:
    """Grade recorded completions again; write results.json anew and return its content.

    Args:
        grader: whose verdicts are the result from now on; None leaves that as it is.
    """
    if not (folder / PROBLEMS).is_file():
        raise UserError(f"regrade: {folder} is no evaluation's folder: it has no {PROBLEMS}")
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        changed = {"output": folder, **({"grader": grader} if grader else {})}
        config = EvalConfig(**{**settings, **changed})  # The folder may have been moved.
    except (OSError, TypeError, yaml.YAMLError) as error:
        why = f"is no evaluation's folder: {in_one_line(error)}"
        raise UserError(f"regrade: {folder} {why}") from error
    results = read_results(folder, "regrade")
    if config.teacher_forced:
        return results
    problems = [as_problem(row, folder) for row in read_rows(folder / PROBLEMS, "regrade")]

    def refuse(missing: Sequence[Key], on_done: OnDone) -> None:
        raise UserError(f"regrade: {folder} is not finished; run its eval command again")

    return _sampled(config, results["model"], problems, refuse, console)


def read_results(folder: Path, setting: str = "against") -> dict[str, Any]:
    """Read results.json of a finished evaluation; `setting` names the flag in errors."""
    try:
        return json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = f"{folder} is not the folder of a finished evaluation: {error}"
        raise UserError(f"{setting}: {why}") from error


def compare(before: Path, after: Path) -> str:
    """Say how two evaluations of the same problems differ, by McNemar's exact test and the later
    one's grader.
    """
    results = read_results(after)
    grader = results.get("grader")
    _check_comparable(before, results["samples"], (after / PROBLEMS).read_text("utf-8"), grader)
    both = read_results(before), results
    base, now = (np.array(_verdicts(found, grader))[:, 0] for found in both)
    defaults = EvalConfig().model_dump(mode="json")  # of settings younger than a folder
    settings = [
        defaults | yaml.safe_load((folder / CONFIG).read_text("utf-8"))
        for folder in (before, after)
    ]
    other = differing(*settings, ignored=MAY_DIFFER)
    change, low, high, p = paired_change(base, now)
    verdict = "more than chance explains" if p < 0.05 else "no more than chance explains"
    return (
        f"Against {before}: {100 * change:+.1f} points [{100 * low:.1f}, {100 * high:.1f}], "
        f"p = {p:.2g} by McNemar's exact test: {verdict}. {int((now & ~base).sum())} became right, "
        f"{int((base & ~now).sum())} wrong."
    ) + (f" But their settings differ: {other}." if other else "")


def _verdicts(results: dict[str, Any], grader: GraderName | None) -> list[list[bool]] | None:
    """Return a grader's verdicts; those by greedy choice where nothing was sampled, None if the
    evaluation is from before there were two graders.
    """
    if grader is None or "probability" in results:
        return results["right"]
    return results.get("graders", {}).get(grader, {}).get("right")


def _check_comparable(folder: Path, samples: int, problems: str, grader: GraderName | None) -> None:
    before = read_results(folder)
    if (folder / PROBLEMS).read_text(encoding="utf-8") != problems:
        raise UserError(f"against: {folder} is of other problems; give both the same data")
    if max(samples, before["samples"]) > 1:
        raise UserError("against: McNemar's test needs evaluations with one sample per problem")
    if _verdicts(before, grader) is None:
        remedy = f"run em-kernels eval --regrade {folder}"
        raise UserError(f"against: {folder} has no verdicts of the grader {grader}; {remedy}")


def _on_server(
    config: EvalConfig, url: str, prompts: Sequence[str | Conversation]
) -> tuple[str, Completer]:
    """Return the model's name on the server, and a function that samples there."""
    from ..rollouts.server import complete, model_name

    name, messages = model_name(url, config.model), list[str | Conversation](prompts)
    if config.template == "chat":
        messages = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    if any(not isinstance(x, str) and x[-1]["role"] == "assistant" for x in messages):
        why = "OpenAI's API cannot continue a conversation that ends in the assistant's words"
        raise UserError(f"server: {why}; evaluate the model on this machine, without server")
    kwargs = json_object("template_kwargs", config.template_kwargs)

    def sample(keys: Sequence[Key], on_done: OnDone) -> None:
        asked = [messages[problem] for problem, _ in keys]
        seeds = [hash((config.seed, *key, EVAL_STREAM)) for key in keys]
        options: dict[str, Any] = {"template_kwargs": kwargs, "parallel": config.parallel}
        options["on_done"] = lambda i, *done: on_done([Completion(*keys[i], *done)])
        complete(url, name, asked, seeds, config.sampled(), **options)

    return name, sample


def _sampled(
    config: EvalConfig,
    name: str,
    problems: list[Problem],
    complete: Completer,
    console: Console,
    on_batch: OnBatch = lambda done, seconds: None,
) -> dict[str, Any]:
    """Collect and grade completions; write results.json and return its content."""
    keys = [(i, k) for i in range(len(problems)) for k in range(config.samples)]
    path = config.output / COMPLETIONS
    kept = collect(complete, keys, path, console, "completing", on_batch).values()
    pairs = [(c.text, problems[c.problem].answer) for c in kept]
    right = dict[str, np.ndarray]()
    with progress_on(console) as progress, Grader() as grader:
        bar = progress.add_task("grading", total=len(GRADERS) * len(pairs))
        for by in GRADERS:
            verdicts = grader.grade(pairs, lambda count: progress.advance(bar, count), by)
            right[by] = np.array(verdicts).reshape(-1, config.samples)
    tokens = [c.tokens for c in kept if c.tokens is not None]
    facts: dict[str, Any] = {"mean_tokens": float(np.mean(tokens)) if tokens else None}
    facts["ended"] = float(np.mean([c.ended for c in kept]))
    facts |= {"cut": sum(not c.ended for c in kept), "capped": sum(c.capped for c in kept)}
    graders = {by: {**_accuracy(right[by]), "right": right[by].tolist()} for by in GRADERS}
    facts |= {"grader": config.grader, "graders": graders}
    write_config(config.output, config)  # An earlier grading may have had the other grader.
    return _finish(config, name, right[config.grader], **facts)


def _accuracy(right: np.ndarray) -> dict[str, Any]:
    k = right.shape[1]
    # Over problems, as the samples of one problem are not independent.
    interval = wilson(right) if k == 1 else mean_interval(right.mean(1))
    return {"accuracy": float(right.mean()), "interval": interval}


def _finish(config: EvalConfig, name: str, right: np.ndarray, **facts: Any) -> dict[str, Any]:
    """Write results.json and return its content."""
    n, k = right.shape
    results = {
        "model": name,
        "data": config.data,
        "problems": n,
        "samples": k,
        **_accuracy(right),
        "pass_at": {str(2**i): float(pass_at(right, 2**i).mean()) for i in range(k.bit_length())},
        **facts,
        "right": right.tolist(),
    }
    write_whole(config.output / RESULTS, json.dumps(results) + "\n")
    return results
