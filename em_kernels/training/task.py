"""Inputs of a run, checked before anything is written."""

from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .config import TrainConfig
from .data.columns import Problem
from .data.problems import encode, problems_of, read_problems
from .distributed import find_ranks
from .models.loading import open_source, refuse_adapters
from .settings import UserError, json_object


class Task(NamedTuple):
    """A run's model (folder or hub id), tokenizer, and problems as text and as token ids."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    problems: list[Problem]
    prompts: list[list[int]]
    chat_template: bool  # also False if the tokenizer has none
    model_config: PreTrainedConfig
    held_out: list[Problem]  # of stop_on
    held_out_prompts: list[list[int]]


def find_device(device: str) -> torch.device:
    """Return the device, with its index, for a command that runs in one process."""
    ranks = find_ranks(device)
    if ranks.count > 1:
        raise UserError("device: one process only; start it without accelerate or torchrun")
    return ranks.device


def context_of(config: PreTrainedConfig) -> int | None:
    """Return the tokens that a model's context holds; None if it has no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_context(
    config: PreTrainedConfig, longest: int, new: int, subject: str, remedy: str
) -> None:
    """Raise UserError where the longest prompt and `new` tokens exceed the model's context."""
    context = context_of(config)
    if context is not None and longest >= context:
        why = f"too many for the model's context of {context}"
        raise UserError(f"{subject} {longest} tokens, {why}; {remedy}")
    if context is not None and longest + new > context:
        why = f"{longest} prompt tokens and {new} exceed the model's context of {context}"
        raise UserError(f"sampling.max_new_tokens: {why}; give at most {context - longest}")


def prompt_indices(config: TrainConfig, update: int) -> list[int]:
    """Return which of the run's prompts each completion of an update is for.

    Fresh prompts are dealt from the shuffled rows, which are shuffled anew when too few are left.
    """
    count, size = len(config.prompt_rows), config.prompts_at_once
    dealt = list(range(size))
    if config.fresh_prompts is not None:
        turn, place = divmod(update - 1, count // size)
        order = np.random.default_rng((config.seed, turn)).permutation(count).tolist()
        dealt = order[place * size : (place + 1) * size]
    return [dealt[i % size] for i in range(config.rollouts)]


def _held_out(config: TrainConfig) -> list[Problem]:
    """Read the problems of stop_on."""
    if config.stop_on is None:
        return []
    rows = read_problems(str(config.stop_on), count=None, system=config.system)
    found = [row for row in rows if isinstance(row, Problem) and row.answer is not None]
    if len(found) < len(rows):
        raise UserError(f"stop_on: not every problem of {config.stop_on} has an answer")
    return found


def load_task(config: TrainConfig) -> Task:
    """Load tokenizer and prompts, and check them against the model's context; reads no weights."""
    problems = problems_of(config)
    source, model_config, tokenizer = open_source(config.model)
    refuse_adapters(source)
    chat_template = config.chat_template and tokenizer.chat_template is not None
    kwargs = json_object("template_kwargs", config.template_kwargs)
    held_out = _held_out(config)
    ids = [encode(tokenizer, p.prompt, chat_template, kwargs) for p in (*problems, *held_out)]
    if not all(ids):
        raise UserError("prompt: the tokenizer returns no tokens for it")
    vocab_size, highest = model_config.get_text_config().vocab_size, max(map(max, ids))
    if highest >= vocab_size:
        token = f"token {highest} ({tokenizer.decode(highest)!r})"
        why = f"has {token}, but the model's vocabulary has {vocab_size} entries"
        raise UserError(f"prompt: {why}; leave it out, or name this tokenizer's model")
    prompts, asked = ids[: len(problems)], ids[len(problems) :]
    for rows, has in ((prompts, "prompt: has"), (asked, "stop_on: a problem has")):
        longest, new = max(map(len, rows), default=0), config.sampling.max_new_tokens
        check_context(model_config, longest, new, has, "shorten it")
    return Task(source, tokenizer, problems, prompts, chat_template, model_config, held_out, asked)
