"""Functions of verl, OpenRLHF and slime, with their arguments and results.

Where theirs take logits, or log-probabilities computed from them, these take the hidden states and
the head's weight. None of them shifts: each hidden state is the one that its token was sampled
from.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .functional import REDUCTIONS, fused_token_stats
from .losses.averages import check_head_arguments
from .losses.policy import grpo_loss
from .ops.checks import check_float, check_number, check_per_token

VERL_AVERAGES = {
    "token-mean": "bnpo",
    "seq-mean-token-mean": "seq-mean-token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "seq-mean-token-sum",
}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    group: ProcessGroup | None = None,
    *,
    caller_sums_dhidden: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities of labels, and entropies, with the signature of verl's function.

    Equivalent to::

        logp = (F.linear(hidden, weight) / temperature).log_softmax(-1).flatten(0, -2)
        logprobs = logp.gather(-1, labels.reshape(-1, 1))[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)

    Args:
        hidden: (..., D), N tokens.
        weight: (V, D).
        labels: N of any shape, int64, the token after each hidden state; the log-probability of
            -100 is 0.
        temperature: > 0.
        reduction: of the log-probabilities: "none" (N,), "sum" () or "mean" (), divided by N, with
            labels of -100.
        group: ranks that each hold consecutive rows of the weight; verl's dist_process_group.
        caller_sums_dhidden: for code that sums dhidden over the group itself, as verl's and Cut
            Cross-Entropy's (``reduce_e_grad=False``) callers do: every rank gets an equal share of
            dhidden, so that the sum is right. Otherwise each gets the whole.

    Returns:
        (log-probabilities, entropies (N,)) in nats, fp32 (fp64 for fp64), flat as verl's.

    Gradient, precision, memory: as in :func:`em_kernels.fused_token_stats`.
    Raises: as :func:`em_kernels.fused_token_stats`, in whose errors the values of labels are called
        targets, and group process_group.
    Source: verl 0.9.1, verl/utils/kernel/linear_cross_entropy.py. Beyond it, this function runs on
        any device and D, with shards of different sizes, and takes labels of -100.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is unknown; use one of {', '.join(REDUCTIONS)}")
    check_float("hidden", hidden)
    if hidden.dim() < 1:
        raise ValueError("hidden: expected (..., D), got a scalar")
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = labels.reshape(-1) if isinstance(labels, Tensor) else labels
    check_per_token("labels", flat, rows)
    if caller_sums_dhidden and group is not None:
        rows = _GradientShare.apply(rows, dist.get_world_size(group))
    stats = fused_token_stats(rows, weight, flat, temperature=temperature, process_group=group)
    assert stats.logprob is not None and stats.entropy is not None
    if reduction == "none":
        return stats.logprob, stats.entropy
    total = stats.logprob.sum()
    return total if reduction == "sum" else total / max(1, len(rows)), stats.entropy


def verl_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    responses: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
    **head: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute verl's PPO loss with dual clip, and what it logs, in one pass over the head.

    Equivalent to this, for log-probabilities `log_prob` (B, T) of the responses, and
    "token-mean"::

        ratio = torch.exp(log_prob - old_log_prob)
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(
            1 - cliprange_low, 1 + cliprange_high
        )
        one_sided = torch.maximum(plain, clipped)
        losses = torch.where(
            advantages < 0, torch.minimum(one_sided, -advantages * clip_ratio_c), one_sided
        )
        pg_loss = (losses * rollout_is_weights * response_mask).sum() / response_mask.sum()

    Args:
        hidden: (B, T, D), the states that the responses' tokens were sampled from.
        weight: (V, D).
        responses: (B, T) int64 tokens.
        old_log_prob, advantages, response_mask: (B, T), the mask bool or int.
        cliprange, cliprange_low, cliprange_high: the latter two default to the first.
        clip_ratio_c: largest ratio where the advantage is negative, >= 1 + cliprange_high.
        loss_agg_mode: "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", or
            "seq-mean-token-sum-norm". Responses without tokens are not counted.
        rollout_is_weights: (B, T) or None.
        dp_size: processes whose gradients are averaged; the loss is multiplied by it.
        batch_num_tokens, global_batch_size: what the sum is divided by: the tokens of all
            processes' calls for "token-mean", their responses for the others; default this call's,
            where dp_size is 1.
        loss_scale_factor: of "seq-mean-token-sum-norm", which divides by it, by default T.
        head: temperature, process_group and others, as in :func:`em_kernels.fused_token_loss`.

    Returns:
        (pg_loss, pg_clipfrac, ppo_kl, pg_clipfrac_lower), each () fp32 (fp64 for fp64), the last
        three detached. verl returns these in a dict, as actor/pg_clipfrac and so on.

    Gradient, precision, memory: as in :func:`em_kernels.fused_token_loss`, which is called once.
    Raises: ValueError, TypeError naming the argument of :func:`em_kernels.losses.grpo_loss`;
        RuntimeError on double backward.
    Source: verl 0.9.1, compute_policy_loss_vanilla and agg_loss of verl/trainer/ppo/core_algos.py;
        dual clip, arXiv 1912.09729. verl also clamps log-ratios to [-20, 20], where the clips bound
        the loss already.
    """
    if loss_agg_mode not in VERL_AVERAGES:
        known = ", ".join(VERL_AVERAGES)
        raise ValueError(f"loss_agg_mode: {loss_agg_mode!r} is unknown; use one of {known}")
    high = check_number("cliprange", cliprange)
    if cliprange_high is not None:
        high = check_number("cliprange_high", cliprange_high)
    _check_dual_clip("clip_ratio_c", clip_ratio_c, high)
    loss_type = VERL_AVERAGES[loss_agg_mode]
    count = batch_num_tokens if loss_agg_mode == "token-mean" else global_batch_size
    if not check_number("dp_size", dp_size) >= 1:
        raise ValueError(f"dp_size: {dp_size} is not >= 1")
    if count is None and dp_size > 1:
        missing = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
        raise ValueError(f"{missing}: is None with dp_size = {dp_size}; give the global batch's")
    check_head_arguments("verl_policy_loss", head)
    loss, metrics = grpo_loss(
        hidden,
        weight,
        responses,
        mask=response_mask,
        advantages=advantages,
        old_logprobs=old_log_prob,
        importance_weights=rollout_is_weights,
        epsilon=cliprange if cliprange_low is None else cliprange_low,
        epsilon_high=high,
        delta=clip_ratio_c,
        loss_type="dapo" if loss_type == "bnpo" and count is not None else loss_type,
        num_items_in_batch=None if count is None else count / dp_size,
        return_metrics=True,
        **head,
    )
    if loss_agg_mode == "seq-mean-token-sum-norm":
        loss = loss / (hidden.shape[-2] if loss_scale_factor is None else loss_scale_factor)
    clipped = metrics["clip_low"] + metrics["clip_high"]
    return loss, clipped, metrics["approx_kl"], metrics["clip_delta"]


def openrlhf_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float | None = None,
    token_level_loss: bool = True,
    policy_loss_type: str = "ppo",
    **head: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute OpenRLHF's policy loss, and what it logs, in one pass over the head.

    Equivalent to this, for log-probabilities `log_probs` (B, T) of the actions::

        log_ratio = log_probs - old_log_probs
        if policy_loss_type == "gspo":
            log_ratio = ((log_ratio * action_mask).sum(-1) / action_mask.sum(-1))[:, None]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        if dual_clip is not None:
            gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
        if token_level_loss and policy_loss_type == "ppo":
            loss = -(gain * action_mask).sum() / action_mask.sum()
        else:
            loss = -((gain * action_mask).sum(-1) / action_mask.sum(-1)).mean()

    Args:
        hidden: (B, T, D), the states that the actions were sampled from.
        weight: (V, D).
        actions: (B, T) int64 tokens.
        old_log_probs, advantages, action_mask: (B, T), the mask bool or int. Rows without actions
            are not counted.
        clip_eps_low, clip_eps_high, dual_clip, token_level_loss, policy_loss_type: as those of
            OpenRLHF's PolicyLoss; "gspo" always averages over sequences.
        head: temperature, process_group and others, as in :func:`em_kernels.fused_token_loss`.

    Returns:
        (loss, clip_ratio, ppo_kl), each () fp32 (fp64 for fp64), the last two detached.

    Gradient, precision, memory: as in :func:`em_kernels.losses.grpo_loss`, which is called once.
    Raises: ValueError, TypeError naming the argument of :func:`em_kernels.losses.grpo_loss`;
        RuntimeError on double backward.
    Source: OpenRLHF 0.8, PolicyLoss of openrlhf/models/loss.py; GSPO, arXiv 2507.18071.
    """
    if policy_loss_type not in ("ppo", "gspo"):
        raise ValueError(f"policy_loss_type: {policy_loss_type!r} is unknown; use ppo or gspo")
    if dual_clip is not None:
        _check_dual_clip("dual_clip", dual_clip, check_number("clip_eps_high", clip_eps_high))
    per_token = policy_loss_type == "ppo"
    check_head_arguments("openrlhf_policy_loss", head)
    loss, metrics = grpo_loss(
        hidden,
        weight,
        actions,
        mask=action_mask,
        advantages=advantages,
        old_logprobs=old_log_probs,
        epsilon=clip_eps_low,
        epsilon_high=clip_eps_high,
        delta=dual_clip,
        loss_type="bnpo" if token_level_loss and per_token else "seq-mean-token-mean",
        importance_sampling_level="token" if per_token else "sequence",
        return_metrics=True,
        **head,
    )
    return loss, metrics["clip_low"] + metrics["clip_high"], metrics["approx_kl"]


def slime_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    tp_group: ProcessGroup | None = None,
    with_entropy: bool = False,
    *,
    temperature: float = 1.0,
    caller_sums_dhidden: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute slime's log-probabilities of tokens and, on request, entropies.

    Equivalent to::

        logp = (F.linear(hidden, weight).float() / temperature).log_softmax(-1)
        log_prob = logp.gather(-1, tokens[:, None])
        entropy = -(logp.exp() * logp).sum(-1)

    Args:
        hidden: (N, D) of one sample's responses.
        weight: (V, D), or this rank's rows of it.
        tokens: (N,) int64.
        tp_group: ranks that each hold consecutive rows of the weight.
        with_entropy: whether to return the entropy.
        temperature: > 0; slime divides the logits by it before.
        caller_sums_dhidden: as in :func:`linear_cross_entropy`.

    Returns:
        (log-probabilities (N, 1), entropy (N,) or None) in nats, fp32 (fp64 for fp64).

    Gradient, precision, memory: as in :func:`em_kernels.fused_token_stats`.
    Raises: as :func:`linear_cross_entropy`.
    Source: slime, calculate_log_probs_and_entropy of slime/utils/ppo_utils.py.
    """
    log_prob, entropy = linear_cross_entropy(
        hidden,
        weight,
        tokens,
        temperature,
        group=tp_group,
        caller_sums_dhidden=caller_sums_dhidden,
    )
    return log_prob[:, None], entropy if with_entropy else None


def _check_dual_clip(name: str, largest: float, high: float) -> None:
    # Below it, grpo_loss's delta, which is TRL's, would hold positive advantages too.
    if not check_number(name, largest) >= 1 + high:
        raise ValueError(f"{name}: {largest} is not >= {1 + high}, where clipping begins")


class _GradientShare(torch.autograd.Function):
    """The identity, whose gradient is one of `ranks` equal shares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return upstream / ctx.ranks, None
