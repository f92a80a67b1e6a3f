"""LoRA adapters: where they go, adding and saving them."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ...hf import decoder_of
from ..config import TrainConfig
from ..settings import UserError

ALL = "all-linear"


def adapted_layers(model: PreTrainedModel, config: TrainConfig) -> dict[str, nn.Linear | Conv1D]:
    """Return the linear layers that lora_targets names; UserError if it names anything else."""
    head, modules = model.get_output_embeddings(), dict(model.named_modules())
    decoder = set(decoder_of(model).modules())  # A vision tower's layers are not adapted.
    linear = {n: m for n, m in modules.items() if is_linear(m) and m is not head and m in decoder}
    if config.lora_targets == (ALL,):
        return linear
    found: set[str] = set()
    for target in config.lora_targets:
        named = {name for name in modules if f".{name}".endswith(f".{target}")}  # peft's rule
        if any(modules[name] is head for name in named):
            why = f"{target} is the output head, which the loss reads without adapters"
            raise UserError(f"lora_targets: {why}; leave it out, as {ALL} does")
        if not named or not named <= linear.keys():
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            why = f"{target} names no linear layer; there are {known}"
            raise UserError(f"lora_targets: {why}; or {ALL} alone")
        found |= named
    return {name: layer for name, layer in linear.items() if name in found}


def is_linear(module: nn.Module) -> bool:
    """Return True for a plain matrix product; some routers subclass nn.Linear and do more."""
    kind = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(module, nn.Linear) or kind.__module__.startswith("bitsandbytes"):
        return isinstance(module, nn.Linear)
    zeros = module.weight.detach().new_zeros(1, 1, module.in_features)
    try:
        output = module(zeros)
    except Exception:  # Such a router takes another shape.
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, 1, module.out_features)


def add_adapters(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """Freeze the model and add adapters to its layers, in place, before its first forward.

    They have the dtype that the model computes in: peft's fp32 ones would compute in fp32. Their
    initial values depend on config.seed and that dtype, and do not change the model's output.
    """
    layers = adapted_layers(model, config)
    training = {module for module in model.modules() if module.training}
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about peft's calls of transformers
        torch.random.default_generator.manual_seed(config.seed)  # peft initialises on the CPU.
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    lora.base_model_name_or_path = model.name_or_path or config.model
    if layers.keys() != {n for n, m in model.named_modules() if isinstance(m, LoraLayer)}:
        why = "peft takes some of these names for its fused experts, which are not supported"
        where = f"in a {type(model).__name__}"
        raise UserError(f"lora_targets: {where}, {why}; name layers of its attention only")
    head: Any = model.get_output_embeddings()
    for p in adapted.parameters():
        if p.requires_grad:  # peft leaves those of 4-bit layers in fp32.
            p.data = p.data.to(head.weight.dtype)
    module: Any
    for module in adapted.modules():
        module.training = module in training  # peft's modules start in training mode.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In eval mode bitsandbytes would repack the weights, and lose the gradient.
            module.support_avx512bf16_for_cpu = False
    return adapted


def write_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[Path], None]:
    """Return a function that writes a folder for peft, whose save_pretrained would ask the hub."""

    def write(folder: Path) -> None:
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = dataclasses.replace(model.peft_config["default"], inference_mode=True)
        config.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)

    return write
