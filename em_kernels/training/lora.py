"""Low-rank adapters: added to a model, counted, saved, merged; and its frozen base in 4 bits."""

import argparse
import dataclasses
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from ..hf import decoder_of
from .checkpoint import save_checkpoint, write_model
from .config import TrainConfig, UserError
from .records import check_output
from .rounding import to_bf16

ALL = "all-linear"
# init_lora_weights that leave the base model as it was, and those by which peft changes it to the
# same again whenever it makes the adapters; others change it by random numbers or by data
KEEP_BASE = {"true", "false", "gaussian", "eva", "orthogonal"}
REPEAT_BASE = {"pissa", "olora"}
BY_PEFT = "merge them by peft's merge_and_unload"


def adapted_layers(model: PreTrainedModel, config: TrainConfig) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers that lora_targets names; of a model on the meta device too.

    Raises: UserError for a target that names the output head, something else or nothing.
    """
    head, modules = model.get_output_embeddings(), dict(model.named_modules())
    read = set(decoder_of(model).modules())  # not a vision tower's
    linear = {n: m for n, m in modules.items() if is_linear(m) and m is not head and m in read}
    if config.lora_targets == (ALL,):
        return linear
    found: set[str] = set()
    for target in config.lora_targets:
        named = {name for name in modules if f".{name}".endswith(f".{target}")}  # as peft has it
        if any(modules[name] is head for name in named):
            raise UserError(
                f"lora_targets: {target} is the output head, which the loss reads without "
                f"adapters; leave it out, as {ALL} does"
            )
        if not named or not named <= linear.keys():
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(
                f"lora_targets: {target} names no linear layer; there are {known}; or {ALL} alone"
            )
        found |= named
    return {name: layer for name, layer in linear.items() if name in found}


def is_linear(module: nn.Module) -> bool:
    """A matrix product alone, that peft can add to: some routers are nn.Linear and do more."""
    kind = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if not isinstance(module, nn.Linear) or kind.__module__.startswith("bitsandbytes"):
        return isinstance(module, nn.Linear)
    zeros = module.weight.detach().new_zeros(1, 1, module.in_features)
    try:
        found = module(zeros)
    except Exception:  # of such a router, that is given tokens in a row
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, 1, module.out_features)


def add_adapters(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """Freeze the model and put fp32 adapters into its layers, in place, before its first forward.
    They depend on config.seed alone, and start as no change.
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
        warnings.simplefilter("ignore", FutureWarning)  # peft's calls of transformers
        torch.random.default_generator.manual_seed(config.seed)  # peft draws them on the CPU
        adapted = get_peft_model(model, lora)
    lora.base_model_name_or_path = model.name_or_path or config.model
    if layers.keys() != {n for n, m in model.named_modules() if isinstance(m, LoraLayer)}:
        raise UserError(
            f"lora_targets: of a {type(model).__name__} peft adapts the experts instead of "
            "layers named like their former parts; name its attention's layers alone"
        )
    module: Any
    for module in adapted.modules():
        module.training = module in training  # peft's own start in training mode
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else bitsandbytes repacks it in eval mode, and its product has no gradient any more
            module.support_avx512bf16_for_cpu = False
    return adapted


def four_bit_config() -> BitsAndBytesConfig:
    """For from_pretrained: linear layers in NF4, doubly quantised, but for the output head, which
    transformers leaves out by itself, whatever its name.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError("4bit: bitsandbytes is not installed; pip install 'em-kernels[4bit]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def write_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[Path], None]:
    """What fills a folder that peft opens. Its own save_pretrained asks the hub about the base."""

    def write(folder: Path) -> None:
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = dataclasses.replace(model.peft_config["default"], inference_mode=True)
        config.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)

    return write


@torch.no_grad()
def merge(adapter: Path, output: Path) -> Path:
    """Add a checkpoint's adapters (or a run's newest's) to its base's weights, as peft adds them,
    rsLoRA, DoRA and patterns of rank and alpha included: each sum in fp32, rounded to bf16 by
    rounding.py, so that small deltas count. Needs memory for the base and one layer in fp32, twice.

    Raises: UserError; output is written whole or not at all.
    """
    output = output.absolute()
    check_output(output)
    folders = adapter.glob("checkpoints/step-*")
    folder = max(folders, key=lambda path: (len(path.name), path.name), default=adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"merge: {folder} has no adapter_config.json; name a run of mode lora")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        check_mergeable(config)
        weights = load_file(folder / "adapter_model.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        source = str(config.base_model_name_or_path)
        base = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        try:
            model: Any = get_peft_model(base, config)
            fits: Any = set_peft_model_state_dict(model, weights)
        except (RuntimeError, ValueError) as error:  # of shapes, of layers that are not there
            raise ValueError(f"{source} is not their base: {error}") from error
        lacking = [name for name in fits.missing_keys if ".lora_" in name]
        for name in (*fits.unexpected_keys, *lacking):
            raise ValueError(f"{source} and they differ in {name}; is it their base?")
        for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
            inner = layer.get_base_layer()
            if not isinstance(inner, (nn.Linear, Conv1D)):
                raise ValueError(f"one is on a {type(inner).__name__}; {BY_PEFT}")
            inner.weight.data = inner.weight.data.float()
            layer.merge(safe_merge=True)
            inner.weight.data = to_bf16(inner.weight.data.flatten()).view(inner.weight.shape)
        model = model.unload()
    except Exception as error:  # peft, transformers, safetensors and the hub raise many kinds
        raise UserError(f"merge: {folder}: {' '.join(str(error).split())[:300]}") from error
    return save_checkpoint(write_model(model, tokenizer), output)


def check_mergeable(config: PeftConfig) -> None:
    """Raises: ValueError for adapters whose sum with the base would not be the trained model."""
    if not isinstance(config, LoraConfig):
        kind = str(config.peft_type).rpartition(".")[2]
        raise ValueError(f"these adapters are {kind}, not LoRA; {BY_PEFT}")
    start = str(config.init_lora_weights).lower()
    if start not in KEEP_BASE | REPEAT_BASE:
        raise ValueError(
            f"init_lora_weights {start!r} changed the base model by something that is not kept; "
            "save them once more where they were trained, with peft's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), which makes a plain "
            "LoRA of them"
        )
    for name in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if getattr(config, name, None):
            raise ValueError(f"these adapters have {name}; {BY_PEFT}")
    if config.bias != "none":
        raise ValueError(f"these adapters have bias {config.bias!r}; {BY_PEFT}")
    if config.layer_replication:
        raise ValueError(f"these adapters have layer_replication; {BY_PEFT}")


def merge_command(arguments: list[str]) -> int:
    """`em-kernels merge`."""
    parser = argparse.ArgumentParser(
        prog="em-kernels merge",
        description="Write a plain transformers folder, in bf16, of a LoRA run: the base model "
        "with the adapters added to its weights, in fp32, layer by layer. A base held in 4 bits "
        "in training is merged unquantised. Runs on the CPU, in the base model's memory.",
    )
    parser.add_argument("adapter", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    known = parser.parse_args(arguments)
    print(merge(known.adapter, known.output))
    return 0
