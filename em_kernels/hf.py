"""Hidden states and head of a transformers causal language model, and the entropy of a batch."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .functional import fused_entropy_loss, fused_token_loss
from .hf_head import Head, active_adapters, adapted_head, head_of, plain_head
from .reference import IGNORE_INDEX, RowTransform, TokenStats, transform

# One lock per model: only one thread at a time may replace its forward.
FORWARD_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
INPUTS = ("input_ids", "attention_mask", "position_ids")  # of a batch, what goes to the model
OVERFLOW = (
    "dtype: this model's activations overflow float16, whose largest number is 65504; "
    "use float32 or bfloat16"
)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the submodule that computes the hidden states which the head reads.

    Raises: TypeError if the architecture does not name it, names its inputs differently, or is an
        encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(
            f"model: {type(model).__name__} is an encoder-decoder; only decoder-only causal "
            "language models are supported"
        )
    try:
        named = model.get_decoder()
    except RecursionError:  # in a few architectures get_decoder() calls itself
        named = model
    for part in (named, getattr(model, "model", None)):
        if isinstance(part, nn.Module) and part is not model and takes(part, *INPUTS[:2]):
            return part
    raise TypeError(
        f"model: {type(model).__name__} does not tell which part computes its hidden states from "
        "input_ids and attention_mask; this architecture is not supported"
    )


def takes(module: nn.Module, *names: str) -> bool:
    """Return True if a module's forward takes inputs of these names, if only as **kwargs."""
    parameters = inspect.signature(module.forward).parameters
    more = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return more or set(names) <= parameters.keys()


def require_gradients(model: PreTrainedModel) -> None:
    """Require gradients of the decoder's and the head's weights only.

    The loss depends on no others: the rest, such as a vision tower, is frozen.

    Raises: TypeError as head_of and decoder_of.
    """
    head_of(model)
    model.requires_grad_(False)
    for part in (decoder_of(model), model.get_output_embeddings()):
        part.requires_grad_(True)


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    past_key_values: Cache | None = None,
    **inputs: Any,
) -> Tensor:
    """Compute the final hidden states (B, T, D), which the head reads.

    Rows may be padded on the right, where causal attention never looks.
    """
    return decoder_of(model)(
        input_ids=input_ids, past_key_values=past_key_values, use_cache=False, **inputs
    ).last_hidden_state


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside its wrappers: PEFT, DDP, FSDP, DeepSpeed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    found = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"model: there is no transformers model in this {type(model).__name__}")
    return found


@contextmanager
def head_reads(model: nn.Module, read: Callable[[Tensor, Head], Tensor]) -> Iterator[None]:
    """Let model(...) return read(hidden states, head) instead of logits within this context.

    A LoRA adapter on the head is part of both, as in :func:`adapted_head`. With
    ``output_router_logits=True`` model(...) returns a second value, the load-balancing loss of a
    mixture of experts.

    `read` runs as the forward of the head's module, within that of the wrapped model, so hooks that
    prepare a module's weights for its forward (FSDP, DeepSpeed ZeRO) or a model for its backward
    (DDP) do their work. Threads take turns; a model(...) call of a thread outside the context
    returns `read`'s result too.
    """
    lm = causal_lm(model)
    layer = lm.get_output_embeddings()
    active_adapters(layer)
    plain_head(lm, getattr(layer, "base_layer", layer))
    if isinstance(model, nn.DataParallel):
        raise TypeError("model: is in nn.DataParallel, which copies it; use one process a GPU")
    decoder = decoder_of(lm)

    def forward(**inputs: Any) -> Any:
        present = {name: value for name, value in inputs.items() if value is not None}
        # The decoder alone takes no images; the model beneath the head merges them into its inputs.
        output = (lm.base_model if "pixel_values" in present else decoder)(**present)
        found = layer(output.last_hidden_state)
        if not present.get("output_router_logits"):
            return found
        return found, router_loss(lm, output.router_logits, present.get("attention_mask"))

    replacements = {lm: forward, layer: lambda hidden: read(*adapted_head(lm, hidden))}
    with FORWARD_LOCKS.setdefault(lm, RLock()):
        originals = {module: vars(module).get("forward") for module in replacements}
        try:
            for module, function in replacements.items():
                module.forward = function
            yield
        finally:
            for module, function in originals.items():
                if function is None:
                    del module.forward
                else:
                    module.forward = function


def router_loss(
    model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None
) -> Tensor:
    """Compute the load-balancing loss () of a mixture of experts, as transformers does."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config: Any = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(  # type: ignore[return-value]
        router_logits, experts, config.num_experts_per_tok, attention_mask
    )


@torch.no_grad()
def check_head(model: nn.Module, head: Head | None = None) -> None:
    """Compare the head's logits with the model's own on 16 tokens; the model may be wrapped.

    Args:
        head: whose logit_scale and softcap are compared; None: as the model's config has them.

    Raises: TypeError if they differ: the loss would be that of another distribution; or if fp16
        activations overflow; or as adapted_head.
    """
    lm = causal_lm(model)
    embedding: Any = lm.get_input_embeddings()
    ids = (
        torch.arange(16, device=embedding.weight.device)[None]
        % lm.config.get_text_config().vocab_size
    )
    seen = [head] if head else list[Head]()

    def read(hidden: Tensor, current: Head) -> Tensor:
        seen.append(current)
        return nn.functional.linear(hidden, current.weight, current.bias)

    with head_reads(model, read):
        y = model(input_ids=ids, use_cache=False)
    expected = model(input_ids=ids, use_cache=False).logits.float()
    row = RowTransform(None, y.new_ones(y.shape[1]).float(), seen[0].logit_scale, seen[0].softcap)
    worst = (transform(y[0].float(), row) - expected[0]).abs().max().item()
    if y.dtype == torch.float16 and expected.isnan().any():
        raise TypeError(OVERFLOW)
    # The model may round its logits to bf16, 2^-8 of their size.
    tolerance = 0.02 if y.dtype.itemsize == 2 else 0.001
    if not worst <= tolerance * max(1.0, expected.abs().max().item()):
        raise TypeError(
            f"model: {type(lm).__name__}'s logits are not its head applied to its hidden states "
            f"(they differ by {worst:.3g}); this architecture is not supported"
        )


def scored_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Return (B, T) bool: the hidden states that score a token counted by :func:`entropy_loss`."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: expected a dict of tensors, got {type(batch).__name__}")
    unknown = sorted(set(batch) - {*INPUTS, "labels"})
    if unknown or "input_ids" not in batch:
        raise ValueError(
            f"batch: has {', '.join(unknown) or 'no input_ids'}; expected input_ids, "
            "and if present attention_mask, position_ids and labels; leave out the rest"
        )
    ids = batch["input_ids"]
    for name, x in batch.items():
        if not isinstance(x, Tensor):
            raise TypeError(
                f"batch: {name} is a {type(x).__name__}; expected a tensor (B, T), as a tokenizer "
                'returns it with return_tensors="pt"'
            )
        if x.shape != ids.shape or x.dim() != 2:
            raise ValueError(f"batch: {name} is {tuple(x.shape)}; expected (B, T), as input_ids")
    seen = batch.get("attention_mask", torch.ones_like(ids)) != 0
    counts = seen & (batch.get("labels", ids) != IGNORE_INDEX)
    scores = seen[:, :-1] & counts[:, 1:]
    if "position_ids" in batch:  # where they restart, the next document of a packed row begins
        positions = batch["position_ids"]
        scores &= positions[:, 1:] > positions[:, :-1]
    return nn.functional.pad(scores, (0, 1))


def next_tokens(batch: Mapping[str, Tensor], scores: Tensor) -> Tensor:
    """Return (B, T) int64: the label of each next token, or else its id; -100 where none counts.

    scores: as :func:`scored_positions` returns them.
    """
    following = batch.get("labels", batch["input_ids"]).roll(-1, 1)
    return following.masked_fill(~scores, IGNORE_INDEX)


def entropy_loss(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    grad_tolerance: float = 0.0,
    chunk_bytes: int | None = None,
    num_items_in_batch: int | Tensor | None = None,
    return_stats: Sequence[str] | None = None,
) -> Any:
    """Average the entropy of the next-token distributions over a batch.

    Equivalent to this, without the logits ever being in memory::

        logits = model(**inputs).logits[:, :-1].float()
        entropy = torch.distributions.Categorical(logits=logits / temperature).entropy()
        counts = labels[:, 1:] != -100
        loss = (counts * entropy).sum() / counts.sum()

    Args:
        model: a transformers causal language model, also as PEFT, DistributedDataParallel,
            fully_shard or DeepSpeed wrap it; its own forward is not called. Under accelerate's
            mixed precision call this within ``accelerator.autocast()``.
        batch: from a collator: input_ids (B, T), and if present attention_mask, position_ids and
            labels. A token counts if its label is not -100, the attention mask covers it and the
            token before it, and position_ids do not restart there, as they do at the first token of
            a packed document.
        temperature, grad_tolerance, chunk_bytes: as in :func:`em_kernels.fused_entropy_loss`.
        num_items_in_batch: the number of tokens that count in all batches that one update
            accumulates: the sum is divided by it, and not by this batch's number.
        return_stats: names of statistics to return from the same pass, as in
            :func:`em_kernels.fused_token_loss`; logprob is that of the label, or else of the token.

    Returns:
        The loss in nats, () fp32 (fp64 for fp64). With return_stats (loss, TokenStats): detached,
        fields (B, T), in place t those of token t + 1, and 0 where that does not count.
        For a mixture of experts whose config has output_router_logits=True, router_aux_loss_coef
        times its load-balancing loss is added, with num_items_in_batch in proportion to the batch's
        tokens that count.

    Gradient, precision, memory: as in :func:`em_kernels.fused_entropy_loss`; with a LoRA adapter on
        the head, as in :func:`adapted_head`. peft's prompt tuning is supported: its virtual tokens,
        before each row, are not scored.
    Raises: ValueError, TypeError naming the argument. A model whose logits are not its head applied
        to its hidden states goes unnoticed here: call :func:`check_head` once.
    """
    lm, mask = causal_lm(model), scored_positions(batch)
    peft_configs = [getattr(m, "active_peft_config", None) for m in model.modules()]
    if "position_ids" in batch and any(getattr(c, "is_prompt_learning", 0) for c in peft_configs):
        raise ValueError(
            "position_ids: peft leaves them out where it adds virtual tokens (prompt tuning); "
            "give rows of one document each, without position_ids"
        )

    def entropy_of(stats: TokenStats, index: Tensor) -> Tensor:
        assert stats.entropy is not None
        return stats.entropy

    shared = {
        "temperature": temperature,
        "grad_tolerance": grad_tolerance,
        "chunk_bytes": chunk_bytes,
    }
    returned: list[TokenStats] = []  # not through the model: wrappers look for gradients there

    def read(hidden: Tensor, head: Head) -> Tensor:
        hidden, counts = hidden[:, -mask.shape[1] :], mask.to(hidden.device)
        given = {**shared, **head.arguments()}
        if return_stats is None:
            reduction = "mean" if num_items_in_batch is None else "sum"
            return fused_entropy_loss(
                hidden, head.weight, mask=counts, reduction=reduction, **given
            )
        weights = counts.to(torch.promote_types(hidden.dtype, torch.float32))
        if num_items_in_batch is None:
            weights = weights / weights.sum().clamp(min=1)
        targets = None  # labels are any numbers: they need not be entries of the vocabulary
        if "logprob" in return_stats:
            targets = next_tokens(batch, mask).to(hidden.device)
        loss, stats, *_ = fused_token_loss(
            hidden,
            head.weight,
            targets,
            entropy_of,
            mask=weights,
            return_stats=return_stats,
            **given,
        )
        returned.append(stats)
        return loss

    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS if name in batch}
    config: Any = lm.config.get_text_config()
    if balances := getattr(config, "output_router_logits", False):
        inputs["output_router_logits"] = True
    with head_reads(model, read):
        found = model(**inputs, use_cache=False)
    loss, balance = found if balances else (found, None)
    share: float | Tensor = 1.0
    if num_items_in_batch is not None:
        total = torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
        loss, share = loss / total, mask.sum().to(loss.device) / total
    if balance is not None:
        loss = loss + config.router_aux_loss_coef * share * balance
    return loss if return_stats is None else (loss, returned[0])
