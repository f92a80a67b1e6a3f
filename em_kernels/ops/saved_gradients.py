"""Gradients that the forward has made: kept until the backward, and there times its upstream."""

import torch
from torch import Tensor

from ..kernels.cpu import supports
from .inputs import large_empty


def refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "em_kernels has no second derivatives: call backward without create_graph, "
            "or use em_kernels.reference"
        )


def save_gradients(ctx, tensors, needs, grad_tolerance, gradients) -> None:
    ctx.set_materialize_grads(False)
    *saved, ctx.report = gradients
    ctx.save_for_backward(*saved)
    ctx.needs, ctx.is_sparse, ctx.vocab_size = needs, grad_tolerance > 0, len(tensors[1])
    ctx.dtypes = [None if x is None else x.dtype for x in tensors]


def saved_gradients(ctx, upstream):
    """Gradients of hidden, weight and bias times upstream, each in its tensor's dtype."""
    refuse_double_backward()
    if upstream is None:
        return [None] * 3
    *saved, words = ctx.saved_tensors
    found = []
    for x, need, dtype in zip(saved, ctx.needs, ctx.dtypes, strict=True):
        if not need:
            found.append(None)
        elif x is saved[1] and ctx.is_sparse and (_is_traced(x) or len(x) < ctx.vocab_size):
            found.append(
                torch.ops.em_kernels.scaled_rows(x, words, upstream, ctx.vocab_size, dtype)
            )
        else:
            found.append(_scaled(x, upstream, dtype))
    return found


def _is_traced(x) -> bool:
    return type(x) is not Tensor


def _scaled(saved, upstream, dtype):
    """saved * upstream, rounded once, without an fp32 product of its size."""
    if _is_traced(saved):
        return torch.mul(saved, upstream, out=torch.empty_like(saved, dtype=dtype))
    keep = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    is_last = saved.dtype == dtype and not keep()  # nobody can come back to `saved`
    if is_last and saved.is_cpu and upstream.item() == 1:
        return saved
    return _product(saved, upstream, saved if is_last else large_empty(saved.shape, dtype, saved))


def _product(x: Tensor, upstream: Tensor, out: Tensor) -> Tensor:
    # a CPU would make the product in fp32 first, all of what it is given
    length = max(1, x.numel()) if x.is_cuda or x.dtype == out.dtype else 1 << 20
    for part, to in zip(x.view(-1).split(length), out.view(-1).split(length), strict=True):
        torch.mul(part, upstream, out=to)
    return out


def scaled_rows(
    values: Tensor, words: Tensor, upstream: Tensor, vocab_size: int, dtype: torch.dtype
) -> Tensor:
    """(V, D) in dtype: values (K, D) times upstream at the rows `words`, or all (K = V); else 0."""
    whole = large_empty((vocab_size, values.shape[1]), dtype, values)
    if len(values) == vocab_size:
        return _product(values, upstream, whole)
    if supports(values) and dtype != torch.float16:
        torch.ops.em_kernels.spread_rows(values, words, upstream.item(), whole)
        return whole
    product = _product(values, upstream, torch.empty_like(values, dtype=dtype))
    return whole.zero_().index_copy_(0, words, product)
