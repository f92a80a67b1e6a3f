"""torch.library: schemas, fakes and autograd of the chunked loops. Opaque to torch.compile.

At this boundary a transform is (logit_scale, softcap or 0, temperature) and, where it is per token,
a tensor of temperatures; needs are (hidden, weight, bias); a process group travels by its name.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from . import chunked
from . import logits as logits_entropy
from .chunked import Needs, Transform
from .gemm import accumulation_dtype
from .parallel import VocabularyShard
from .rows.cpu import is_built


def _transform(
    scalars: Sequence[float], bias: Tensor | None, temperatures: Tensor | None
) -> Transform:
    logit_scale, softcap, temperature = scalars
    return Transform(
        bias, temperature if temperatures is None else temperatures, logit_scale, softcap or None
    )


def _shard(group: str | None, weight: Tensor) -> VocabularyShard | None:
    if group is None:
        return None
    resolved = distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return VocabularyShard(resolved, len(weight), weight.device)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "em_kernels has no second derivatives: call backward without create_graph, "
            "or use em_kernels.reference"
        )


@torch.library.custom_op("em_kernels::entropy_loss", mutates_args=())
def entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    transform: Sequence[float],
    mean: bool,
    needs: Sequence[bool],
    grad_tolerance: float,
    chunk_bytes: int | None,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), and its gradients dhidden, dweight, dbias in the accumulation dtype."""
    return chunked.entropy_loss(
        hidden,
        weight,
        _transform(transform, bias, temperatures),
        mask,
        mean=mean,
        needs=Needs(*needs),
        chunk_bytes=chunk_bytes,
        shard=_shard(group, weight),
    )


@entropy_loss.register_fake
def _(
    hidden,
    weight,
    bias,
    mask,
    temperatures,
    transform,
    mean,
    needs,
    grad_tolerance,
    chunk_bytes,
    group,
):
    wide = accumulation_dtype(hidden.dtype)
    shapes = ((), hidden.shape, weight.shape, weight.shape[:1])
    wanted = (True, *needs)
    return tuple(
        hidden.new_empty(shape if want else (0,), dtype=wide)
        for shape, want in zip(shapes, wanted, strict=True)
    )


def _entropy_loss_setup(ctx, inputs, output) -> None:
    hidden, weight, bias = inputs[:3]
    _, dh, dw, db = output
    ctx.mark_non_differentiable(dh, dw, db)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dh, dw, db)
    ctx.needs = inputs[7]
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]


def _scaled(saved: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * upstream, rounded once; on a GPU without an fp32 product of its size in memory."""
    return torch.mul(saved, upstream, out=torch.empty_like(saved, dtype=dtype))


def _entropy_loss_backward(ctx, upstream, *_):
    _refuse_double_backward()
    gradients = [
        _scaled(saved, upstream, dtype) if need and upstream is not None else None
        for saved, need, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
    ]
    return *gradients, *(None,) * 8


entropy_loss.register_autograd(_entropy_loss_backward, setup_context=_entropy_loss_setup)


@torch.library.custom_op("em_kernels::token_stats", mutates_args=())
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    transform: Sequence[float],
    needs: Sequence[bool],
    chunk_bytes: int | None,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics (5, N) in TokenStats' order, argmax (N,), and for the backward m and log s
    (N,).
    """
    return chunked.token_stats(
        hidden,
        weight,
        _transform(transform, bias, temperatures),
        targets,
        mask,
        chunk_bytes=chunk_bytes,
        shard=_shard(group, weight),
    )


@token_stats.register_fake
def _(hidden, weight, bias, targets, mask, temperatures, transform, needs, chunk_bytes, group):
    wide = accumulation_dtype(hidden.dtype)
    count = hidden.shape[0]
    return (
        hidden.new_empty(5, count, dtype=wide),
        hidden.new_empty(count, dtype=torch.int64),
        hidden.new_empty(count, dtype=wide),
        hidden.new_empty(count, dtype=wide),
    )


@torch.library.custom_op("em_kernels::token_stats_backward", mutates_args=())
def token_stats_backward(
    upstream: Tensor,
    statistics: Tensor,
    m: Tensor,
    log_s: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    transform: Sequence[float],
    needs: Sequence[bool],
    chunk_bytes: int | None,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias in the inputs' dtypes."""
    return chunked.token_stats_backward(
        upstream,
        statistics,
        m,
        log_s,
        hidden,
        weight,
        _transform(transform, bias, temperatures),
        targets,
        mask,
        needs=Needs(*needs),
        chunk_bytes=chunk_bytes,
        shard=_shard(group, weight),
    )


@token_stats_backward.register_fake
def _(
    upstream,
    statistics,
    m,
    log_s,
    hidden,
    weight,
    bias,
    targets,
    mask,
    temperatures,
    transform,
    needs,
    chunk_bytes,
    group,
):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        like.new_empty(shape if need else (0,))
        for like, shape, need in zip((hidden, weight, weight), shapes, needs, strict=True)
    )


def _token_stats_setup(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, mask, temperatures, *ctx.settings = inputs
    statistics, argmax, m, log_s = output
    ctx.mark_non_differentiable(argmax, m, log_s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(statistics, m, log_s, hidden, weight, bias, targets, mask, temperatures)


def _token_stats_backward(ctx, upstream, *_):
    _refuse_double_backward()
    if upstream is None:
        return (None,) * 10
    needs = ctx.settings[1]
    gradients = token_stats_backward(upstream, *ctx.saved_tensors, *ctx.settings)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *(None,) * 7


token_stats.register_autograd(_token_stats_backward, setup_context=_token_stats_setup)


@torch.library.custom_op("em_kernels::entropy_from_logits", mutates_args=())
def entropy_from_logits(
    logits: Tensor, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, m and log s of logits (N, V), each (N,)."""
    return logits_entropy.entropy(logits, temperature if temperatures is None else temperatures)


@entropy_from_logits.register_fake
def _(logits, temperatures, temperature):
    wide = accumulation_dtype(logits.dtype)
    return tuple(logits.new_empty(logits.shape[:1], dtype=wide) for _ in range(3))


@torch.library.custom_op("em_kernels::entropy_from_logits_backward", mutates_args=())
def entropy_from_logits_backward(
    upstream: Tensor,
    entropy: Tensor,
    m: Tensor,
    log_s: Tensor,
    logits: Tensor,
    temperatures: Tensor | None,
    temperature: float,
) -> Tensor:
    """dlogits (N, V) in the logits' dtype."""
    tau = temperature if temperatures is None else temperatures
    return logits_entropy.entropy_backward(upstream, entropy, m, log_s, logits, tau)


@entropy_from_logits_backward.register_fake
def _(upstream, entropy, m, log_s, logits, temperatures, temperature):
    return torch.empty_like(logits)


def _entropy_from_logits_setup(ctx, inputs, output) -> None:
    logits, temperatures, ctx.temperature = inputs
    entropy, m, log_s = output
    ctx.mark_non_differentiable(m, log_s)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(entropy, m, log_s, logits, temperatures)


def _entropy_from_logits_backward(ctx, upstream, *_):
    _refuse_double_backward()
    if upstream is None:
        return None, None, None
    return entropy_from_logits_backward(upstream, *ctx.saved_tensors, ctx.temperature), None, None


entropy_from_logits.register_autograd(
    _entropy_from_logits_backward, setup_context=_entropy_from_logits_setup
)


if is_built():  # the op itself is in csrc/gemm_bf16.cpp

    @torch.library.register_fake("em_kernels::gemm_bf16")
    def _(out, a, b, accumulate, isa):
        return None
