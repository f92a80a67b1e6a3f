"""Policy losses that hold back the few tokens whose covariance with the advantage is high."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_number
from ..reference import TokenStats
from .averages import check_head_arguments, clip_shares, per_token, sum_losses, zeros_to_one


def clip_cov_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    epsilon: float = 1.0,
    epsilon_high: float | None = None,
    ratio: float = 0.0002,
    bounds: tuple[float, float] = (1.0, 5.0),
    generator: torch.Generator | None = None,
    return_metrics: bool = False,
    **head: Any,
) -> Any:
    """Compute PPO's clipped loss without some of the tokens that lower entropy most.

    Tokens whose log-probability and advantage are both far above their means lower the entropy; of
    those within the bounds a few, drawn at random, get no gradient. Equivalent to this, for all
    tokens (N,) of the completions::

        probability_ratio = torch.exp(logprob - old_logprobs)
        clipped = probability_ratio.clamp(1 - epsilon, 1 + epsilon_high)
        gain = torch.minimum(probability_ratio * advantages, clipped * advantages)
        is_free = gain == probability_ratio * advantages
        covariance = (advantages - advantages.mean()) * (logprob - logprob.mean()).detach()
        candidates = (is_free & (covariance > bounds[0]) & (covariance < bounds[1])).nonzero()[:, 0]
        order = torch.randperm(len(candidates), generator=generator)
        dropped = candidates[order[: max(1, int(ratio * len(gain)))]]
        loss = -gain.index_fill(0, dropped, 0).mean()

    Args:
        hidden, weight, targets, mask, advantages, old_logprobs: as in :func:`grpo_loss`.
        epsilon, epsilon_high: as in :func:`grpo_loss`; the paper's 1 clips almost nothing.
        ratio: share of the tokens that is dropped at most, though one at least.
        bounds: (low, high), both exclusive, of the covariance of the tokens that may be dropped.
        generator: of the CPU, draws the tokens; None: torch's default one. With a process_group,
            every rank needs one in the same state.
        return_metrics: also return a dict of detached () means over this call's tokens: "entropy",
            "approx_kl", "clip_low", "clip_high", "dropped" (the share that was).
        head: bias, temperature, logit_scale, softcap, chunk_bytes, process_group and support, as in
            :func:`fused_token_stats`; grad_tolerance has no effect.

    Returns:
        () fp32 (fp64 for fp64), the mean over this call's tokens; with return_metrics (loss,
        metrics), as in :func:`grpo_loss`.

    Gradient, precision, memory: as in :func:`fused_token_stats`, which is called once.
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward.
    Source: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models, arXiv
        2505.22617, with the constants of its Clip-Cov.
    """
    check_head_arguments("clip_cov_loss", head, "support")
    if generator is None and head.get("process_group") is not None:
        raise ValueError(
            "generator: with a process_group give every rank one in the same state, as all have "
            "to drop the same tokens"
        )
    high = epsilon if epsilon_high is None else epsilon_high
    for name, value in (("epsilon", epsilon), ("epsilon_high", high)):
        if not check_number(name, value) >= 0:
            raise ValueError(f"{name}: {value} is not >= 0")
    if not isinstance(bounds, Sequence) or len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"bounds: {bounds} is not two numbers, (low, high) with low < high")
    ratio = _check_share(ratio)
    flat, weights = per_token(
        hidden, mask, True, targets=targets, advantages=advantages, old_logprobs=old_logprobs
    )
    is_active, advantage = weights.reshape(-1) != 0, flat["advantages"]

    def loss_fn(stats: TokenStats, index: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert stats.logprob is not None and stats.entropy is not None
        log_ratio = stats.logprob - flat.get("old_logprobs", stats.logprob.detach())
        likelier = torch.exp(log_ratio)
        gain = torch.minimum(
            likelier * advantage, likelier.clamp(1 - epsilon, 1 + high) * advantage
        )
        shares = clip_shares(likelier, advantage, epsilon, high)
        covariance = _covariance(stats.logprob, advantage, weights)
        within = (covariance > bounds[0]) & (covariance < bounds[1])
        is_free = is_active & ~(shares["clip_low"] | shares["clip_high"])
        candidates = (within & is_free).nonzero()[:, 0]
        order = torch.randperm(len(candidates), generator=generator, device="cpu")
        count = max(1, int(ratio * int(is_active.sum())))
        dropped = torch.zeros_like(is_active)
        dropped[candidates[order[:count].to(candidates.device)]] = True
        metrics = {"entropy": stats.entropy, "approx_kl": -log_ratio, **shares, "dropped": dropped}
        return -gain.masked_fill(dropped, 0), metrics if return_metrics else {}

    divisor = zeros_to_one(weights.sum())
    return sum_losses(loss_fn, hidden, weight, targets, weights, divisor, needs_all=True, **head)


def kl_cov_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    ratio: float = 0.0002,
    kl_coef: float = 1.0,
    return_metrics: bool = False,
    **head: Any,
) -> Any:
    """Compute the policy loss with a KL penalty on the tokens that lower entropy most.

    Equivalent to this, for all tokens (N,) of the completions::

        log_ratio = logprob - old_logprobs
        covariance = (advantages - advantages.mean()) * (logprob - logprob.mean()).detach()
        highest = covariance.topk(max(1, int(ratio * len(covariance)))).indices
        penalised = torch.zeros_like(covariance).index_fill(0, highest, 1)
        loss = (kl_coef * penalised * log_ratio.abs() - log_ratio.exp() * advantages).mean()

    Args:
        hidden, weight, targets, mask, advantages, old_logprobs: as in :func:`grpo_loss`.
        ratio: share of the tokens that is penalised, though one at least.
        kl_coef: weight of the penalty.
        return_metrics: also return a dict of detached () means over this call's tokens: "entropy",
            "approx_kl", "penalised" (the share that was).
        head: bias, temperature, logit_scale, softcap, chunk_bytes, process_group and support, as in
            :func:`fused_token_stats`; grad_tolerance has no effect.

    Returns, gradient, precision, memory, raises: as in :func:`clip_cov_loss`.
    Source: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models, arXiv
        2505.22617, with the constants of its KL-Cov for 32B models (0.002 for 7B).
    """
    check_head_arguments("kl_cov_loss", head, "support")
    ratio, kl_coef = _check_share(ratio), check_number("kl_coef", kl_coef)
    flat, weights = per_token(
        hidden, mask, True, targets=targets, advantages=advantages, old_logprobs=old_logprobs
    )
    is_active, advantage = weights.reshape(-1) != 0, flat["advantages"]

    def loss_fn(stats: TokenStats, index: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert stats.logprob is not None and stats.entropy is not None
        log_ratio = stats.logprob - flat.get("old_logprobs", stats.logprob.detach())
        covariance = _covariance(stats.logprob, advantage, weights)
        active = is_active.nonzero()[:, 0]
        count = min(len(active), max(1, int(ratio * len(active))))
        penalised = torch.zeros_like(is_active)
        penalised[active[covariance[active].topk(count).indices]] = True
        losses = kl_coef * (penalised * log_ratio.abs()) - torch.exp(log_ratio) * advantage
        metrics = {"entropy": stats.entropy, "approx_kl": -log_ratio, "penalised": penalised}
        return losses, metrics if return_metrics else {}

    divisor = zeros_to_one(weights.sum())
    return sum_losses(loss_fn, hidden, weight, targets, weights, divisor, needs_all=True, **head)


def _covariance(logprob: Tensor, advantage: Tensor, weights: Tensor) -> Tensor:
    """Return each token's part of the covariance of log-probability and advantage."""
    shares = weights.reshape(-1) / zeros_to_one(weights.sum())
    logprob = logprob.detach()
    return (advantage - (shares * advantage).sum()) * (logprob - (shares * logprob).sum())


def _check_share(ratio: float) -> float:
    if not 0 < check_number("ratio", ratio) <= 1:
        raise ValueError(f"ratio: {ratio} is not in (0, 1]")
    return ratio
