"""Gradients that the forward has computed: kept until the backward, then multiplied by upstream."""

import torch
from torch import Tensor

from ..kernels.cpu import supports
from .memory import large_empty


def refuse_double_backward() -> None:
    """Raise RuntimeError within create_graph=True, whose second derivative would be 0."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "em_kernels has no second derivatives: call backward without create_graph, "
            "or use em_kernels.reference"
        )


def save_gradients(ctx, tensors, needs, grad_tolerance, gradients) -> None:
    """Save gradients.Gradients of (hidden, weight, bias) for saved_gradients()."""
    ctx.set_materialize_grads(False)
    *saved, ctx.report = gradients
    ctx.save_for_backward(*saved)
    ctx.needs, ctx.is_sparse, ctx.vocab_size = needs, grad_tolerance > 0, len(tensors[1])
    ctx.dtypes = [None if x is None else x.dtype for x in tensors]


def saved_gradients(ctx, upstream):
    """Return the gradients of hidden, weight and bias times upstream, in their tensors' dtypes."""
    refuse_double_backward()
    if upstream is None:
        return [None] * 3
    *saved, vocab_indices = ctx.saved_tensors
    gradients = []
    for x, need, dtype in zip(saved, ctx.needs, ctx.dtypes, strict=True):
        if not need:
            gradients.append(None)
        elif x is saved[1] and ctx.is_sparse and (_is_traced(x) or len(x) < ctx.vocab_size):
            gradients.append(
                torch.ops.em_kernels.scaled_rows(x, vocab_indices, upstream, ctx.vocab_size, dtype)
            )
        else:
            gradients.append(_scale(x, upstream, dtype))
    return gradients


def _is_traced(x) -> bool:
    return type(x) is not Tensor


def _scale(saved, upstream, dtype):
    """Return saved * upstream, rounded once, without an fp32 product of its size."""
    if _is_traced(saved):
        return torch.mul(saved, upstream, out=torch.empty_like(saved, dtype=dtype))
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    may_overwrite = saved.dtype == dtype and not keeps_graph()  # no later backward reads `saved`
    if may_overwrite and saved.is_cpu and upstream.item() == 1:
        return saved
    out = saved if may_overwrite else large_empty(saved.shape, dtype, saved)
    return _multiply(saved, upstream, out)


def _multiply(x: Tensor, upstream: Tensor, out: Tensor) -> Tensor:
    # On a CPU torch.mul makes the whole fp32 product before it rounds, hence the parts.
    length = max(1, x.numel()) if x.is_cuda or x.dtype == out.dtype else 1 << 20
    for part, to in zip(x.view(-1).split(length), out.view(-1).split(length), strict=True):
        torch.mul(part, upstream, out=to)
    return out


def scaled_rows(
    values: Tensor, vocab_indices: Tensor, upstream: Tensor, vocab_size: int, dtype: torch.dtype
) -> Tensor:
    """Return (V, D) in dtype: values (K, D) times upstream at these rows (all if K = V), else 0."""
    whole = large_empty((vocab_size, values.shape[1]), dtype, values)
    if len(values) == vocab_size:
        return _multiply(values, upstream, whole)
    if supports(values) and dtype != torch.float16:
        torch.ops.em_kernels.spread_rows(values, vocab_indices, upstream.item(), whole)
        return whole
    product = _multiply(values, upstream, torch.empty_like(values, dtype=dtype))
    return whole.zero_().index_copy_(0, vocab_indices, product)
