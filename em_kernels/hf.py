"""Hidden states and head of a transformers causal language model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .reference import RowTransform, transform


class Head(NamedTuple):
    """The output head: logits = softcap * tanh((hidden W^T + b) * logit_scale / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    def arguments(self) -> Mapping[str, Any]:
        """Keyword arguments for fused_entropy_loss and fused_token_stats, weight apart."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def head_of(model: PreTrainedModel) -> Head:
    """The head as the model's config describes it.

    Raises: TypeError where it is not a plain linear layer; a LoRA adapter on the head would be
        silently ignored.
    """
    layer = model.get_output_embeddings()
    if hasattr(layer, "base_layer"):
        raise TypeError(
            "model: its head carries an adapter (LoRA); leave lm_head out of target_modules"
        )
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():  # quantised
        kind = type(layer).__name__
        raise TypeError(
            f"model: its head is a {kind}, not a plain nn.Linear over the hidden states"
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, past_key_values: Cache | None = None
) -> Tensor:
    """Final hidden states (B, T, D): what the head reads. Rows may be padded on the right: causal
    attention never looks there.
    """
    backbone = model.get_decoder()
    return backbone(
        input_ids=input_ids, past_key_values=past_key_values, use_cache=False
    ).last_hidden_state


@torch.no_grad()
def check_head(model: PreTrainedModel, head: Head) -> None:
    """Compare hidden @ head with the model's own logits on 16 tokens.

    Raises: TypeError where they differ: the loss would be of another distribution than the model's.
    """
    ids = torch.arange(16, device=head.weight.device)[None] % head.weight.shape[0]
    expected = model(input_ids=ids, use_cache=False).logits.float()
    y = nn.functional.linear(hidden_states(model, ids), head.weight, head.bias).float()
    row = RowTransform(None, y.new_ones(y.shape[1]), head.logit_scale, head.softcap)
    worst = (transform(y[0], row) - expected[0]).abs().max().item()
    # 16-bit logits are rounded to 2^-8 of their size
    tolerance = 0.02 if head.weight.dtype.itemsize == 2 else 0.001
    if not worst <= tolerance * max(1.0, expected.abs().max().item()):
        raise TypeError(
            f"model: {type(model).__name__}'s logits are not its head applied to its hidden states "
            f"(they differ by {worst:.3g}); this architecture is not supported"
        )
