"""LoRA adapters merged into their base model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..interrupts import doing
from ..models.loading import ADAPTERS, architecture, in_short, resolve_source
from ..models.rounding import to_bf16
from ..run_folder import newest_checkpoint
from ..settings import UserError
from .checkpoint import save_checkpoint, write_model
from .records import check_output

# Values of init_lora_weights that leave the base model unchanged, or that change it in the same way
# whenever peft creates the adapters. Others change it by random numbers or by data.
REPEATABLE = {"true", "false", "gaussian", "eva", "orthogonal", "pissa", "olora"}
BY_PEFT = "merge them by peft's merge_and_unload"


@torch.no_grad()
def merge(adapter: Path, output: Path) -> Path:
    """Add the adapters of a checkpoint, or of a run's newest, to their base model in a new folder.

    Sums are in fp32 and rounded by rounding.py, so that small changes survive in bf16. rsLoRA, DoRA
    and patterns of rank and alpha are supported. UserError where nothing can be merged.
    """
    output = output.absolute()
    check_output(output)
    folder = newest_checkpoint(adapter) or adapter
    if not (folder / ADAPTERS).is_file():
        raise UserError(f"merge: {folder} has no {ADAPTERS}; name a run of mode lora")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        check_mergeable(config)
        weights = load_file(folder / "adapter_model.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        source = resolve_source(str(config.base_model_name_or_path))
        base = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    except Exception as error:  # peft, transformers, safetensors and the hub raise many kinds.
        raise UserError(f"merge: {folder}: {in_short(error)}") from error
    try:
        with doing(f"merging into {architecture(base.config)}"):
            model = add_to_base(base, config, weights)
    except ValueError as error:
        raise UserError(f"merge: {folder}: {in_short(error)}") from error
    return save_checkpoint(write_model(model, tokenizer), output)


def add_to_base(
    base: PreTrainedModel, config: PeftConfig, weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Add adapters to their base's weights, in place; ValueError for adapters of another base."""
    source = config.base_model_name_or_path
    try:
        model: Any = get_peft_model(base, config)
        fits: Any = set_peft_model_state_dict(model, weights)
    except (RuntimeError, ValueError) as error:  # wrong shapes, missing layers
        raise ValueError(f"{source} is not the adapters' base: {error}") from error
    missing = [name for name in fits.missing_keys if ".lora_" in name]
    for name in (*fits.unexpected_keys, *missing):
        raise ValueError(f"{source} and the adapters differ in {name}; is it their base?")
    for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
        inner = layer.get_base_layer()
        if not isinstance(inner, (nn.Linear, Conv1D)):
            raise ValueError(f"an adapter is on a {type(inner).__name__}; {BY_PEFT}")
        inner.weight.data = inner.weight.data.float()
        layer.merge(safe_merge=True)
        inner.weight.data = to_bf16(inner.weight.data.flatten()).view(inner.weight.shape)
    return model.unload()


def check_mergeable(config: PeftConfig) -> None:
    """Raise ValueError for adapters whose sum with the base would not be the trained model."""
    if not isinstance(config, LoraConfig):
        kind = str(config.peft_type).rpartition(".")[2]
        raise ValueError(f"these adapters are {kind}, not LoRA; {BY_PEFT}")
    start = str(config.init_lora_weights).lower()
    if start not in REPEATABLE:
        raise ValueError(
            f"init_lora_weights {start!r} changed the base model by something that is not saved; "
            "save them as a plain LoRA where they were trained, with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    extras = ("modules_to_save", "trainable_token_indices", "target_parameters")
    for name in (*extras, "layer_replication"):
        if getattr(config, name, None):
            raise ValueError(f"these adapters have {name}; {BY_PEFT}")
    if config.bias != "none":
        raise ValueError(f"these adapters have bias {config.bias!r}; {BY_PEFT}")
