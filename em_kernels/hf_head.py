"""The output head of a transformers model, with the LoRA adapters on it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Head(NamedTuple):
    """The output head: logits = softcap * tanh((hidden W^T + b) * logit_scale / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    def arguments(self) -> Mapping[str, Any]:
        """Return all but the weight, as keyword arguments of fused_entropy_loss and its like."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def head_of(model: PreTrainedModel) -> Head:
    """Return the head as the model's config describes it.

    Raises: TypeError if it is not a plain linear layer; a LoRA adapter on it would be silently
        ignored.
    """
    layer = model.get_output_embeddings()
    if hasattr(layer, "base_layer"):
        raise TypeError(
            "model: its head carries an adapter (LoRA); leave lm_head out of target_modules"
        )
    return plain_head(model, layer)


def plain_head(model: PreTrainedModel, layer: nn.Module) -> Head:
    """Return the head that is this layer, without adapters; raises as head_of."""
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():  # quantised
        kind = type(layer).__name__
        raise TypeError(
            f"model: its head is a {kind}, not a plain nn.Linear over the hidden states"
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def adapted_head(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Head]:
    """Return hidden states and head with the LoRA adapters that peft has put on the head.

    Exact, and without merging: the adapters are further columns. Equivalent to this, for a head W,
    bias and one adapter A (r, D), B (V, r) of scaling s::

        hidden = torch.cat((hidden, s * F.linear(dropout(hidden), A)), -1)  # (..., D + r)
        head = Head(torch.cat((W, B), 1), bias, logit_scale, softcap)  # weight (V, D + r)

    Without an adapter, or where peft has disabled or merged it, both are what they were.

    Args:
        model: as in head_of.
        hidden: (..., D), the states that the head reads.

    Gradient: for hidden, A and B, and for W unless it is frozen.
    Memory: a copy of the head's weight, in its dtype, until the backward, and a gradient of that
        size: a head is trained, where without an adapter on it a frozen one costs 2/3 of the work.
    Raises: TypeError as head_of, and for what is not a sum of such products: DoRA and other
        variants, adapters with a bias, tuners other than LoRA.
    """
    layer: Any = model.get_output_embeddings()
    names = active_adapters(layer)
    head = plain_head(model, getattr(layer, "base_layer", layer))
    states, columns = [hidden], [head.weight]
    for name in names:
        a, b = layer.lora_A[name], layer.lora_B[name]
        inner = a(layer.lora_dropout[name](hidden.to(a.weight.dtype)))
        states.append((layer.scaling[name] * inner).to(hidden.dtype))
        # B as b's own forward returns it: FSDP may hold b apart from the head.
        identity = torch.eye(a.out_features, dtype=inner.dtype, device=inner.device)
        columns.append(b(identity).T.to(head.weight.dtype))
    if not names:
        return hidden, head
    return torch.cat(states, -1), head._replace(weight=torch.cat(columns, 1))


def active_adapters(layer: Any) -> list[str]:
    """Return the names of the LoRA adapters that a head's layer adds to its own product.

    Raises: TypeError as adapted_head.
    """
    if not hasattr(layer, "base_layer"):
        return []
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(layer).__mro__}
    if "peft.tuners.lora.layer.Linear" not in kinds:  # FSDP derives a class of its own
        raise TypeError(
            "model: its head carries an adapter other than peft's LoRA of a linear layer; "
            "leave lm_head out of target_modules"
        )
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as peft does in this layer's forward
    if layer.disable_adapters or layer.merged:
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        if name in layer.lora_variant or layer.lora_B[name].bias is not None:
            raise TypeError(
                f"model: its head's adapter {name} is a variant of LoRA (such as DoRA) or has a "
                "bias; use plain LoRA there, or leave lm_head out of target_modules"
            )
    if names and hasattr(layer.base_layer.weight, "ds_id"):
        raise TypeError(
            "model: its head carries an adapter, and DeepSpeed ZeRO-3 holds its weight in parts; "
            "use ZeRO-2 or FSDP2, or leave lm_head out of target_modules"
        )
    return names
