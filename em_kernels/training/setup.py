"""What a run starts from; whatever is wrong with it is said here, before anything is written."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .checkpoint import defining_settings, steps_in
from .config import TrainConfig, UserError, json_object, read_yaml
from .data import Problem, encode, problems_of, texts_of
from .demo_model import fetch_demo
from .ranks import find_ranks
from .records import CONFIG, differing, read_rollouts

ADAPTERS = "adapter_config.json"


class Task(NamedTuple):
    """A run's model (folder or hub id), tokenizer, and problems as text and as token ids."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    problems: list[Problem]
    prompts: list[list[int]]
    chat_template: bool  # False too where the tokenizer has none
    model_config: PreTrainedConfig


def as_recorded(config: TrainConfig) -> TrainConfig:
    """What the run in config.output goes on with: what config leaves open is as that run has it.

    Raises: UserError where there is no run, or a setting would change its numbers.
    """
    before = read_yaml(config.output / CONFIG)
    left = {name: value for name, value in before if getattr(config, name) in ("auto", None)}
    left["share_prefix"] = config.share_prefix and before.share_prefix
    config = config.model_copy(update=left)
    if what := differing(defining_settings(before), defining_settings(config)):
        raise UserError(f"resume: the run was made with {what}; go on with that, or start another")
    return config


def find_device(config: TrainConfig) -> torch.device:
    """Of a command that one process runs; with its index."""
    ranks = find_ranks(config)
    if ranks.count > 1:
        raise UserError("device: one process only; start it without accelerate or torchrun")
    return ranks.device


def resolve_source(model: str) -> str:
    """Folder or hub id of what the setting `model` names; of a run its newest checkpoint."""
    if not model:
        raise UserError('model: missing; name a hub id, a local folder, or "demo"')
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise UserError(f"model: there is no folder {model}")
    source = str(fetch_demo()) if model == "demo" else os.path.expanduser(model)
    checkpoints = steps_in(Path(source, "checkpoints"))
    source = str(checkpoints[-1]) if checkpoints else source
    return os.path.abspath(source) if os.path.isdir(source) else source  # a LoRA names it as base


def fingerprint(model: str) -> str:
    """Of a local model: changes when other weights lie there."""
    source = resolve_source(model)
    files = [(path.name, path.stat()) for path in sorted(Path(source).glob("*.safetensors"))]
    return "; ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files) or source


def open_source(model: str) -> tuple[str, PreTrainedConfig, PreTrainedTokenizerBase]:
    """Folder or hub id, config and tokenizer of what the setting `model` names; no weights are
    read.
    """
    source = resolve_source(model)
    try:
        adapters, base = Path(source, ADAPTERS), source
        if adapters.exists():
            base = json.loads(adapters.read_text("utf-8"))["base_model_name_or_path"]
        model_config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers and the hub client raise many kinds
        raise UserError(f"model: cannot open {model!r}: {in_short(error)}") from error
    if getattr(model_config, "quantization_config", None) is not None:
        raise UserError(
            f"model: {model!r} is quantised; name the model it was made from (mode lora "
            "with 4bit quantises while it loads)"
        )
    return source, model_config, tokenizer


def refuse_adapters(source: str) -> None:
    """Raise UserError where a folder has them in place of a whole model."""
    if Path(source, ADAPTERS).exists():
        raise UserError(
            f"model: {source} holds adapters; em-kernels merge RUN --output DIR makes a model of "
            "a run's"
        )


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


def load_model(source: str, config: TrainConfig, device: torch.device) -> PreTrainedModel:
    """The model on its device, its weights in config.dtype; the base of a LoRA in 4 bits where
    these are asked for.
    """
    quantisation = None
    if config.four_bit:
        from .lora import four_bit_config  # peft takes seconds

        quantisation = four_bit_config()
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, config.dtype),
            attn_implementation=None if config.attention == "auto" else config.attention,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told of below
            output_loading_info=True,
            device_map=None if device.type == "cpu" else {"": device},  # never whole on the host
            quantization_config=quantisation,
        )
    except Exception as error:
        refused_attention(config.attention, error)
        raise UserError(f"model: cannot load {config.model!r}: {in_short(error)}") from error
    model, loading = opened
    if loading["missing_keys"]:  # transformers would draw them at random
        raise UserError(f"model: {config.model!r} lacks weights: {min(loading['missing_keys'])}")
    for name, stored, shape in sorted(loading["mismatched_keys"]):
        raise UserError(
            f"model: {config.model!r}: {name} is stored as {tuple(stored)}, and config.json says "
            f"{tuple(shape)}; take the config.json of these weights"
        )
    return model


def attention_of(asked: str, config: PreTrainedConfig) -> str:
    """What "auto" is of a model."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    has_sdpa = getattr(kind, "_supports_sdpa", True)
    return ("sdpa" if has_sdpa else "eager") if asked == "auto" else asked


def tell_attention(asked: str, model: PreTrainedModel, console: Console) -> None:
    """Where "auto" took another than the usual one."""
    found = model.config._attn_implementation
    if asked == "auto" and found != "sdpa":
        name = type(model).__name__
        console.print(f"Attention: {found}; {name} has no sdpa.", markup=False, soft_wrap=True)


def architecture(config: PreTrainedConfig) -> str:
    """Its name, for messages."""
    return (config.architectures or [type(config).__name__.removesuffix("Config")])[0]


def in_short(error: Exception) -> str:
    """An exception of transformers or the hub client in one line."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "it brings code of its own, which is not run here; take a model of an architecture "
            "that transformers has"
        )
    return text[:300]


def refused_attention(attention: str, error: Exception) -> None:
    """Raises: UserError where the error is transformers' refusal of this attention."""
    text = " ".join(str(error).split())
    if isinstance(error, (ImportError, ValueError)) and "attention" in text.lower():
        first = text.split(". ")[0]
        raise UserError(f"attention: {attention!r} is refused: {first}; use auto") from error
