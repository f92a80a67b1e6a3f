"""Hidden states and head of a transformers causal language model, and the entropy of a batch."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .functional import fused_entropy_loss
from .reference import IGNORE_INDEX, RowTransform, transform

READING: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # a model's lock
INPUTS = ("input_ids", "attention_mask", "position_ids")  # of a batch, that the model is given


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


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part that computes the hidden states which the head reads.

    Raises: TypeError where the architecture does not name it, or gives its inputs other names.
    """
    try:
        named = model.get_decoder()
    except RecursionError:  # a few ask themselves
        named = model
    for part in (named, getattr(model, "model", None)):
        if isinstance(part, nn.Module) and part is not model and takes(part, *INPUTS[:2]):
            return part
    raise TypeError(
        f"model: {type(model).__name__} does not tell which part computes its hidden states from "
        "input_ids and attention_mask; this architecture is not supported"
    )


def takes(module: nn.Module, *names: str) -> bool:
    """True if a module's forward has inputs with these names."""
    parameters = inspect.signature(module.forward).parameters
    more = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return more or set(names) <= parameters.keys()


def require_gradients(model: PreTrainedModel) -> None:
    """Require gradients of the decoder's and the head's weights, all that the loss depends on; the
    rest, such as a vision tower, is frozen.

    Raises: TypeError as head_of and decoder_of.
    """
    head_of(model)
    model.requires_grad_(False)
    for part in (decoder_of(model), model.get_output_embeddings()):
        part.requires_grad_(True)


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, past_key_values: Cache | None = None
) -> Tensor:
    """Final hidden states (B, T, D): what the head reads. Rows may be padded on the right: causal
    attention never looks there.
    """
    return decoder_of(model)(
        input_ids=input_ids, past_key_values=past_key_values, use_cache=False
    ).last_hidden_state


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside its wrappers: PEFT, DDP, FSDP, DeepSpeed."""
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"model: there is no transformers model in this {type(model).__name__}")
    return found


@contextmanager
def head_reads(model: nn.Module, read: Callable[[Tensor, Head], Tensor]) -> Iterator[None]:
    """While it lasts, model(...) returns read(hidden states, head) in place of logits.

    The head's module is called and `read` runs as its forward, within that of the wrapped model:
    whatever prepares a module's weights for its forward (FSDP, DeepSpeed ZeRO), or a model for its
    backward (DDP), does so here. Threads take turns; model(...) of another thread meanwhile is read
    as well.
    """
    lm = causal_lm(model)
    head_of(lm)
    if isinstance(model, nn.DataParallel):
        raise TypeError("model: is in nn.DataParallel, which copies it; use one process a GPU")
    layer = lm.get_output_embeddings()

    def forward(**inputs: Any) -> Tensor:
        given = {name: value for name, value in inputs.items() if value is not None}
        return layer(decoder_of(lm)(**given).last_hidden_state)

    modules = {lm: forward, layer: lambda hidden: read(hidden, head_of(lm))}
    with READING.setdefault(lm, RLock()):
        before = {module: vars(module).get("forward") for module in modules}
        try:
            for module, function in modules.items():
                module.forward = function
            yield
        finally:
            for module, function in before.items():
                if function is None:
                    del module.forward
                else:
                    module.forward = function


@torch.no_grad()
def check_head(model: nn.Module, head: Head) -> None:
    """Compare the head as described with the model's own logits, on 16 tokens; the model may be
    wrapped.

    Raises: TypeError where they differ: the loss would be of another distribution than the model's.
    """
    words = causal_lm(model).config.get_text_config().vocab_size
    ids = torch.arange(16, device=head.weight.device)[None] % words

    def read(hidden: Tensor, own: Head) -> Tensor:
        return nn.functional.linear(hidden, own.weight, own.bias)

    expected = model(input_ids=ids, use_cache=False).logits.float()
    with head_reads(model, read):
        y = model(input_ids=ids, use_cache=False)
    row = RowTransform(None, y.new_ones(y.shape[1]).float(), head.logit_scale, head.softcap)
    worst = (transform(y[0].float(), row) - expected[0]).abs().max().item()
    # 16-bit logits are rounded to 2^-8 of their size
    tolerance = 0.02 if y.dtype.itemsize == 2 else 0.001
    if not worst <= tolerance * max(1.0, expected.abs().max().item()):
        raise TypeError(
            f"model: {type(causal_lm(model)).__name__}'s logits are not its head applied to its "
            f"hidden states (they differ by {worst:.3g}); this architecture is not supported"
        )


def scored_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T) bool: which hidden states score a token that counts in :func:`entropy_loss`."""
    unknown = sorted(set(batch) - {*INPUTS, "labels"})
    if unknown or "input_ids" not in batch:
        raise ValueError(
            f"batch: has {', '.join(unknown) or 'no input_ids'}; expected input_ids, and of "
            "attention_mask, position_ids and labels what there is; leave out the rest"
        )
    ids = batch["input_ids"]
    for name, x in batch.items():
        if x.shape != ids.shape or x.dim() != 2:
            raise ValueError(f"batch: {name} is {tuple(x.shape)}; expected (B, T), as input_ids")
    seen = batch.get("attention_mask", torch.ones_like(ids)) != 0
    counts = seen & (batch.get("labels", ids) != IGNORE_INDEX)
    return nn.functional.pad(seen[:, :-1] & counts[:, 1:], (0, 1))


def entropy_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    grad_tolerance: float = 0.0,
    chunk_bytes: int | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Mean entropy of the next-token distributions over a batch, without its logits in memory.

    Equals::

        logits = model(**inputs).logits[:, :-1].float()
        entropy = torch.distributions.Categorical(logits=logits / temperature).entropy()
        counts = labels[:, 1:] != -100
        loss = (counts * entropy).sum() / counts.sum()

    Args:
        model: a transformers causal language model, also as PEFT, DistributedDataParallel,
            fully_shard or DeepSpeed wrap it; its own forward is not called. Under accelerate's
            mixed precision call this within ``accelerator.autocast()``.
        batch: as a collator gives it: input_ids (B, T), and what there is of attention_mask,
            position_ids and labels. A token counts where its label is not -100 and the mask has it
            and the one before it.
        temperature, grad_tolerance, chunk_bytes: as in :func:`em_kernels.fused_entropy_loss`.
        num_items_in_batch: what the sum is divided by in place of the tokens that count here: those
            of all batches that one update accumulates.

    Returns:
        The loss in nats, () fp32 (fp64 for fp64).

    Gradient, precision, memory: as in :func:`em_kernels.fused_entropy_loss`.
    Raises: ValueError, TypeError naming the argument. A model whose logits are not its head applied
        to its hidden states is not noticed here: ask :func:`check_head` once.
    """
    mask = scored_positions(batch)

    def read(hidden: Tensor, head: Head) -> Tensor:
        return fused_entropy_loss(
            hidden,
            head.weight,
            mask=mask.to(hidden.device),
            temperature=temperature,
            reduction="mean" if num_items_in_batch is None else "sum",
            grad_tolerance=grad_tolerance,
            chunk_bytes=chunk_bytes,
            **head.arguments(),
        )

    inputs = {name: batch[name] for name in INPUTS if name in batch}
    with head_reads(model, read):
        loss = model(**inputs, use_cache=False)
    if num_items_in_batch is None:
        return loss
    return loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
