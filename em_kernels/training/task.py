"""Inputs of a run, validated here before anything is written."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from .config import TrainConfig, read_yaml
from .data.problems import Problem, encode, problems_of, texts_of
from .distributed import find_ranks
from .models.loading import open_source, refuse_adapters
from .run_folder import CONFIG
from .runs.checkpoint import defining_settings
from .runs.records import differing, read_rollouts
from .settings import UserError, json_object


class Task(NamedTuple):
    """A run's model (folder or hub id), tokenizer, and problems as text and as token ids."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    problems: list[Problem]
    prompts: list[list[int]]
    chat_template: bool  # False too where the tokenizer has none
    model_config: PreTrainedConfig


def as_recorded(config: TrainConfig) -> TrainConfig:
    """Settings with which the run in config.output resumes: what config leaves open is the run's.

    Raises: UserError where there is no run, or a setting would change its numbers.
    """
    before = read_yaml(config.output / CONFIG)
    left = {name: value for name, value in before if getattr(config, name) in ("auto", None)}
    left["share_prefix"] = config.share_prefix and before.share_prefix
    config = config.model_copy(update=left)
    if what := differing(defining_settings(before), defining_settings(config)):
        raise UserError(f"resume: the run was made with {what}; go on with that, or start another")
    return config


def find_device(device: str) -> torch.device:
    """The device, with its index, for a command that runs in one process."""
    ranks = find_ranks(device)
    if ranks.count > 1:
        raise UserError("device: one process only; start it without accelerate or torchrun")
    return ranks.device


def check_context(config: PreTrainedConfig, longest: int, new: int, told: str, remedy: str) -> None:
    """Raise UserError where a prompt of so many tokens and a completion exceed the model's."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest >= context:
        raise UserError(f"{told} {longest} tokens, the model's context {context}; {remedy}")
    if context is not None and longest + new > context:
        raise UserError(
            f"sampling.max_new_tokens: {longest} prompt tokens and {new} exceed the model's "
            f"context of {context}; give at most {context - longest}"
        )


def load_task(config: TrainConfig) -> Task:
    """Tokenizer and prompts, checked against the model's context; no weights are read."""
    problems = problems_of(config)
    source, model_config, tokenizer = open_source(config.model)
    refuse_adapters(source)
    chat_template = config.chat_template and tokenizer.chat_template is not None
    kwargs = json_object("template_kwargs", config.template_kwargs)
    prompts = [encode(tokenizer, problem.prompt, chat_template, kwargs) for problem in problems]
    if not all(prompts):
        raise UserError("prompt: the tokenizer makes no token of it")
    if (last := max(map(max, prompts))) >= (words := model_config.get_text_config().vocab_size):
        raise UserError(
            f"prompt: has token {last} ({tokenizer.decode(last)!r}), the model {words} words; "
            "leave it out, or name the model of this tokenizer"
        )
    longest = max(map(len, prompts))
    check_context(
        model_config, longest, config.sampling.max_new_tokens, "prompt: has", "shorten it"
    )
    return Task(source, tokenizer, problems, prompts, chat_template, model_config)


def as_sampled(task: Task, config: TrainConfig, run: Path) -> Task:
    """With the prompts of this run's completions where the chat template tells the day, as Llama's
    does, and they were sampled on another.
    """
    day = task.chat_template and "strftime_now" in str(task.tokenizer.chat_template)
    recorded = read_rollouts(run, config.rollouts) if day else {}
    if not recorded:
        return task
    prompts = [rollout.prompt_ids for rollout in recorded[1][: len(task.prompts)]]
    texts = task.tokenizer.batch_decode(prompts)
    asked = zip(task.problems, texts, strict=True)
    same = all(part.strip() in text for p, text in asked for part in texts_of(p.prompt))
    return task._replace(prompts=prompts) if same else task  # which will be refused
