"""Opening of models and tokenizers by the name that the settings give."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from ...ops.gemm import bf16_isa
from ..run_folder import newest_checkpoint
from ..settings import UserError, in_one_line
from . import gguf
from .demo_model import fetch_demo

ADAPTERS = "adapter_config.json"
FLASH = "flash_attention_2"


def resolve_source(model: str) -> str:
    """Return the folder or hub id that `model` names; for a run, its newest checkpoint, for a GGUF
    file its folder in the cache, which is made on the first call.
    """
    if not model:
        raise UserError('model: missing; name a hub id, a local folder, a GGUF file, or "demo"')
    path = Path(model).expanduser()
    if path.suffix == gguf.SUFFIX and not path.is_dir():
        return str(gguf.folder_of(path))
    if model.startswith((".", "/", "~")) and not path.is_dir():
        raise UserError(f"model: there is no folder {model}")
    source = str(fetch_demo()) if model == "demo" else os.path.expanduser(model)
    source = str(newest_checkpoint(Path(source)) or source)
    # A LoRA records this path as its base, so it must be absolute.
    return os.path.abspath(source) if os.path.isdir(source) else source


def fingerprint(model: str) -> str:
    """Return a string that changes when a local model's weight files change."""
    source = resolve_source(model)
    files = [(path.name, path.stat()) for path in sorted(Path(source).glob("*.safetensors"))]
    return "; ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files) or source


def open_source(model: str) -> tuple[str, PreTrainedConfig, PreTrainedTokenizerBase]:
    """Return folder or hub id, config and tokenizer of what `model` names; read no weights."""
    source = resolve_source(model)
    try:
        adapters, base = Path(source, ADAPTERS), source
        if adapters.exists():
            base = json.loads(adapters.read_text("utf-8"))["base_model_name_or_path"]
        model_config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers and the hub client raise many kinds.
        raise UserError(f"model: cannot open {model!r}: {in_short(error)}") from error
    if getattr(model_config, "quantization_config", None) is not None:
        remedy = (
            "name the model it was made from (mode lora with 4bit quantises that while loading)"
        )
        raise UserError(f"model: {model!r} is quantised; {remedy}")
    return source, model_config, tokenizer


def refuse_adapters(source: str) -> None:
    """Raise UserError for a folder that has adapters instead of a whole model."""
    if Path(source, ADAPTERS).exists():
        remedy = "em-kernels merge RUN --output DIR makes a model of them"
        raise UserError(f"model: {source} holds adapters; {remedy}")


def auto_dtype(device: str, capability: tuple[int, int] | None = None) -> str:
    """Return the dtype for "auto": on a GPU bfloat16, but float16 on CUDA cards below sm80, which
    emulate bf16; on a CPU bfloat16 where that has bf16 products, else float32.

    Args:
        device: its type.
        capability: compute capability of a CUDA card; None: as of sm80 or later.
    """
    if device == "cuda":
        return "float16" if capability is not None and capability < (8, 0) else "bfloat16"
    return "bfloat16" if bf16_isa() else "float32"


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a CUDA card; None if none is there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


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
        four_bit: quantise the linear layers while loading, as the frozen base of a LoRA.
        named: what the user called the model, for messages; default: source.
    """
    named = named or source
    quantisation = four_bit_config(getattr(torch, dtype)) if four_bit else None
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            attn_implementation=None if attention == "auto" else attention,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # They are refused below.
            output_loading_info=True,
            device_map=None if device.type == "cpu" else {"": device},  # never whole in host memory
            quantization_config=quantisation,
        )
    except Exception as error:
        refused_attention(attention, error)
        raise UserError(f"model: cannot load {named!r}: {in_short(error)}") from error
    model, loading = opened
    if loading["missing_keys"]:  # transformers initialises them at random.
        name = min(loading["missing_keys"])
        raise UserError(f"model: {named!r} lacks weights: {name}; take a complete copy")
    for name, stored, shape in sorted(loading["mismatched_keys"]):
        why = f"{name} is stored as {tuple(stored)}, and config.json says {tuple(shape)}"
        raise UserError(f"model: {named!r}: {why}; take the config.json of these weights")
    return model


def four_bit_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return settings for from_pretrained: linear layers but the head in NF4, doubly quantised, for
    products in this dtype.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError("4bit: bitsandbytes is not installed; pip install 'em-kernels[4bit]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def attention_of(asked: str, config: PreTrainedConfig, flash: bool = False) -> str:
    """Return the attention implementation asked for; for "auto", the one that the model gets.

    flash: take flash_attention_2 where the model has it.
    """
    if asked != "auto":
        return asked
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if flash and getattr(kind, "_supports_flash_attn", False):
        return FLASH
    return "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"


def has_flash_attention() -> bool:
    """Return True if the flash_attn package is installed and the GPU is sm80 or later."""
    is_there = torch.cuda.is_available() and is_flash_attn_2_available()
    return is_there and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


def tell_attention(asked: str, model: PreTrainedModel, console: Console) -> None:
    """Print the attention implementation if "auto" did not take sdpa."""
    taken, name = model.config._attn_implementation, type(model).__name__
    if asked == "auto" and taken != "sdpa":
        why = "flash-attn is installed" if taken == FLASH else f"{name} has no sdpa"
        console.print(f"Attention: {taken}; {why}.", markup=False, soft_wrap=True)


def architecture(config: PreTrainedConfig) -> str:
    """Return the architecture's name, for messages."""
    return (config.architectures or [type(config).__name__.removesuffix("Config")])[0]


def in_short(error: Exception) -> str:
    """Return an exception of transformers or the hub client as one short line."""
    text = in_one_line(error)
    if "trust_remote_code" in text:
        remedy = "take a model of an architecture that transformers has"
        return f"it brings code of its own, which is not run here; {remedy}"
    return text[:300]


def refused_attention(attention: str, error: Exception) -> None:
    """Raise UserError if the error is transformers' refusal of this attention implementation."""
    text = in_one_line(error)
    if isinstance(error, (ImportError, ValueError)) and "attention" in text.lower():
        first = text.split(". ")[0]
        raise UserError(f"attention: {attention!r} is refused: {first}; use auto") from error
