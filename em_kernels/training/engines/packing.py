"""Rows side by side in one, without padding, for flash attention of variable lengths."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...hf import hidden_states
from ..models.loading import FLASH
from ..rollouts.kv_cache import keeps_every_token

PACKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # results of can_pack


def packed_inputs(lengths: Sequence[int], prefix: int, device: torch.device) -> dict[str, Any]:
    """Return a model's inputs beside the ids (1, sum of lengths) of rows that lie side by side,
    each after `prefix` tokens of its own in the KV cache.
    """
    positions = torch.cat([torch.arange(prefix, prefix + length) for length in lengths])
    found: dict[str, Any] = {"position_ids": positions[None].to(device)}
    for side, before in (("q", 0), ("k", prefix)):
        ends = torch.tensor([0, *(before + n for n in lengths)]).cumsum(0, dtype=torch.int32)
        found[f"cu_seq_lens_{side}"] = ends.to(device)
        found[f"max_length_{side}"] = before + max(lengths)
    return found


def behind_prefix(prefix: Tensor, states: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return keys or values (1, heads, tokens, head_dim) with a prefix before each row's."""
    parts = [part for row in states.split(list(lengths), dim=-2) for part in (prefix, row)]
    return torch.cat(parts, dim=-2)


@torch.no_grad()
def can_pack(model: PreTrainedModel) -> bool:
    """Return True if the model computes rows that lie side by side as it does each alone."""
    if model.config._attn_implementation != FLASH or not keeps_every_token(model):
        return False
    if model not in PACKS:
        vocab_size, lengths = model.config.get_text_config().vocab_size, [7, 1, 12]
        ids = torch.arange(2, 22, device=model.device)[None] % vocab_size
        found = hidden_states(model, ids, **packed_inputs(lengths, 0, model.device))[0].float()
        rows = [hidden_states(model, row)[0].float() for row in ids.split(lengths, dim=1)]
        alone = torch.cat(rows)
        error = (found - alone).norm(dim=-1).max() / alone.norm(dim=-1).max()
        PACKS[model] = bool(error <= 0.05)  # bf16 of a deep model
    return PACKS[model]
