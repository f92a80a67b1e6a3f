"""Models and tokenizers opened by name, as the settings ask."""

import json
import os
from pathlib import Path
from typing import Any

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

from ...ops.gemm import bf16_isa
from ..run_folder import newest_checkpoint
from ..settings import UserError, in_one_line
from .demo_model import fetch_demo

ADAPTERS = "adapter_config.json"


def resolve_source(model: str) -> str:
    """Folder or hub id of what the setting `model` names; of a run its newest checkpoint."""
    if not model:
        raise UserError('model: missing; name a hub id, a local folder, or "demo"')
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise UserError(f"model: there is no folder {model}")
    source = str(fetch_demo()) if model == "demo" else os.path.expanduser(model)
    source = str(newest_checkpoint(Path(source)) or source)
    return os.path.abspath(source) if os.path.isdir(source) else source  # a LoRA names it as base


def fingerprint(model: str) -> str:
    """A string that changes when a local model's weight files do."""
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


def auto_dtype(device: str) -> str:
    """The dtype for "auto": bfloat16 on a GPU, and on a CPU that multiplies it."""
    return "bfloat16" if device == "cuda" or bf16_isa() else "float32"


def load_model(
    source: str,
    dtype: str,
    attention: str,
    device: torch.device,
    *,
    four_bit: bool = False,
    named: str | None = None,
) -> PreTrainedModel:
    """Load a model onto a device.

    Args:
        source: folder or hub id.
        dtype: of the weights; a name such as "bfloat16".
        attention: transformers' attn_implementation, or "auto".
        four_bit: quantise the linear layers while they are loaded, as the frozen base of a LoRA.
        named: what the user called the model, for messages; default source.

    Raises: UserError for weights that cannot be read, are missing or have another shape.
    """
    named = source if named is None else named
    quantisation = None
    if four_bit:
        from .lora import four_bit_config  # peft takes seconds

        quantisation = four_bit_config()
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            attn_implementation=None if attention == "auto" else attention,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told of below
            output_loading_info=True,
            device_map=None if device.type == "cpu" else {"": device},  # never whole on the host
            quantization_config=quantisation,
        )
    except Exception as error:
        refused_attention(attention, error)
        raise UserError(f"model: cannot load {named!r}: {in_short(error)}") from error
    model, loading = opened
    if loading["missing_keys"]:  # transformers would draw them at random
        raise UserError(f"model: {named!r} lacks weights: {min(loading['missing_keys'])}")
    for name, stored, shape in sorted(loading["mismatched_keys"]):
        raise UserError(
            f"model: {named!r}: {name} is stored as {tuple(stored)}, and config.json says "
            f"{tuple(shape)}; take the config.json of these weights"
        )
    return model


def attention_of(asked: str, config: PreTrainedConfig) -> str:
    """The attention implementation that "auto" stands for with this model."""
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
    text = in_one_line(error)
    if "trust_remote_code" in text:
        return (
            "it brings code of its own, which is not run here; take a model of an architecture "
            "that transformers has"
        )
    return text[:300]


def refused_attention(attention: str, error: Exception) -> None:
    """Raises: UserError where the error is transformers' refusal of this attention."""
    text = in_one_line(error)
    if isinstance(error, (ImportError, ValueError)) and "attention" in text.lower():
        first = text.split(". ")[0]
        raise UserError(f"attention: {attention!r} is refused: {first}; use auto") from error
