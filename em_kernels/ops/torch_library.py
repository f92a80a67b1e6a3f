"""torch.library: schemas, fakes and autograd of the loops. Opaque to torch.compile.

At this boundary a transform is (logit_scale, softcap or 0, temperature) and, where it is per token,
a tensor of temperatures; needs are (hidden, weight, bias); a process group travels by its name.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from ..kernels.cpu import is_built
from ..reference import IGNORE_INDEX, TokenStats
from . import chunked, saved_gradients, vocab_slabs
from . import from_logits as logits_entropy
from .gemm import accumulation_dtype
from .gradients import Gradients, Sink
from .inputs import Needs, Problem
from .vocab_parallel import VocabularyShard


def _problem(
    path: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    transform: Sequence[float],
    chunk_bytes: int | None,
    group: str | None,
    grad_tolerance: float = 0.0,
) -> Problem:
    logit_scale, softcap, temperature = transform
    shard = None
    if group is not None:
        resolved = distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
        shard = VocabularyShard(resolved, len(weight), weight.device, path)
    return Problem(
        hidden,
        weight,
        bias,
        temperature if temperatures is None else temperatures,
        logit_scale,
        softcap or None,
        targets,
        mask,
        chunk_bytes,
        grad_tolerance,
        shard,
    )


@torch.library.custom_op("em_kernels::entropy_loss", mutates_args=())
def entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    transform: Sequence[float],
    chunk_bytes: int | None,
    group: str | None,
    grad_tolerance: float,
    mean: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (), and gradients.Gradients: dhidden, dweight, dbias, words, report."""
    problem = _problem(
        needs[0] + 2 * needs[1],
        hidden,
        weight,
        bias,
        None,
        mask,
        temperatures,
        transform,
        chunk_bytes,
        group,
        grad_tolerance,
    )
    loss, gradients = chunked.entropy_loss(problem, mean, Needs(*needs))
    return loss, *gradients


@entropy_loss.register_fake
def _(
    hidden,
    weight,
    bias,
    mask,
    temperatures,
    transform,
    chunk_bytes,
    group,
    grad_tolerance,
    mean,
    needs,
):
    wide = accumulation_dtype(hidden.dtype)
    rows, words = weight.shape[0], 0
    if grad_tolerance > 0 and needs[1]:
        context = torch.library.get_ctx()
        rows, words = context.new_dynamic_size(), context.new_dynamic_size()
    shapes = (hidden.shape, (rows, weight.shape[1]), weight.shape[:1])
    return (
        hidden.new_empty((), dtype=wide),
        *(
            hidden.new_empty(shape if need else (0,), dtype=wide)
            for shape, need in zip(shapes, needs, strict=True)
        ),
        hidden.new_empty(words, dtype=torch.int64),
        hidden.new_empty(2, dtype=wide),
    )


def _entropy_loss_setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    tolerance, _, needs = inputs[8:]
    saved_gradients.save_gradients(ctx, inputs[:3], needs, tolerance, output[1:])


@torch.library.custom_op("em_kernels::scaled_rows", mutates_args=())
def scaled_rows(
    values: Tensor, words: Tensor, upstream: Tensor, vocab_size: int, dtype: torch.dtype
) -> Tensor:
    """saved.scaled_rows, of which the compiler knows no K."""
    return saved_gradients.scaled_rows(values, words, upstream, vocab_size, dtype)


@scaled_rows.register_fake
def _(values, words, upstream, vocab_size, dtype):
    return values.new_empty((vocab_size, values.shape[1]), dtype=dtype)


def _entropy_loss_backward(ctx, upstream, *_):
    return *saved_gradients.saved_gradients(ctx, upstream), *(None,) * 8


entropy_loss.register_autograd(_entropy_loss_backward, setup_context=_entropy_loss_setup)


def entropy_loss_into(
    sink: Sink | None, mean: bool, needs: Sequence[bool], *arguments
) -> tuple[Tensor, Gradients]:
    """chunked.entropy_loss as it is; no op of torch.library can take a sink."""
    problem = _problem(int(needs[0]), *arguments)
    return chunked.entropy_loss(problem, mean, Needs(*needs), sink)


class TokenLoss(torch.autograd.Function):
    """chunked.token_loss; no op of torch.library can take a function."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss_fn: Callable[[TokenStats, Tensor], Tensor],
        grad_enabled: bool,
        needs: Sequence[bool],
        *settings,
    ) -> Tensor:
        problem = _problem(needs[0] + 2 * needs[1], hidden, weight, bias, *settings)
        loss, gradients = chunked.token_loss(problem, loss_fn, Needs(*needs), grad_enabled)
        saved_gradients.save_gradients(
            ctx, (hidden, weight, bias), needs, problem.grad_tolerance, gradients
        )
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return *saved_gradients.saved_gradients(ctx, upstream), *(None,) * 10


@torch.library.custom_op("em_kernels::token_stats", mutates_args=())
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    transform: Sequence[float],
    chunk_bytes: int | None,
    group: str | None,
    needs: Sequence[bool],
    everything: bool,
    unit: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics (5, N) in TokenStats' order and argmax (N,), without everything (3, N) and (0,);
    and for the backward m and log s (N,), or with unit >= 0 the gradient (N, D) of that statistic
    alone for hidden.
    """
    problem = _problem(
        2 * (unit + 1) + needs[0],
        hidden,
        weight,
        bias,
        targets,
        mask,
        temperatures,
        transform,
        chunk_bytes,
        group,
    )
    if unit < 0:
        return *vocab_slabs.token_stats(problem, everything), hidden.new_empty(
            0, dtype=problem.dtype
        )
    statistics, argmax, dh = chunked.token_stats_and_unit_gradient(
        problem, TokenStats._fields[unit], everything
    )
    return statistics, argmax, statistics.new_empty(0), statistics.new_empty(0), dh


@token_stats.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    mask,
    temperatures,
    transform,
    chunk_bytes,
    group,
    needs,
    everything,
    unit,
):
    wide = accumulation_dtype(hidden.dtype)
    count = hidden.shape[0]
    return (
        hidden.new_empty(5 if everything else 3, count, dtype=wide),
        hidden.new_empty(count if everything else 0, dtype=torch.int64),
        hidden.new_empty(count if unit < 0 else 0, dtype=wide),
        hidden.new_empty(count if unit < 0 else 0, dtype=wide),
        hidden.new_empty(0 if unit < 0 else hidden.shape, dtype=wide),
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
    chunk_bytes: int | None,
    group: str | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias in the inputs' dtypes."""
    problem = _problem(
        int(needs[0]),
        hidden,
        weight,
        bias,
        targets,
        mask,
        temperatures,
        transform,
        chunk_bytes,
        group,
    )
    return vocab_slabs.token_stats_backward(problem, upstream, statistics, m, log_s, Needs(*needs))


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
    chunk_bytes,
    group,
    needs,
):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        like.new_empty(shape if need else (0,))
        for like, shape, need in zip((hidden, weight, weight), shapes, needs, strict=True)
    )


def _token_stats_setup(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, mask, temperatures, *ctx.settings = inputs
    statistics, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    _, m, log_s, dh = others
    ctx.dtype = hidden.dtype
    if ctx.settings[-1] >= 0:  # the gradient is made: nothing holds hidden and weight
        ctx.save_for_backward(dh, targets, mask)
        return
    tensors = (hidden, weight, bias, targets, mask, temperatures)
    ctx.save_for_backward(statistics, m, log_s, *tensors)


def _token_stats_backward(ctx, upstream, *_):
    saved_gradients.refuse_double_backward()
    nothing = (None,) * 12
    if upstream is None:
        return nothing
    *settings, needs, _, unit = ctx.settings
    if unit >= 0:
        dh, targets, mask = ctx.saved_tensors
        factors = upstream[unit]
        if mask is not None:  # not even NaN reaches a token that was left out
            factors = factors.masked_fill(mask == 0, 0)
        if targets is not None and TokenStats._fields[unit] == "logprob":
            factors = factors.masked_fill(targets == IGNORE_INDEX, 0)
        scaled = torch.mul(dh, factors[:, None], out=torch.empty_like(dh, dtype=ctx.dtype))
        return scaled, *nothing[1:]
    gradients = token_stats_backward(upstream, *ctx.saved_tensors, *settings, needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *nothing[3:]


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
    saved_gradients.refuse_double_backward()
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
