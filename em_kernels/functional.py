"""The public functions: check the arguments, cast under autocast, flatten, call the op, reshape."""

from collections.abc import Sequence
from math import inf
from numbers import Real

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import ops
from .reference import TokenStats

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def fused_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    grad_tolerance: float = 0.0,
    chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Entropy of the next-token distributions, straight from the hidden states.

    Equals, without the logits ever being in memory::

        logits = F.linear(hidden, weight, bias).float() * logit_scale
        logits = softcap * torch.tanh(logits / softcap)
        entropy = torch.distributions.Categorical(logits=logits / temperature).entropy()
        loss = (mask * entropy).sum() / mask.sum()

    Args:
        hidden: (..., D) final hidden states; fp32, bf16, fp16, or fp64.
        weight: (V, D) of the output head, as in nn.Linear; hidden's dtype unless autocast is on.
        bias: (V,) or None; a bias of -inf removes a word from the vocabulary.
        mask: (...) bool, int or float weight of each token. Tokens of weight 0 cost nothing and may
            hold NaN.
        temperature: > 0; a number, or (...) one per token. The logits are divided by it.
        reduction: "mean" (divided by the mask's sum; 0 where that is 0), "sum", or "none". Negative
            weights are for "sum" and "none" only.
        logit_scale, softcap: of models that have them (Cohere, Granite; Gemma 2).
        grad_tolerance: in [0, 1): the share of the gradient's L1 mass that a backward may leave
            out; 0 is exact. An upper bound: today's kernels leave nothing out.
        chunk_bytes: memory for the logits held at a time; default 1 GiB or an eighth of the free
            memory, rounded down to a power of two.
        process_group: ranks that hold consecutive rows of the weight each, bias split alike; every
            rank passes the same hidden and gets the same loss and dhidden.

    Returns:
        The loss in nats, fp32 (fp64 for fp64): (), or (...) for "none".

    Gradient: for hidden, weight and bias, equation (8) of ``em_kernels.reference``; computed during
        the forward for "mean" and "sum" (GEMM work 3 times the forward's, 2 with a frozen weight),
        recomputed for "none" (4 times). No second derivatives.
    Precision: logits, statistics and accumulated gradients are fp32 whatever the inputs' dtype;
        gradients are rounded once, to the inputs' dtype (under autocast its own, as nn.Linear's).
    Memory: one chunk, and fp32 gradients of what requires grad; no gradient is kept for what does
        not.
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward.
    Source: One-shot Entropy Minimization, arXiv 2505.20282.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is unknown; use one of {', '.join(REDUCTIONS)}")
    if not 0 <= grad_tolerance < 1:
        raise ValueError(f"grad_tolerance: {grad_tolerance} is not in [0, 1)")
    if reduction == "none":
        entropy = fused_token_stats(
            hidden,
            weight,
            bias=bias,
            mask=mask,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            chunk_bytes=chunk_bytes,
            process_group=process_group,
        ).entropy
        assert entropy is not None
        return entropy if mask is None else mask.to(entropy.dtype) * entropy
    hidden, weight, bias = _check_head(hidden, weight, bias)
    temperatures, scalars = _check_transform(temperature, logit_scale, softcap, hidden)
    _check_mask(mask, hidden)
    loss, *_ = ops.entropy_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        None if mask is None else mask.reshape(-1),
        temperatures,
        scalars,
        reduction == "mean",
        _needs(hidden, weight, bias),
        grad_tolerance,
        _check_chunk(chunk_bytes),
        _group_name(process_group),
    )
    return loss


def fused_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    stats: Sequence[str] | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> TokenStats:
    """Differentiable statistics of each token's next-token distribution, straight from the hidden
    states.

    Equals, without the logits ever being in memory::

        logits = F.linear(hidden, weight, bias).float() / temperature
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        logprob = logp.gather(-1, targets[..., None])[..., 0]
        logsumexp = logits.logsumexp(-1)
        mean_logit = logits.mean(-1)
        log_collision = (2 * logp).logsumexp(-1)
        argmax = logits.argmax(-1)

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, chunk_bytes, process_group: as in
            :func:`fused_entropy_loss`.
        targets: (...) int64, each in [0, V), or -100 for a token without one (logprob 0, no
            gradient).
        stats: names of the fields to return; default entropy, and logprob where there are targets.
        mask: (...) tokens of weight 0 are left out: their statistics are 0, and they may hold NaN.

    Returns:
        TokenStats; each field (...) fp32 in nats (fp64 for fp64), argmax int64, None where not
        asked for.

    Gradient: for hidden, weight and bias, with any upstream per token and statistic; argmax has
        none. The logits are computed again in the backward (GEMM work in all 4 times the
        forward's). No second derivatives.
    Precision: as in :func:`fused_entropy_loss`.
    Memory: chunk_bytes for a slab (all tokens, some words) of logits and of dweight; in the
        backward also an fp32 dhidden beside the returned gradients.
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward.
    Source: equations (1)-(8) of ``em_kernels.reference``.
    """
    default = ("entropy",) if targets is None else ("entropy", "logprob")
    names = default if stats is None else tuple(stats)
    for name in names:
        if name not in TokenStats._fields:
            known = ", ".join(TokenStats._fields)
            raise ValueError(f"stats: {name!r} is unknown; use some of {known}")
    if "logprob" in names and targets is None:
        raise ValueError("stats: logprob needs targets")
    hidden, weight, bias = _check_head(hidden, weight, bias)
    temperatures, scalars = _check_transform(temperature, logit_scale, softcap, hidden)
    _check_mask(mask, hidden)
    _check_targets(targets, hidden)
    found, argmax, *_ = ops.token_stats(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        None if targets is None else targets.reshape(-1),
        None if mask is None else mask.reshape(-1),
        temperatures,
        scalars,
        _needs(hidden, weight, bias),
        _check_chunk(chunk_bytes),
        _group_name(process_group),
    )
    fields = dict(zip(TokenStats._fields, (*found.unbind(0), argmax), strict=True))
    return TokenStats(**{name: fields[name].reshape(hidden.shape[:-1]) for name in names})


def entropy_from_logits(logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy of logits that already exist, without a second tensor of their size in the forward.

    Equals ``torch.distributions.Categorical(logits=logits.float() / temperature).entropy()``, with
    -inf allowed.

    Args:
        logits: (..., V) fp32, bf16, fp16, or fp64.
        temperature: > 0; a number, or (...) one per row.

    Returns:
        (...) entropy in nats, fp32 (fp64 for fp64).

    Gradient: for logits, in their dtype. No second derivatives.
    Precision: fp32 statistics whatever the logits' dtype.
    Memory: 16 MiB of work space; the gradient in the backward; a copy of logits whose leading
        dimensions no view can flatten, such as logits[:, :-1].
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward.
    Source: equations (1)-(3) and (8) of ``em_kernels.reference``.
    """
    _check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected (..., V) with V > 0, got {tuple(logits.shape)}")
    temperatures, scalars = _check_transform(temperature, 1.0, None, logits)
    flat = logits.reshape(-1, logits.shape[-1])
    entropy, *_ = ops.entropy_from_logits(flat, temperatures, scalars[2])
    return entropy.reshape(logits.shape[:-1])


def _check_float(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name}: is a DTensor; pass {name}.full_tensor(), or .to_local() of each rank's rows"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: dtype {x.dtype} is not supported; use fp32, bf16, fp16 or fp64")


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden, weight and bias in one dtype: autocast's where it is on."""
    _check_float("hidden", hidden)
    _check_float("weight", weight)
    if hidden.dim() < 1:
        raise ValueError("hidden: expected (..., D), got a scalar")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected (V, D), got {tuple(weight.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected (V, {hidden.shape[-1]}) to match hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"weight: is empty: {tuple(weight.shape)}")
    if bias is not None:
        _check_float("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected ({len(weight)},), got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{name}: is on {x.device}, hidden on {hidden.device}; move one of them"
            )
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: is {x.dtype}, hidden {hidden.dtype}; cast one, or use autocast"
            )
    return hidden, weight, bias


def _check_per_token(name: str, x: Tensor, rows: Tensor) -> None:
    """x holds one value for each of the rows (..., any), on their device, without grad."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.shape != rows.shape[:-1]:
        raise ValueError(f"{name}: expected exactly {tuple(rows.shape[:-1])}, got {tuple(x.shape)}")
    if x.device != rows.device:
        raise ValueError(f"{name}: is on {x.device}, expected {rows.device}")
    if x.requires_grad:
        raise ValueError(f"{name}: must not require grad; pass {name}.detach()")


def _check_number(name: str, x: float) -> float:
    if not isinstance(x, Real):  # a 0-dim tensor would silently lose its gradient
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    return float(x)


def _check_transform(
    temperature: float | Tensor, logit_scale: float, softcap: float | None, rows: Tensor
) -> tuple[Tensor | None, list[float]]:
    """Temperatures per row or None, and (logit_scale, softcap or 0, temperature)."""
    scale = _check_number("logit_scale", logit_scale)
    if not -inf < scale < inf or scale == 0:
        raise ValueError(f"logit_scale: {logit_scale} is not a finite number other than 0")
    cap = 0.0
    if softcap is not None:
        cap = _check_number("softcap", softcap)
        if not 0 < cap < inf:
            raise ValueError(f"softcap: {softcap} is not > 0 and finite; None is no cap")
    if isinstance(temperature, Tensor):
        if temperature.dim() == 0:
            temperature = temperature.expand(rows.shape[:-1])
        _check_per_token("temperature", temperature, rows)
        if not temperature.is_floating_point():
            raise TypeError(f"temperature: expected a floating dtype, got {temperature.dtype}")
        return temperature.reshape(-1), [scale, cap, 1.0]
    tau = _check_number("temperature", temperature)
    if not 0 < tau < inf:
        raise ValueError(f"temperature: {temperature} is not > 0 and finite")
    return None, [scale, cap, tau]


def _check_mask(mask: Tensor | None, hidden: Tensor) -> None:
    if mask is None:
        return
    _check_per_token("mask", mask, hidden)
    if mask.is_complex():
        raise TypeError(f"mask: expected bool, int or float, got {mask.dtype}")


def _check_targets(targets: Tensor | None, hidden: Tensor) -> None:
    if targets is None:
        return
    _check_per_token("targets", targets, hidden)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")


def _check_chunk(chunk_bytes: int | None) -> int | None:
    if chunk_bytes is None:
        return None
    if not isinstance(chunk_bytes, int):
        raise TypeError(f"chunk_bytes: expected an int, got {type(chunk_bytes).__name__}")
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: {chunk_bytes} is not > 0")
    return chunk_bytes


def _group_name(process_group: ProcessGroup | None) -> str | None:
    if process_group is None:
        return None
    if not isinstance(process_group, ProcessGroup):
        raise TypeError(
            f"process_group: expected a ProcessGroup, got {type(process_group).__name__}"
        )
    return process_group.group_name


def _needs(*tensors: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
