"""torch.library ops over the loops, with schemas, fakes and autograd; opaque to torch.compile.

Every op of the head begins with the fields of checks.HeadArguments, in their order; `needs` says
whether the gradients of hidden, weight and bias are wanted.
"""

import torch
from torch import Tensor

from ..kernels.cpu import is_built
from ..reference import IGNORE_INDEX, TokenStats
from . import chunked, from_logits, gathered, saved_gradients, vocab_slabs
from .checks import HeadArguments
from .from_logits import LogitsEntropy
from .gemm import accumulation_dtype, operand_dtype
from .inputs import GradMask, SavedStats, StatsOutput, build_inputs
from .support import Support

HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? targets, Tensor? mask, "
    "Tensor? temperatures, float[] transform, SymInt? chunk_bytes, str? group"
)
SUPPORT_SCHEMA = "Tensor? support_indices, Tensor? support_offsets"
HEAD_SIZE: int = len(HeadArguments._fields)
# Of ops that read counts or scales on the host, which a recorded CUDA graph would not do again.
READS_ON_HOST: tuple[torch.Tag, ...] = (torch.Tag.cudagraph_unsafe,)
NO_GRADIENT = (None,) * (HEAD_SIZE - 3)  # for all of the head but hidden, weight and bias


@torch.library.custom_op(
    "em_kernels::entropy_loss",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, float grad_tolerance, bool mean, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=READS_ON_HOST,
)
def entropy_loss_op(*arguments):
    """Return the loss (), and the fields of gradients.Gradients."""
    *head, grad_tolerance, mean, needs = arguments
    inputs = build_inputs(HeadArguments(*head), needs[0] + 2 * needs[1], grad_tolerance, needs)
    loss, gradients = chunked.sum_entropy(inputs, mean, GradMask(*needs), keep_dy=True)
    return loss, *gradients


@entropy_loss_op.register_fake
def _(hidden, weight, *others):
    return fake_loss_and_gradients(hidden, weight, others[-1])


def fake_loss_and_gradients(hidden, weight, needs):
    wide = accumulation_dtype(hidden.dtype)
    rows = indices = dy_rows = dy_columns = chunks = 0
    if needs[1]:  # dweight, its rows that are not 0, or dy: the values of the inputs decide
        new_size = torch.library.get_ctx().new_dynamic_size
        rows, indices, dy_rows, dy_columns, chunks = (new_size() for _ in range(5))
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if needs[0] else (0,), dtype=wide),
        hidden.new_empty((rows, weight.shape[1]) if needs[1] else (0,), dtype=wide),
        hidden.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=wide),
        hidden.new_empty(indices, dtype=torch.int64),
        hidden.new_empty((dy_rows, dy_columns), dtype=operand_dtype(weight)),
        hidden.new_empty((chunks, 2), dtype=torch.float64, device="cpu"),
        hidden.new_empty(2, dtype=wide),
    )


def _entropy_loss_setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    grad_tolerance, _, needs = inputs[HEAD_SIZE:]
    head = HeadArguments(*inputs[:HEAD_SIZE])
    saved_gradients.save_gradients(ctx, head, grad_tolerance, needs, output[1:])


def _entropy_loss_backward(ctx, upstream, *_):
    return *saved_gradients.saved_gradients(ctx, upstream), *NO_GRADIENT, None, None, None


entropy_loss_op.register_autograd(_entropy_loss_backward, setup_context=_entropy_loss_setup)


# An op, as the compiler does not know the sizes of what the forward has saved.
weight_gradient_op = torch.library.custom_op(
    "em_kernels::weight_gradient",
    saved_gradients.weight_gradient,
    mutates_args=(),
    tags=READS_ON_HOST,
)


@weight_gradient_op.register_fake
def _(dw, vocab_indices, dy, dy_scales, hidden, mask, upstream, vocab_size, dtype):
    return dw.new_empty((vocab_size, dw.shape[1]), dtype=dtype)


class TokenLoss(torch.autograd.Function):
    """Sum of a caller's loss; no op, as torch.library cannot pass the caller's function.

    Returns the loss (), and dicts of detached tensors (N,): statistics and the function's extras.
    """

    @staticmethod
    def forward(ctx, *given) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        *head, grad_tolerance, needs, loss_fn, grad_enabled, return_stats, top_k = given
        arguments = HeadArguments(*head)
        collectives = hash((needs[0] + 2 * needs[1], top_k))
        inputs = build_inputs(arguments, collectives, grad_tolerance, needs)
        loss, gradients, stats, extras = chunked.sum_custom_loss(
            inputs, loss_fn, GradMask(*needs), grad_enabled, True, return_stats, top_k
        )
        saved_gradients.save_gradients(ctx, arguments, grad_tolerance, needs, gradients)
        return loss, stats, extras

    @staticmethod
    def backward(ctx, upstream, *_):
        return *saved_gradients.saved_gradients(ctx, upstream), *NO_GRADIENT, *(None,) * 6


@torch.library.custom_op(
    "em_kernels::token_stats",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, bool[] needs, bool with_collision_and_argmax, int single_stat_index,"
    f" int top_k, {SUPPORT_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=READS_ON_HOST,
)
def token_stats_op(*arguments):
    """Return the fields of inputs.StatsOutput.

    single_stat_index >= 0 asks for dhidden of that statistic, < 0 for m and log s.
    """
    *head, needs, with_collision_and_argmax, single_stat_index, top_k, indices, offsets = arguments
    collectives = hash((single_stat_index, needs[0], with_collision_and_argmax, top_k))
    inputs = build_inputs(HeadArguments(*head), collectives)
    inputs.check_top_k(top_k)
    inputs, is_sparse = _with_support(inputs, indices, offsets)
    if inputs.support is not None:
        inputs.support.check(inputs.vocab_size, inputs.targets, inputs.mask)
    if is_sparse:
        return gathered.token_stats(inputs, any(needs))
    if single_stat_index < 0:
        return vocab_slabs.token_stats(inputs, with_collision_and_argmax, any(needs), top_k)
    name = TokenStats._fields[single_stat_index]
    return chunked.token_stats_with_gradient(inputs, name, with_collision_and_argmax)


def _with_support(inputs, indices, offsets):
    """Return the inputs with their support, if any, and whether only its logits are computed."""
    if indices is None:
        return inputs, False
    inputs = inputs._replace(support=Support(indices, offsets))
    return inputs, inputs.support.is_sparse(inputs.vocab_size)


@token_stats_op.register_fake
def _(hidden, weight, bias, targets, *others):
    *_, needs, with_collision_and_argmax, single_stat_index, top_k, _, _ = others
    wide, count = accumulation_dtype(hidden.dtype), hidden.shape[0]
    saved = count if single_stat_index < 0 else 0
    several = targets.shape[1] if targets is not None and targets.dim() == 2 else 0
    kept = columns = 0
    if any(needs) and single_stat_index < 0:  # the free memory decides whether logits are kept
        context = torch.library.get_ctx()
        kept, columns = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        hidden.new_empty(5 if with_collision_and_argmax else 3, count, dtype=wide),
        hidden.new_empty(count if with_collision_and_argmax else 0, dtype=torch.int64),
        hidden.new_empty(saved, dtype=wide),
        hidden.new_empty(saved, dtype=wide),
        hidden.new_empty((kept, columns), dtype=wide),
        hidden.new_empty(0 if single_stat_index < 0 else hidden.shape, dtype=wide),
        hidden.new_empty(count, several + top_k, dtype=wide),
        hidden.new_empty(count, top_k, dtype=torch.int64),
        hidden.new_empty(count if top_k > 0 else 0, dtype=wide),
    )


@torch.library.custom_op(
    "em_kernels::token_stats_backward",
    mutates_args=(),
    schema="(Tensor upstream, Tensor? chosen_upstream, Tensor statistics, Tensor m, Tensor log_s,"
    f" Tensor logits, {HEAD_SCHEMA}, bool[] needs, {SUPPORT_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    tags=READS_ON_HOST,
)
def token_stats_backward_op(upstream, chosen_upstream, statistics, m, log_s, logits, *arguments):
    """Return dhidden, dweight, dbias in the inputs' dtypes."""
    *head, needs, indices, offsets = arguments
    inputs = build_inputs(HeadArguments(*head), int(needs[0]))
    inputs, is_sparse = _with_support(inputs, indices, offsets)
    saved = SavedStats(statistics, m, log_s, logits)
    loop = gathered if is_sparse else vocab_slabs
    return loop.token_stats_backward(inputs, upstream, saved, GradMask(*needs), chosen_upstream)


@token_stats_backward_op.register_fake
def _(upstream, chosen_upstream, statistics, m, log_s, logits, hidden, weight, *others):
    *_, needs, _, _ = others
    return fake_head_gradients(hidden, weight, needs)


def fake_head_gradients(hidden, weight, needs):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        like.new_empty(shape if need else (0,))
        for like, shape, need in zip((hidden, weight, weight), shapes, needs, strict=True)
    )


def _token_stats_setup(ctx, inputs, output) -> None:
    head, (ctx.needs, _, ctx.single_stat_index, _, *support) = (
        HeadArguments(*inputs[:HEAD_SIZE]),
        inputs[HEAD_SIZE:],
    )
    found = StatsOutput(*output)
    ctx.mark_non_differentiable(*found[1:6], found.top_indices, found.tail_logprob)
    ctx.set_materialize_grads(False)
    ctx.dtype = head.hidden.dtype
    if ctx.single_stat_index >= 0:  # the gradient is there: hidden and weight need not be kept
        ctx.save_for_backward(found.dhidden, head.targets, head.mask)
        return
    *tensors, ctx.transform, ctx.chunk_bytes, ctx.group = head
    saved = found.statistics, found.m, found.log_s, found.logits
    ctx.save_for_backward(found.top_indices, *support, *saved, *tensors)


def _token_stats_backward(ctx, upstream, *others_upstream):
    saved_gradients.refuse_double_backward()
    others = (*NO_GRADIENT, *(None,) * 6)
    chosen_upstream = others_upstream[5]
    if upstream is None and chosen_upstream is None:
        return None, None, None, *others
    if ctx.single_stat_index >= 0:
        saved_gradients.refuse_batched(upstream)
        dh, targets, mask = ctx.saved_tensors
        factors = upstream[ctx.single_stat_index]
        if mask is not None:  # not even NaN reaches a token that was left out
            factors = factors.masked_fill(mask == 0, 0)
        if targets is not None and TokenStats._fields[ctx.single_stat_index] == "logprob":
            factors = factors.masked_fill(targets == IGNORE_INDEX, 0)
        scaled = torch.mul(dh, factors[:, None], out=torch.empty_like(dh, dtype=ctx.dtype))
        return scaled, None, None, *others
    (
        top_indices,
        *support,
        statistics,
        m,
        log_s,
        logits,
        hidden,
        weight,
        bias,
        targets,
        mask,
        tau,
    ) = ctx.saved_tensors
    if upstream is None:
        upstream = torch.zeros_like(statistics)
    if chosen_upstream is None:
        targets = None if targets is None or targets.dim() == 2 else targets
    elif targets is None:
        targets = top_indices
    else:
        if targets.dim() == 1:  # logprob's, and the largest entries': several in all
            targets = targets[:, None]
            chosen_upstream = torch.cat([upstream[1, :, None], chosen_upstream], dim=1)
        targets = torch.cat([targets, top_indices], dim=1)
    gradients = token_stats_backward_op(
        upstream,
        chosen_upstream,
        *(statistics, m, log_s, logits),
        *(hidden, weight, bias, targets, mask, tau, ctx.transform, ctx.chunk_bytes, ctx.group),
        ctx.needs,
        *support,
    )
    return *(g if need else None for g, need in zip(gradients, ctx.needs, strict=True)), *others


token_stats_op.register_autograd(_token_stats_backward, setup_context=_token_stats_setup)


# It reads the counts of temperatures that are out of range; its backward reads nothing.
@torch.library.custom_op("em_kernels::entropy_from_logits", mutates_args=(), tags=READS_ON_HOST)
def entropy_from_logits_op(
    logits: Tensor, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return entropy, m and log s of logits (N, V), each (N,)."""
    return from_logits.entropy(logits, temperature if temperatures is None else temperatures)


@entropy_from_logits_op.register_fake
def _(logits, temperatures, temperature):
    wide = accumulation_dtype(logits.dtype)
    return tuple(logits.new_empty(logits.shape[:1], dtype=wide) for _ in range(3))


@torch.library.custom_op("em_kernels::entropy_from_logits_backward", mutates_args=())
def entropy_from_logits_backward_op(
    upstream: Tensor,
    entropy: Tensor,
    m: Tensor,
    log_s: Tensor,
    logits: Tensor,
    temperatures: Tensor | None,
    temperature: float,
) -> Tensor:
    """Return dlogits (N, V) in the logits' dtype."""
    tau = temperature if temperatures is None else temperatures
    return from_logits.entropy_backward(upstream, LogitsEntropy(entropy, m, log_s), logits, tau)


@entropy_from_logits_backward_op.register_fake
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
    dlogits = entropy_from_logits_backward_op(upstream, *ctx.saved_tensors, ctx.temperature)
    return dlogits, None, None


entropy_from_logits_op.register_autograd(
    _entropy_from_logits_backward, setup_context=_entropy_from_logits_setup
)


if is_built():  # the op itself is in csrc/gemm_bf16.cpp

    @torch.library.register_fake("em_kernels::gemm_bf16")
    def _(out, a, b, accumulate, isa):
        return None
