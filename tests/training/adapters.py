"""Adapters on tiny models for tests: make them, give them an effect, save them."""

import pytest
import torch
from torch import nn
from training.tiny import make_model, make_tokenizer

from em_kernels import fused_entropy_loss
from em_kernels.hf import head_of, hidden_states
from em_kernels.training.config import TrainConfig
from em_kernels.training.models.lora import adapted_layers, add_adapters, write_adapter

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes needs blocks of 64
ARCHITECTURES = {
    "llama": {"tied": True},
    "qwen2": {"tied": False},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi": {"tied": False},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},  # Its layers are Conv1D.
    "gpt_neox": {"tied": False},
    "mixtral": {"num_local_experts": 2},  # Its experts and their gate are not linear layers.
}
IDS = torch.arange(24).reshape(2, 12)
FP32_AND_BF16 = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"]
)


def lora(**changes):
    return TrainConfig(**{"mode": "lora", "lora_rank": 4, "lora_alpha": 12, **changes})


def wide(kind="llama", **changes):
    return make_model(kind, **{**WIDE, **ARCHITECTURES[kind], **changes})


def error_of(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def planned_count(model, config):
    """Return the adapters' parameter count as a plan computes it, on the meta device too."""
    layers = adapted_layers(model, config).values()
    return config.lora_rank * sum(sum(layer.weight.shape) for layer in layers)


def is_adapter(name):
    return ".lora_A." in name or ".lora_B." in name


def trained(model, config=None):
    """Add adapters and make their second factor, initially zero, random."""
    adapted = add_adapters(model, config or lora())
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter.data, std=0.1)
    return adapted


def saved(adapted, folder):
    folder.mkdir(parents=True)
    write_adapter(adapted, make_tokenizer())(folder)
    return folder


def loss_of(model):
    head = head_of(model)
    hidden = hidden_states(model, IDS)
    return fused_entropy_loss(hidden, head.weight, **head.arguments())
