"""torch.library ops over the loop of divergence.py, as in torch_library.py.

Their arguments begin with the fields of checks.HeadArguments and divergence.ReferenceArguments.
"""

import torch

from . import divergence, saved_gradients
from .checks import HeadArguments
from .divergence import ReferenceArguments
from .gemm import accumulation_dtype
from .inputs import GradMask
from .torch_library import (
    HEAD_SCHEMA,
    HEAD_SIZE,
    READS_ON_HOST,
    fake_head_gradients,
    fake_loss_and_gradients,
)

REFERENCE_SCHEMA = "Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, float[] ref_transform"
PAIR_SIZE = HEAD_SIZE + len(ReferenceArguments._fields)


def _pair(arguments, needs, of_each=True):
    head = HeadArguments(*arguments[:HEAD_SIZE])
    ref = ReferenceArguments(*arguments[HEAD_SIZE:])
    return divergence.build_pair(head, ref, needs[0] + 2 * needs[1] + 4 * of_each)


@torch.library.custom_op(
    "em_kernels::divergence",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, {REFERENCE_SCHEMA}, bool mean, bool[] needs)"
    f" -> ({', '.join(['Tensor'] * 11)})",
    tags=READS_ON_HOST,
)
def divergence_op(*arguments):
    """Return the sum or mean (), and the fields of divergence.Divergences and Gradients."""
    *pair, mean, needs = arguments
    pair = _pair(pair, needs, of_each=False)
    loss, found, gradients = divergence.sum_divergences(pair, mean, GradMask(*needs))
    return loss, *found, *gradients


@divergence_op.register_fake
def _(hidden, weight, *others):
    loss, *gradients = fake_loss_and_gradients(hidden, weight, others[-1])
    return loss, *_fake_divergences(hidden), *gradients


def _fake_divergences(hidden):
    wide, count = accumulation_dtype(hidden.dtype), hidden.shape[0]
    floats = (hidden.new_empty(shape, dtype=wide) for shape in ((count,), (5, count)))
    return *floats, hidden.new_empty(count, dtype=torch.int64)


def _divergence_setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    head = HeadArguments(*inputs[:HEAD_SIZE])
    saved_gradients.save_gradients(ctx, head, 0.0, inputs[-1], output[4:])


def _divergence_backward(ctx, upstream, *_):
    return *saved_gradients.saved_gradients(ctx, upstream), *(None,) * (PAIR_SIZE - 3 + 2)


divergence_op.register_autograd(_divergence_backward, setup_context=_divergence_setup)


@torch.library.custom_op(
    "em_kernels::token_divergences",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, {REFERENCE_SCHEMA}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=READS_ON_HOST,
)
def token_divergences_op(*arguments):
    """Return the fields of divergence.Divergences."""
    *pair, needs = arguments
    return divergence.each_divergence(_pair(pair, needs))


@token_divergences_op.register_fake
def _(hidden, *others):
    return _fake_divergences(hidden)


@torch.library.custom_op(
    "em_kernels::token_divergences_backward",
    mutates_args=(),
    schema=f"(Tensor upstream, {HEAD_SCHEMA}, {REFERENCE_SCHEMA}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    tags=READS_ON_HOST,
)
def token_divergences_backward_op(upstream, *arguments):
    """Return dhidden, dweight, dbias in the inputs' dtypes."""
    *pair, needs = arguments
    return divergence.gradients_of_each(_pair(pair, needs), upstream, GradMask(*needs))


@token_divergences_backward_op.register_fake
def _(upstream, hidden, weight, *others):
    return fake_head_gradients(hidden, weight, others[-1])


def _token_divergences_setup(ctx, inputs, output) -> None:
    *pair, ctx.needs = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    tensors = [x for x in pair if isinstance(x, torch.Tensor)]
    ctx.others = [None if isinstance(x, torch.Tensor) else (x,) for x in pair]
    ctx.save_for_backward(*tensors)


def _token_divergences_backward(ctx, upstream, *_):
    saved_gradients.refuse_double_backward()
    others = (None,) * (PAIR_SIZE - 3 + 1)
    if upstream is None:
        return None, None, None, *others
    tensors = iter(ctx.saved_tensors)
    pair = [next(tensors) if x is None else x[0] for x in ctx.others]
    gradients = token_divergences_backward_op(upstream, *pair, ctx.needs)
    return *(g if need else None for g, need in zip(gradients, ctx.needs, strict=True)), *others


token_divergences_op.register_autograd(
    _token_divergences_backward, setup_context=_token_divergences_setup
)
