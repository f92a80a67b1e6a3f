"""Inputs of a run, checked before anything is written."""

from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .config import TrainConfig
from .data.columns import Problem
from .data.problems import encode, problems_of
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


def find_device(device: str) -> torch.device:
    """Return the device, with its index, for a command that runs in one process."""
    ranks = find_ranks(device)
    if ranks.count > 1:
        raise UserError("device: one process only; start it without accelerate or torchrun")
    return ranks.device


def check_context(
    config: PreTrainedConfig, longest: int, new: int, subject: str, remedy: str
) -> None:
    """Raise UserError where the longest prompt and `new` tokens exceed the model's context."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest >= context:
        why = f"too many for the model's context of {context}"
        raise UserError(f"{subject} {longest} tokens, {why}; {remedy}")
    if context is not None and longest + new > context:
        why = f"{longest} prompt tokens and {new} exceed the model's context of {context}"
        raise UserError(f"sampling.max_new_tokens: {why}; give at most {context - longest}")


def load_task(config: TrainConfig) -> Task:
    """Load tokenizer and prompts, and check them against the model's context; reads no weights."""
    problems = problems_of(config)
    source, model_config, tokenizer = open_source(config.model)
    refuse_adapters(source)
    chat_template = config.chat_template and tokenizer.chat_template is not None
    kwargs = json_object("template_kwargs", config.template_kwargs)
    prompts = [encode(tokenizer, problem.prompt, chat_template, kwargs) for problem in problems]
    if not all(prompts):
        raise UserError("prompt: the tokenizer returns no tokens for it")
    vocab_size, highest = model_config.get_text_config().vocab_size, max(map(max, prompts))
    if highest >= vocab_size:
        token = f"token {highest} ({tokenizer.decode(highest)!r})"
        why = f"has {token}, but the model's vocabulary has {vocab_size} entries"
        raise UserError(f"prompt: {why}; leave it out, or name this tokenizer's model")
    longest, new = max(map(len, prompts)), config.sampling.max_new_tokens
    check_context(model_config, longest, new, "prompt: has", "shorten it")
    return Task(source, tokenizer, problems, prompts, chat_template, model_config)
