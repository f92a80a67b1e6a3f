"""The divergence of two models' next-token distributions, for distillation and KL penalties."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .functional import (
    OF_TOP,
    REDUCTIONS,
    STATS,
    _check_is_names,
    _check_stat_names,
    _require_grad,
)
from .ops.checks import (
    HeadArguments,
    check_arguments,
    check_head,
    check_number,
    check_scale_and_cap,
)
from .ops.divergence import ReferenceArguments
from .ops.torch_library_divergence import divergence_op, token_divergences_op
from .reference import TokenStats


def fused_divergence(
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
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    return_stats: Sequence[str] | None = None,
    chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Any:
    """Compute KL or Jensen-Shannon divergence from a reference model, without either's logits.

    Equivalent to this, with p the model's distributions and q the reference's::

        logp = (F.linear(hidden, weight, bias).float() / temperature).log_softmax(-1)
        logq = (F.linear(ref_hidden, ref_weight, ref_bias).float() / temperature).log_softmax(-1)
        kl = lambda loga, logb: (loga.exp() * (loga - logb)).sum(-1)
        if beta in (0, 1):
            divergence = kl(logp, logq) if beta == 1 else kl(logq, logp)
        else:
            logr = torch.logaddexp(logq + math.log(beta), logp + math.log(1 - beta))
            divergence = beta * kl(logq, logr) + (1 - beta) * kl(logp, logr)
        loss = (mask * divergence).sum() / mask.sum()

    Args:
        hidden, weight, bias: of the model, as in :func:`fused_entropy_loss`.
        ref_hidden: (..., D') hidden states of the reference for the same tokens; its D' and dtype
            are its own. The reference never gets a gradient.
        ref_weight, ref_bias: (V', D') and (V',) of the reference's head. Entry j is the same token
            as in weight. Where V and V' differ, as padded vocabularies do, both distributions are
            those over the first min(V, V') entries.
        beta: 0 is the forward KL(q || p), 1 the reverse KL(p || q); between them the generalised
            Jensen-Shannon divergence, as in TRL and Liger: beta KL(q || r) + (1 - beta) KL(p || r),
            r = beta q + (1 - beta) p. (It goes to 0 with beta, and with 1 - beta.)
        mask, reduction, chunk_bytes: as in :func:`fused_entropy_loss`; chunk_bytes is for the
            logits of both.
        temperature: > 0, of both; a number, or (...) one per token. The divergence is not
            multiplied by its square.
        logit_scale, softcap, ref_logit_scale, ref_softcap: for models that have them.
        return_stats: names of the model's own statistics to return as well, from the same pass:
            entropy, logsumexp, mean_logit, log_collision, argmax.
        process_group: ranks that each hold consecutive rows of both weights, as many of each.

    Returns:
        The divergence in nats, fp32 (fp64 for fp64): (), or (...) for "none"; >= 0, and exactly 0
        for equal logits. It is inf where one distribution has an entry that the other excludes by a
        logit of -inf (beta 0: q has it and p has not; beta 1: the reverse). With return_stats
        (divergence, TokenStats), whose fields (...) are detached.

    Gradient: for hidden, weight and bias, equation (11) of ``em_kernels.reference_divergence``; NaN
        in the rows whose divergence is inf. For "mean" and "sum" it is computed during the forward:
        GEMM work is 4 times that of the forward of the model's head alone where D' is D, 3 times
        with a frozen weight. For "none" the backward computes the logits again: 6 times, or 5.
    Precision: logits, statistics and accumulated gradients are fp32 whatever the inputs' dtypes.
        The terms summed are a log(a / b) - a + b, none of them negative, so that small divergences
        keep their digits.
    Memory: as in :func:`fused_entropy_loss`, with a chunk of the reference's logits beside the
        model's. Where V > V', dweight is copied once.
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward.
    Source: generalised knowledge distillation, arXiv 2306.13649; MiniLLM, arXiv 2306.08543.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is unknown; use one of {', '.join(REDUCTIONS)}")
    _check_is_names("return_stats", return_stats)
    for name in return_stats or ():
        if name in ("logprob", *OF_TOP):
            raise ValueError(
                f"return_stats: {name} is not for fused_divergence; call fused_token_stats for it"
            )
    _check_stat_names("return_stats", return_stats, has_targets=False)
    transform = (temperature, logit_scale, softcap)
    head = check_arguments(hidden, weight, bias, None, mask, transform, chunk_bytes, process_group)
    ref_transform, shape = (ref_logit_scale, ref_softcap), hidden.shape[:-1]
    head, reference = check_reference(
        head, shape, ref_hidden, ref_weight, ref_bias, ref_transform, beta
    )
    needs = _require_grad(*head[:3])
    if reduction == "none":
        each, statistics, argmax = token_divergences_op(*head, *reference, needs)
        each = each.reshape(shape)
        loss = each if mask is None else each * mask.to(each.dtype)
    else:
        loss, _, statistics, argmax, *_ = divergence_op(
            *head, *reference, reduction == "mean", needs
        )
    if return_stats is None:
        return loss
    fields = dict(zip(STATS, statistics.unbind(0), strict=False), argmax=argmax)
    return loss, TokenStats(**{name: fields[name].reshape(shape) for name in return_stats})


def check_reference(
    head: HeadArguments,
    shape: torch.Size,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_transform: tuple[float, float | None],
    beta: float,
) -> tuple[HeadArguments, ReferenceArguments]:
    """Check what fused_divergence takes beside the model's head; return both heads' arguments.

    Args:
        head: of the model, as check_arguments returns it.
        shape: (...) of its tokens.
        ref_transform: (ref_logit_scale, ref_softcap).
    """
    beta = check_number("beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: {beta} is not in [0, 1]; 0 is the forward KL, 1 the reverse")
    ref_hidden, ref_weight, ref_bias = check_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    if ref_hidden.shape[:-1] != shape:
        raise ValueError(
            f"ref_hidden: expected ({', '.join(map(str, shape))}, D'), as hidden is "
            f"{(*shape, head.hidden.shape[1])}, got {tuple(ref_hidden.shape)}"
        )
    if ref_hidden.device != head.hidden.device:
        raise ValueError(
            f"ref_hidden: is on {ref_hidden.device}, hidden on {head.hidden.device}; move one"
        )
    if head.group is not None and len(head.weight) != len(ref_weight):
        raise ValueError(
            f"ref_weight: has {len(ref_weight)} rows on this rank, weight {len(head.weight)}; "
            "split both vocabularies alike"
        )
    columns = min(len(head.weight), len(ref_weight))
    bias = None if head.bias is None else head.bias[:columns]
    reference = ReferenceArguments(
        ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        ref_weight.detach()[:columns],
        None if ref_bias is None else ref_bias.detach()[:columns],
        [*check_scale_and_cap(*ref_transform, "ref_"), beta],
    )
    return head._replace(weight=head.weight[:columns], bias=bias), reference
