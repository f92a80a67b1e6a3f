"""`em-kernels eval`: accuracy on problems with known answers, and how far it can be trusted."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil, comb, floor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import yaml
from pydantic import Field
from rich.console import Console
from scipy.stats import binomtest, bootstrap
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...functional import fused_token_stats
from ...hf import head_of
from ..config import Sampling
from ..console import progress_on
from ..data.grading import Grader
from ..data.problems import Conversation, Problem, as_problem, few_shot, read_rows, tokenised
from ..models.loading import fingerprint
from ..rollouts.sampling import Rollout
from ..run_folder import CONFIG
from ..runs.records import MAY_CHANGE, differing, read_lines, resumable, write_whole
from ..settings import Positive, UserError, json_object
from ..task import check_context
from .completions import (
    COMPLETIONS,
    Completion,
    Local,
    Served,
    TaskSettings,
    collect,
    digest,
    open_model,
    states_of,
    token_ids,
)

PROBLEMS, RESULTS = "problems.jsonl", "results.json"
STREAM = 1  # of randomness; selection's is 2
RESAMPLES = 2000
Temperatures = Annotated[tuple[Annotated[float, Field(ge=0.01, le=100)], ...], Field(min_length=1)]
NAMES = (*MAY_CHANGE, "model", "temperatures")  # that may differ between what is compared


class EvalConfig(TaskSettings):
    """Accuracy of a model on problems with known answers: greedy by default, or with --samples
    avg@k and pass@k. The same command again goes on where it was stopped.
    """

    sampling: Sampling = Sampling(
        temperature=0, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=3072
    )
    """How completions are sampled; every field is said, none comes from the model."""
    samples: Positive = 1
    """Completions of each problem; more than one need a temperature."""
    output: Path = Path("evals/eval")
    """Folder of the evaluation: settings, completions, verdicts."""
    teacher_forced: bool = False
    """Sample nothing: is every token of the known answer, as a worked example would write it, the
    most probable one (this is what greedy sampling would say), and how probable is it at each of
    temperatures? For template few-shot and answers that can be written in one way.
    """
    temperatures: Temperatures = (1.0, 0.5, 0.25)
    """Temperatures at which teacher_forced computes the answer's probability."""
    server: str | None = None
    """Evaluate through this OpenAI-compatible server, such as http://localhost:8000/v1 of vLLM."""
    parallel: Positive = 32
    """Requests to the server at a time."""


class Scores(NamedTuple):
    """Teacher-forced scores of problems."""

    greedy: np.ndarray  # (n,) bool: every token of the answer is the most probable one
    logprob: np.ndarray  # (temperatures, n) nats, of the whole answer


def known_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> list[Rollout]:
    """Few-shot prompts and their known completions, tokenised together and as worked examples are:
    an empty line follows, and the next question; some tokenizers join the lines' ends.
    """
    rollouts = list[Rollout]()
    for prompt, completion in zip(prompts, completions, strict=True):
        ids, text = tokenised(tokenizer, prompt), prompt + completion
        count = len(tokenised(tokenizer, f"{text}\nQ:"))  # without an EOS
        found = tokenizer(f"{text}\nQ:", return_offsets_mapping=True)
        pairs = zip(found.input_ids[:count], found.offset_mapping[:count], strict=True)
        whole = [token for token, (start, _) in pairs if start < len(text)]
        if whole[: len(ids)] != ids:
            raise UserError(
                f"teacher_forced: the tokenizer joins the end of the prompt with {completion!r}"
            )
        rollouts.append(Rollout(ids, whole[len(ids) :], True))
    return rollouts


def score(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    temperatures: Sequence[float],
    console: Console,
    title: str = "scoring",
) -> Scores:
    """Known completions under a model."""
    head = head_of(model)
    longest = max(map(len, rollouts))
    check_context(model.config, longest, 0, "data: a problem with its answer has", "leave it out")
    greedy = np.zeros(len(rollouts), dtype=bool)
    logprob = np.zeros((len(temperatures), len(rollouts)))
    with progress_on(console) as progress, torch.no_grad():
        bar = progress.add_task(title, total=len(rollouts))
        for members, states in states_of(model, rollouts):
            tokens = [rollouts[i].response_ids for i in members]
            targets = torch.tensor(sum(tokens, []), device=states.device)
            lengths = [len(ids) for ids in tokens]
            for row, temperature in enumerate(temperatures):
                stats = fused_token_stats(
                    states,
                    head.weight,
                    targets,
                    stats=("logprob", "argmax"),
                    temperature=temperature,
                    **head.arguments(),
                )
                assert stats.argmax is not None and stats.logprob is not None
                right = (stats.argmax == targets).cpu().split(lengths)
                parts = stats.logprob.double().cpu().split(lengths)
                for i, hits, part in zip(members, right, parts, strict=True):
                    greedy[i], logprob[row, i] = hits.all().item(), part.sum().item()
            progress.advance(bar, len(members))
    return Scores(greedy, logprob)


def wilson(right: np.ndarray) -> tuple[float, float]:
    """95 % Wilson interval of the accuracy."""
    interval = binomtest(int(right.sum()), right.size).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def of_problems(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean over problems, by resampling them; where that would be sure of it,
    as wide as if each were right or wrong.
    """
    if np.ptp(values) == 0 and 0 <= values[0] <= 1:
        fewest, most = (np.arange(values.size) < count(values.sum()) for count in (floor, ceil))
        return wilson(fewest)[0], wilson(most)[1]
    draw = partial(bootstrap, n_resamples=RESAMPLES, method="percentile", rng=0)
    interval = draw((values,), np.mean).confidence_interval
    return float(interval.low), float(interval.high)


def paired_change(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float, float]:
    """Change of accuracy on the same problems, its 95 % interval, and McNemar's exact p value.

    The interval is the normal approximation for paired proportions.
    """
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n, changed = before.size, gained + lost
    change = (gained - lost) / n
    half = 1.96 * np.sqrt(max(changed - (gained - lost) ** 2 / n, 0)) / n
    p = binomtest(gained, changed).pvalue if changed else 1.0
    return change, change - half, change + half, p


def pass_at(right: np.ndarray, k: int) -> np.ndarray:
    """Unbiased pass@k of each problem: the chance that one of k samples is right (Chen et al.,
    arXiv 2107.03374).
    """
    n, wrong = right.shape[1], (~right).sum(1)
    return np.array([1 - comb(int(w), k) / comb(n, k) for w in wrong])


def percent(value: float, interval: Sequence[float] = ()) -> str:
    """With its interval, where one is given."""
    low_high = ", ".join(f"{100 * x:.1f}" for x in interval)
    return f"{100 * value:.1f}" + (f" [{low_high}]" if interval else "")


def evaluate(config: EvalConfig, console: Console, against: Path | None = None) -> dict[str, Any]:
    """Ask or score, grade, and write results.json, which is returned. What it will be compared with
    is looked at first.
    """
    if config.samples > 1 and config.sampling.temperature == 0:
        raise UserError("samples: are all the same at sampling.temperature 0; raise it")
    if config.teacher_forced and (config.template != "few-shot" or config.server):
        raise UserError("teacher_forced: goes with template few-shot and a model of this machine")
    problems, shots = config.problems()
    if any(problem.answer is None for problem in problems):
        raise UserError(f"data: not every problem of {config.data} has an answer to compare with")
    prompts, name = [config.prompt(problem, shots) for problem in problems], config.model
    lines = [json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in problems]
    rows = "".join(lines)
    if against is not None:
        _check_comparable(against, config.samples, rows)
    if config.teacher_forced:
        model, tokenizer = open_model(config, console)
        texts = [few_shot(shots, problem) for problem in problems]
        known = known_answers(tokenizer, texts, [problem.completion for problem in problems])
    else:
        source = _source(config, prompts, console)
        name = source.model if isinstance(source, Served) else config.model
    served = name if config.server else fingerprint(config.model)
    with resumable(config.output, config, model=served, data=digest(problems, prompts)):
        write_whole(config.output / PROBLEMS, rows)
        if config.teacher_forced:
            scores = score(model, known, config.temperatures, console)
            rates = zip(config.temperatures, np.exp(scores.logprob).tolist(), strict=True)
            return _finish(config, name, scores.greedy[:, None], {"probability": dict(rates)})
        keys = [(i, k) for i in range(len(problems)) for k in range(config.samples)]
        kept = collect(source, keys, config.output / COMPLETIONS, console)
        return _graded(config, name, problems, kept, console)


def _check_comparable(folder: Path, samples: int, problems: str) -> None:
    before = read_results(folder)
    if (folder / PROBLEMS).read_text(encoding="utf-8") != problems:
        raise UserError(f"against: {folder} is not of the same problems")
    if max(samples, before["samples"]) > 1:
        raise UserError("against: McNemar's test compares evaluations of one sample a problem")


def regrade(folder: Path, console: Console) -> dict[str, Any]:
    """Grade the completions that an evaluation has kept, and write results.json anew."""
    if not (folder / PROBLEMS).is_file():
        raise UserError(f"regrade: {folder} is no evaluation's folder: it has no {PROBLEMS}")
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        config = EvalConfig(**{**settings, "output": folder})  # which may have been moved
    except (OSError, TypeError) as error:
        raise UserError(f"regrade: {folder} is no evaluation's folder: {error}") from error
    if config.teacher_forced:
        return read_results(folder, "regrade")
    problems = [as_problem(row, folder) for row in read_rows(folder / PROBLEMS, "regrade")]
    rows = [Completion(**row) for row in read_lines(folder / COMPLETIONS, "problem")]
    if len(rows) < len(problems) * config.samples:
        raise UserError(f"regrade: {folder} is not finished; run its command again")
    name = read_results(folder, "regrade")["model"]
    return _graded(config, name, problems, {row[:2]: row for row in rows}, console)


def read_results(folder: Path, setting: str = "against") -> dict[str, Any]:
    """Read results.json of a finished evaluation; `setting` names the flag in errors."""
    try:
        return json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{setting}: {folder} is not the folder of a finished evaluation: {error}"
        ) from error


def _source(
    config: EvalConfig, prompts: Sequence[str | Conversation], console: Console
) -> Local | Served:
    sampling = config.sampled()
    if config.server is None:
        model, tokenizer = open_model(config, console)
        ids = token_ids(config, tokenizer, model, prompts)
        return Local(model, tokenizer, ids, sampling, config.seed, STREAM, config.batch_size)
    from ..rollouts.server import model_name

    name, chat = model_name(config.server, config.model), config.template == "chat"
    asked = list[str | Conversation]()
    for prompt in prompts:
        as_message = chat and isinstance(prompt, str)
        asked.append([{"role": "user", "content": prompt}] if as_message else prompt)
    if any(not isinstance(x, str) and x[-1]["role"] == "assistant" for x in asked):
        raise UserError(
            "server: OpenAI's API cannot continue a conversation that ends in the assistant's "
            "words; evaluate the model on this machine, without server"
        )
    kwargs = json_object("template_kwargs", config.template_kwargs)
    return Served(
        config.server, name, asked, sampling, config.seed, STREAM, kwargs, config.parallel
    )


def _graded(
    config: EvalConfig,
    name: str,
    problems: Sequence[Problem],
    kept: Mapping[tuple[int, int], Completion],
    console: Console,
) -> dict[str, Any]:
    keys = [(i, k) for i in range(len(problems)) for k in range(config.samples)]
    pairs = [(kept[key].text, problems[key[0]].answer) for key in keys]
    with progress_on(console) as progress, Grader() as grader:
        bar = progress.add_task("grading", total=len(pairs))
        verdicts = grader.grade(pairs, lambda count: progress.advance(bar, count))
    tokens = [c.tokens for c in kept.values() if c.tokens is not None]
    facts = {
        "mean_tokens": float(np.mean(tokens)) if tokens else None,
        "ended": float(np.mean([completion.ended for completion in kept.values()])),
    }
    right = np.array(verdicts).reshape(len(problems), config.samples)
    return _finish(config, name, right, facts)


def _finish(
    config: EvalConfig, name: str, right: np.ndarray, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """results.json: the mean over problems, with an interval that heeds that samples of one
    problem go together.
    """
    n, k = right.shape
    interval = wilson(right) if k == 1 else of_problems(right.mean(1))
    results = {
        "model": name,
        "data": config.data,
        "problems": n,
        "samples": k,
        "accuracy": float(right.mean()),
        "interval": interval,
        "pass_at": {str(2**i): float(pass_at(right, 2**i).mean()) for i in range(k.bit_length())},
        **facts,
        "right": right.tolist(),
    }
    write_whole(config.output / RESULTS, json.dumps(results) + "\n")
    return results


def compare(before: Path, after: Path) -> str:
    """Compare two evaluations of the same problems by McNemar's exact test, in a sentence."""
    results = read_results(after)
    problems = (after / PROBLEMS).read_text(encoding="utf-8")
    _check_comparable(before, results["samples"], problems)
    base, now = (np.array(found["right"])[:, 0] for found in (read_results(before), results))
    asked = [yaml.safe_load((folder / CONFIG).read_text("utf-8")) for folder in (before, after)]
    other = differing(*({k: v for k, v in x.items() if k not in NAMES} for x in asked))
    change, low, high, p = paired_change(base, now)
    told = "more than chance explains" if p < 0.05 else "which chance explains as well"
    return (
        f"Against {before}: {100 * change:+.1f} points [{100 * low:.1f}, {100 * high:.1f}], "
        f"p = {p:.2g} by McNemar's exact test: {told}. {int((now & ~base).sum())} became right, "
        f"{int((base & ~now).sum())} wrong."
    ) + (f" But they were not asked alike: {other}." if other else "")
