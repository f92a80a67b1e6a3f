"""Logits of several models in one figure: as the paper draws them, and of all the vocabulary."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import skew
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...hf import head_of
from ..config import Sampling
from ..data.problems import as_problem, read_rows
from ..device_memory import halve_until_it_fits
from ..evaluation.task import TaskSettings, open_model
from ..evaluation.teacher_forcing import response_states
from ..rollouts.sampling import Rollout, generate
from ..settings import UserError
from .figures import COLOURS, DASHES, STYLE
from .logit_shift import BINS, HIGH, LOW, Measures, logits_of, measure

# The paper's figure: each model continues the first rows of a file, sampled so, with this seed.
ROWS, SEED, OFFICIAL_BINS = 20, 42, 50
SAMPLING = Sampling(temperature=0.6, top_k=50, top_p=1, repetition_penalty=1, max_new_tokens=500)
EXPLAINED = (
    "Left, as the paper's code draws it: each model's own texts, of each as many tokens as the "
    f"shortest has, of each token the {SAMPLING.top_k} highest logits, divided by "
    f"{SAMPLING.temperature:g}: what sampling left over. Right: the texts of the first model, read "
    "by all, and the raw logits of the whole vocabulary. The two are not comparable."
)


class ModelLogits(NamedTuple):
    """One model's logits, measured both ways."""

    name: str
    official: np.ndarray  # the values of the paper's histogram
    tokens: int  # of each text that they are from
    whole: Measures  # of raw logits, on the first model's texts


def model_logits(models: Sequence[str], prompts: Path, console: Console) -> list[ModelLogits]:
    """Sample with each model in turn, one in memory at a time, and measure its logits."""
    rows = read_rows(prompts, "prompts")[:ROWS]
    if not rows:
        raise UserError(f"prompts: {prompts} has no rows")
    asked = [as_problem(row, f"{prompts}, row {i}", "prompts").prompt for i, row in enumerate(rows)]
    messages = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in asked]
    found, first = list[ModelLogits](), list[Rollout]()
    for name in models:
        gc.collect()  # the model before it
        model, tokenizer = open_model(TaskSettings(model=name), console)
        with console.status(escape(f"{name}: sampling {len(rows)} completions")):
            rollouts = _completions(model, tokenizer, messages)
        first = first or rollouts
        entries = model.config.get_text_config().vocab_size
        if max(max(r.prompt_ids + r.response_ids) for r in first) >= entries:
            raise UserError(f"models: {name} lacks tokens of {models[0]}; name one family's")
        official, tokens = official_values(model, rollouts)
        found.append(ModelLogits(name, official, tokens, measure(model, first, 1.0, console)))
        del model
    return found


def _completions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[list[dict[str, str]]]
) -> list[Rollout]:
    """Sample as the paper's code does: through the chat template, without a generation prompt."""
    texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in messages]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    seeds = [(SEED, i) for i in range(len(prompts))]
    return halve_until_it_fits(
        lambda size: generate(model, tokenizer, prompts, seeds, SAMPLING, batch_size=size),
        len(prompts),
        1,
        lambda size: None,
    )


@torch.no_grad()
def official_values(model: PreTrainedModel, rollouts: Sequence[Rollout]) -> tuple[np.ndarray, int]:
    """Return the logits that the paper's figure is drawn from, and the tokens of each text."""
    shortest, kept = min(len(r.response_ids) for r in rollouts), list[np.ndarray]()
    head = head_of(model)
    for members, states in response_states(model, rollouts):
        lengths = [len(rollouts[i].response_ids) for i in members]
        for part in states.split(lengths):
            values = logits_of(part[:shortest], head).topk(min(SAMPLING.top_k, len(head.weight)))
            scores = (values.values / SAMPLING.temperature).flatten().cpu().numpy()
            kept.append(scores[np.isfinite(scores) & (scores != 0)])
    return np.concatenate(kept), shortest


def table_of(found: Sequence[ModelLogits]) -> Table:
    """Return the moments of both measurements, a row per model."""
    table = Table("", box=SIMPLE_HEAD, title="mean, standard deviation, skewness of the logits")
    for name in (f"top {SAMPLING.top_k}, own texts", "whole vocabulary, same texts"):
        table.add_column(name, justify="right")
    for model in found:
        top = model.official.mean(), model.official.std(), skew(model.official)
        whole = model.whole.mean, model.whole.std, model.whole.skewness
        table.add_row(model.name, *("  ".join(f"{x:.2f}" for x in row) for row in (top, whole)))
    return table


@matplotlib.rc_context(STYLE)
def draw(found: Sequence[ModelLogits], output: Path) -> None:
    """Draw both histograms, a curve per model, into a PNG."""
    figure = Figure(figsize=(10, 4.4))
    left, right = figure.subplots(1, 2)
    left.set(title=f"Top {SAMPLING.top_k} at T = {SAMPLING.temperature:g}, own texts")
    right.set(title="Whole vocabulary at T = 1, same texts")
    for number, model in enumerate(found):
        heights, edges = np.histogram(model.official, OFFICIAL_BINS, density=True)
        _curve(left, (edges[1:] + edges[:-1]) / 2, heights, number, Path(model.name).name)
        share = (model.whole.histogram / model.whole.histogram.sum()).numpy()
        seen = np.flatnonzero(share > 1e-5)
        x = LOW + (HIGH - LOW) / BINS * (np.arange(BINS) + 0.5)
        part = slice(seen[0], seen[-1] + 1)
        _curve(right, x[part], share[part] * BINS / (HIGH - LOW), number, "")
    for axes in (left, right):
        axes.set(xlabel="logit", ylabel="density")
        axes.set_ylim(0)
    figure.legend(loc="outside lower left", ncols=2)
    try:
        figure.savefig(output, dpi=150, facecolor="white")
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib cannot write
        raise UserError(f"output: cannot write {output}: {error}") from error


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, number: int, label: str) -> None:
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
    axes.plot(x, y, dash, color=colour, drawstyle="steps-mid", label=label)
    axes.fill_between(x, y, step="mid", color=colour, alpha=0.15, linewidth=0)
