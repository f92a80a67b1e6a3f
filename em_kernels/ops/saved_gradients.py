"""Gradients that the forward has computed, multiplied by upstream in the backward.

In place of the weight's gradient the forward may have kept dy, which the backward multiplies.
"""

import torch
from torch import Tensor

from ..kernels.cpu import supports
from . import choice_costs
from .memory import untouched_zeros
from .weight_gradient import multiply_kept_dy

# Up to this share of rows that are not 0, the others stay untouched. A row of 3 KiB touches almost
# two pages, and first writes to single pages are slow: beyond it writing all rows is as fast.
UNTOUCHED_SHARE = 1 / 16


def refuse_double_backward() -> None:
    """Raise RuntimeError within create_graph=True, whose second derivative would be 0."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "em_kernels has no second derivatives: call backward without create_graph, "
            "or use em_kernels.reference"
        )


def save_gradients(ctx, head, grad_tolerance, needs, gradients) -> None:
    """Save gradients.Gradients of (hidden, weight, bias) for saved_gradients().

    ctx.report and ctx.why_exact are for tolerance.gradient_report.
    """
    ctx.set_materialize_grads(False)
    *saved, ctx.report = gradients
    ctx.why_exact = ""
    if grad_tolerance > 0 and not _is_traced(ctx.report):
        ctx.why_exact = choice_costs.why_exact(head, needs)
    # dweight is dy^T hidden where dy is kept, which the compiler does not know.
    keeps_dy = _is_traced(gradients[4]) or gradients[4].numel() > 0
    ctx.save_for_backward(*saved, *((head.hidden, head.mask) if keeps_dy else (None, None)))
    ctx.needs, ctx.weight_shape = needs, head.weight.shape
    ctx.dtypes = [None if x is None else x.dtype for x in head[:3]]


def saved_gradients(ctx, upstream):
    """Return the gradients of hidden, weight and bias times upstream, in their tensors' dtypes."""
    refuse_double_backward()
    if upstream is None:
        return [None] * 3
    dh, dw, db, *others = ctx.saved_tensors
    dtypes = ctx.dtypes
    dhidden = _scale(dh, upstream, dtypes[0]) if ctx.needs[0] else None
    dweight = None
    if ctx.needs[1]:
        if not _is_traced(dw) and dw.shape == ctx.weight_shape:
            dweight = _scale(dw, upstream, dtypes[1])
        else:
            dweight = torch.ops.em_kernels.weight_gradient(
                dw, *others, upstream, ctx.weight_shape[0], dtypes[1]
            )
    dbias = _scale(db, upstream, dtypes[2]) if ctx.needs[2] else None
    return [dhidden, dweight, dbias]


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
    out = saved if may_overwrite else torch.empty_like(saved, dtype=dtype)
    return _multiply(saved, upstream, out)


def _multiply(x: Tensor, upstream: Tensor, out: Tensor) -> Tensor:
    # On a CPU torch.mul with a narrower `out` makes its whole product in fp32 first: hence parts.
    length = max(1, x.numel()) if x.is_cuda or x.dtype == out.dtype else 1 << 20
    for part, to in zip(x.view(-1).split(length), out.view(-1).split(length), strict=True):
        torch.mul(part, upstream, out=to)
    return out


def weight_gradient(
    dw: Tensor,
    vocab_indices: Tensor,
    dy: Tensor,
    dy_scales: Tensor,
    hidden: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return dweight (V, D) in dtype, from the fields of gradients.Gradients.

    Where dy was kept it is upstream * dy^T hidden. Otherwise it is upstream * dw, whose rows (K, D)
    are those at the indices, or all of them.
    """
    shape = (vocab_size, dw.shape[1])
    if dw.is_cpu and 0 < len(dw) <= UNTOUCHED_SHARE * vocab_size:
        product = _multiply(dw, upstream, torch.empty_like(dw, dtype=dtype))
        return untouched_zeros(shape, dtype).index_copy_(0, vocab_indices, product)
    out = dw.new_empty(shape, dtype=dtype)
    if hidden is not None and dy.numel() > 0:
        if mask is not None and len(dy) < len(hidden):
            hidden = hidden[torch.nonzero_static(mask, size=len(dy))[:, 0]]
        return multiply_kept_dy(dy, dy_scales, hidden, upstream, out)
    if len(dw) == 0:
        return out.zero_()
    if len(dw) == vocab_size:
        return _multiply(dw, upstream, out)
    if supports(dw) and dtype != torch.float16:
        torch.ops.em_kernels.spread_rows(dw, vocab_indices, upstream.item(), out)
        return out
    product = _multiply(dw, upstream, torch.empty_like(dw, dtype=dtype))
    return out.zero_().index_copy_(0, vocab_indices, product)
