"""Losses without autograd, whose gradient of the weight is never held whole."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .divergence import check_reference
from .functional import REDUCTIONS
from .ops import choice_costs, chunked
from .ops.checks import check_arguments, check_tolerance
from .ops.divergence import build_pair, sum_divergences
from .ops.inputs import GradMask, build_inputs
from .ops.weight_gradient import WeightGradCallback
from .tolerance_report import GradientReport


@torch.no_grad()
def entropy_loss_into(
    on_weight_grad: WeightGradCallback | None,
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
) -> tuple[Tensor, Tensor, Tensor | None, GradientReport]:
    """Compute :func:`fused_entropy_loss` and its gradients at once, without autograd.

    The weight's gradient goes to a callback in parts, so that no (V, D) gradient is ever in
    memory::

        def on_weight_grad(entries, values):
            weight_gradient[entries] += values

        loss, dhidden, dbias, report = entropy_loss_into(on_weight_grad, hidden, lm_head.weight)
        hidden.backward(dhidden)

    Args:
        on_weight_grad: called with (entries, values) many times, also for the same entries.
            entries: a slice or distinct int64 indices (K,) of the vocabulary. values: (K, D) fp32
            (fp64 for fp64), to be added to these rows of the gradient; their memory is reused once
            the callback returns. None: the weight is frozen.
        hidden, weight, bias, mask, temperature, logit_scale, softcap, grad_tolerance, chunk_bytes:
            as in :func:`fused_entropy_loss`.
        reduction: "mean" or "sum".

    Returns:
        The loss (), the gradient of hidden, shaped and rounded as hidden, that of bias (V,) in fp32
        if it requires grad, else None, and the GradientReport.

    Gradient: always of hidden, whether or not it requires grad. Nothing is attached to a graph.
    Precision: as in :func:`fused_entropy_loss`.
    Memory: one chunk, fp32 dhidden, and 64 MiB for values, with a tolerance 64 MiB more.
    Raises: as :func:`fused_entropy_loss`.
    """
    if reduction not in REDUCTIONS[:2]:
        raise ValueError(f'reduction: {reduction!r} is not "mean" or "sum"')
    grad_tolerance = check_tolerance(grad_tolerance)
    needs = GradMask(True, on_weight_grad is not None, bias is not None and bias.requires_grad)
    transform = (temperature, logit_scale, softcap)
    head = check_arguments(
        hidden, weight, bias, None, mask, transform, chunk_bytes, process_group=None
    )
    inputs = build_inputs(head, int(needs.hidden), grad_tolerance, needs)
    loss, gradients = chunked.sum_entropy(inputs, reduction == "mean", needs, on_weight_grad)
    dhidden = gradients.hidden.to(hidden.dtype).reshape(hidden.shape)
    dbias = gradients.bias if needs.bias else None
    why_exact = choice_costs.why_exact(head, needs) if grad_tolerance > 0 else ""
    report = GradientReport(gradients.report[0], gradients.report[1], why_exact)
    return loss, dhidden, dbias, report


@torch.no_grad()
def divergence_into(
    on_weight_grad: WeightGradCallback | None,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    beta: float = 1.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute :func:`fused_divergence`'s sum and its gradients at once, without autograd.

    Args:
        on_weight_grad: as in :func:`entropy_loss_into`.
        hidden, weight, ref_hidden, ref_weight, beta, bias, ref_bias, mask, temperature,
            logit_scale, softcap, ref_logit_scale, ref_softcap, chunk_bytes: as in
            :func:`fused_divergence`.

    Returns:
        The divergences' sum (), weighted by the mask, the gradient of hidden, shaped and rounded as
        hidden, and that of bias (V,) in fp32 if it requires grad, else None.

    Gradient: as in :func:`entropy_loss_into`; where ref_weight has fewer rows, the callback gets
        no values for the others, and that of bias is 0 there.
    Precision: as in :func:`fused_divergence`.
    Memory: one chunk of both models' logits, fp32 dhidden, and 64 MiB for values.
    Raises: as :func:`fused_divergence`.
    """
    needs = GradMask(True, on_weight_grad is not None, bias is not None and bias.requires_grad)
    transform, group = (temperature, logit_scale, softcap), None
    head = check_arguments(hidden, weight, bias, None, mask, transform, chunk_bytes, group)
    ref_transform, shape = (ref_logit_scale, ref_softcap), hidden.shape[:-1]
    head, reference = check_reference(
        head, shape, ref_hidden, ref_weight, ref_bias, ref_transform, beta
    )
    pair = build_pair(head, reference, int(needs.hidden))
    divergence, _, gradients = sum_divergences(pair, False, needs, on_weight_grad)
    dhidden = gradients.hidden.to(hidden.dtype).reshape(hidden.shape)
    if bias is None or not needs.bias:
        return divergence, dhidden, None
    return divergence, dhidden, pad(gradients.bias, (0, len(bias) - len(gradients.bias)))
