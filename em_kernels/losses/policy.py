"""GRPO's loss and its relatives."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.checks import check_number, check_per_token
from ..reference import TokenStats
from .averages import (
    check_head_arguments,
    clip_shares,
    count_tensor,
    per_token,
    sum_losses,
    zeros_to_one,
)

CLIPPED = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "seq-mean-token-mean", "seq-mean-token-sum")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
CISPO_MAX = 5.0  # ScaleRL, arXiv 2510.13786
# arXiv 2602.10693: k and lambda for advantages >= 0, and for those below.
VESPO_SHAPES = ((2.0, 3.0), (3.0, 2.0))
VESPO_LOG_RANGE = (math.log(1e-8), 20.0)


class _Limits(NamedTuple):
    """How far the ratio of probabilities may go."""

    loss_type: str
    low: float
    high: float
    delta: float | None
    sapo_temperatures: tuple[float, float]


def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    bias_corrected_kl: bool = False,
    entropy_coef: float = 0.0,
    loss_type: str = "bnpo",
    importance_sampling_level: str = "token",
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: float | None = None,
    return_metrics: bool = False,
    **head: Any,
) -> Any:
    """Compute GRPO's clipped policy loss, with KL to a reference and a bonus on entropy.

    Equivalent to this, for completions (B, T) of log-probability `logprob` and entropy `entropy`::

        log_ratio = logprob - old_logprobs
        if importance_sampling_level == "sequence":
            log_ratio = ((mask * log_ratio).sum(-1) / mask.sum(-1).clamp(min=1))[:, None]
        ratio = torch.exp(log_ratio)
        gain = torch.minimum(
            ratio.clamp(max=delta) * advantages[:, None],
            ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages[:, None],
        )
        gain = {
            "cispo": ratio.clamp(max=epsilon_high).detach() * advantages[:, None] * logprob,
            "sapo": 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages[:, None],
        }.get(loss_type, gain)
        away = ref_logprobs - logprob
        kl = (away.exp() - away - 1) * (ratio if bias_corrected_kl else 1)
        losses = mask * (beta * kl - importance_weights * gain)
        full = (mask.sum(-1) > 0).sum()
        means = losses.sum(-1) / mask.sum(-1).clamp(min=1)
        loss = {
            "grpo": means.mean(),
            "sapo": means.mean(),
            "bnpo": losses.sum() / mask.sum(),
            "dapo": losses.sum() / num_items_in_batch,
            "cispo": losses.sum() / num_items_in_batch,
            "dr_grpo": losses.sum() / (len(mask) * max_completion_length),
            "luspo": losses.sum(-1).mean(),
            "seq-mean-token-mean": means.sum() / full,
            "seq-mean-token-sum": losses.sum() / full,
        }[loss_type] - entropy_coef * (mask * entropy).sum() / mask.sum()

    GSPO is ``importance_sampling_level="sequence", loss_type="grpo", epsilon=3e-4,
    epsilon_high=4e-4``; PPO's dual clip is ``delta=3.0``. For completions sampled by another engine
    ``importance_weights=torch.exp(old_logprobs - sampler_logprobs).clamp(max=3.0)``.

    Args:
        hidden: (..., T, D), the states that the tokens of `targets` were sampled from.
        weight: (V, D) of the output head.
        targets: (..., T) int64 tokens.
        mask: (..., T), 0 outside the completions, where every input may be NaN, and targets are any
            token or -100.
        advantages: (...) one per completion, or (..., T) one per token.
        old_logprobs: (..., T) of the policy that sampled; None: of this one, so the ratio is 1.
        ref_logprobs: (..., T) of the reference model; needed unless beta is 0.
        importance_weights: (...) or (..., T), factors of the loss without KL and entropy; for
            "vespo" (..., T).
        epsilon, epsilon_high: distances below and above 1 at which the ratio is clipped;
            epsilon_high defaults to epsilon. For "cispo" epsilon_high is the largest ratio, by
            default 5.
        delta: largest ratio where the advantage is negative, which clipping alone leaves unbounded;
            more than 1 + epsilon_high. None: no limit.
        beta: weight of the KL from the reference model.
        bias_corrected_kl: multiply the KL's estimate by the ratio, so that the gradient's
            expectation is that of the KL.
        entropy_coef: > 0 rewards entropy, < 0 minimises it; it always applies to the mean over this
            call's tokens.
        loss_type: "grpo" averages the completions' means, "bnpo" this call's tokens; "dapo", TRL's
            default, and "dr_grpo" divide the sum by a given number; "luspo" averages the
            completions' sums. verl's "seq-mean-token-mean" and "seq-mean-token-sum" do not count
            empty completions. "cispo" (averaged as "dapo") and "sapo" (as "grpo") limit the ratio
            in other ways. "vespo" (as "dapo") weighs each completion by a function of its
            probability's ratio.
        importance_sampling_level: "token", or "sequence" for one ratio a completion.
        sapo_temperatures: tau of tokens with positive, and with other advantages.
        num_items_in_batch: a number or tensor (), for "dapo", "cispo" and "vespo": the number of
            tokens in all calls whose gradients are summed; if processes average their gradients,
            count one process's calls only. For verl's types the number of completions that are not
            empty, by default this call's. Other types do not use it.
        max_completion_length: for "dr_grpo": the number of tokens that each completion counts as.
        return_metrics: also return a dict of detached () means over this call's tokens: "entropy";
            "approx_kl" of old_logprobs minus logprob; "kl" to the reference where that is given;
            "clip_low", "clip_high" and "clip_delta", shares of the tokens that each limit holds.
        head: bias, temperature, logit_scale, softcap, grad_tolerance, chunk_bytes and
            process_group, as in :func:`fused_token_loss`; and support, the ids that top-k or top-p
            sampling kept, as in :func:`fused_token_stats`.

    Returns:
        () fp32 (fp64 for fp64); 0 where the mask is 0 throughout. With return_metrics (loss,
        metrics).

    Gradient, precision, memory: as in :func:`fused_token_loss`, which is called once. What needs a
        completion's tokens all at once, "sequence" and "vespo", or has a support, is one call of
        :func:`fused_token_stats`, and always exact.
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward.
    Source: GRPO, arXiv 2402.03300; names, averages and entropy as in TRL 1.16's GRPOTrainer. DAPO,
        arXiv 2503.14476; Dr. GRPO, 2503.20783; GSPO, 2507.18071; LUSPO, 2602.05261; CISPO,
        2506.13585 and 2510.13786; SAPO, 2511.20347; VESPO, 2602.10693; delta: dual clip, 1912.09729
        and INTELLECT-2, 2505.07291; bias-corrected KL: DeepSeek-V3.2, 2512.02556.
    """
    check_head_arguments("grpo_loss", head, "support")
    if importance_sampling_level not in LEVELS:
        known = ", ".join(LEVELS)
        raise ValueError(
            f"importance_sampling_level: {importance_sampling_level!r} is unknown; use one of "
            f"{known}"
        )
    high = (
        (CISPO_MAX if loss_type == "cispo" else epsilon) if epsilon_high is None else epsilon_high
    )
    limits = _check_limits(_Limits(loss_type, epsilon, high, delta, sapo_temperatures))
    beta, entropy_coef = check_number("beta", beta), check_number("entropy_coef", entropy_coef)
    if beta != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: is None with beta = {beta}; give them, or beta=0")
    if loss_type == "vespo" and importance_weights is not None:
        check_per_token("importance_weights", importance_weights, hidden)
    needs_all = loss_type == "vespo" or importance_sampling_level == "sequence"
    needs_all = needs_all or head.get("support") is not None
    flat, weights = per_token(
        hidden,
        mask,
        needs_all,
        targets=targets,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
    )
    divisor = _divisor(loss_type, weights, num_items_in_batch, max_completion_length)
    # The mask passed below divides losses by the divisor; entropy is divided by the token count.
    tokens = zeros_to_one(weights.sum())
    entropy_weights = (entropy_coef * divisor / tokens).expand(weights.shape).reshape(-1)

    def loss_fn(stats: TokenStats, index: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert stats.logprob is not None and stats.entropy is not None
        logprob, given = stats.logprob, {name: x[index] for name, x in flat.items()}
        log_ratio = logprob - given.get("old_logprobs", logprob.detach())
        advantage, factors = given["advantages"], given.get("importance_weights")
        if importance_sampling_level == "sequence":
            ratio = torch.exp(_over_completions(log_ratio, weights, mean=True))
        else:
            ratio = torch.exp(log_ratio)
        if loss_type == "vespo":
            of_completion = _vespo_weights(log_ratio, advantage, factors, weights)
            losses = -(of_completion * advantage * logprob)
        else:
            losses = _policy_losses(limits, logprob, ratio, advantage)
            losses = losses if factors is None else losses * factors
        metrics = {"entropy": stats.entropy, "approx_kl": -log_ratio} if return_metrics else {}
        if "ref_logprobs" in given and (beta != 0 or return_metrics):
            away = given["ref_logprobs"] - logprob
            kl = torch.expm1(away) - away
            kl = kl * ratio if bias_corrected_kl else kl
            losses = losses + beta * kl if beta != 0 else losses
            metrics |= {"kl": kl} if return_metrics else {}
        metrics |= _clip_metrics(limits, ratio, advantage) if return_metrics else {}
        return losses - entropy_weights[index] * stats.entropy, metrics

    return sum_losses(
        loss_fn, hidden, weight, targets, weights, divisor, needs_all=needs_all, **head
    )


def _check_limits(limits: _Limits) -> _Limits:
    loss_type, low, high, delta, temperatures = limits
    if loss_type not in LOSS_TYPES:
        known = ", ".join(LOSS_TYPES)
        raise ValueError(f"loss_type: {loss_type!r} is unknown; use one of {known}")
    for name, value in (("epsilon", low), ("epsilon_high", high)):
        if not check_number(name, value) >= 0:
            raise ValueError(f"{name}: {value} is not >= 0")
    if delta is not None and loss_type not in CLIPPED:
        raise ValueError(f"delta: loss_type {loss_type!r} limits the ratio itself; leave it None")
    if delta is not None and not check_number("delta", delta) > 0:
        raise ValueError(f"delta: {delta} is not > 0")
    is_pair = isinstance(temperatures, Sequence) and len(temperatures) == 2
    if not is_pair or not all(check_number("sapo_temperatures", tau) > 0 for tau in temperatures):
        raise ValueError(f"sapo_temperatures: {temperatures} is not two numbers > 0")
    return limits


def _policy_losses(limits: _Limits, logprob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
    loss_type, low, high, delta, temperatures = limits
    if loss_type == "cispo":
        return -(ratio.clamp(max=high).detach() * advantage * logprob)
    if loss_type == "sapo":
        # The gate has slope 1 at ratio 1, and is flat far from it.
        positive, other = temperatures
        tau = torch.full_like(ratio, other).masked_fill(advantage > 0, positive)
        return -(torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage)
    limited = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(limited * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def _clip_metrics(limits: _Limits, ratio: Tensor, advantage: Tensor) -> dict[str, Tensor]:
    """Return which tokens' ratios are held by a limit."""
    loss_type, low, high, delta, _ = limits
    if loss_type == "cispo":
        return {"clip_high": (ratio > high) & (advantage > 0)}
    if loss_type not in CLIPPED:
        return {}
    found = clip_shares(ratio, advantage, low, high)
    return found if delta is None else found | {"clip_delta": (ratio > delta) & (advantage < 0)}


def _divisor(
    loss_type: str, weights: Tensor, count: float | Tensor | None, length: float | None
) -> Tensor:
    """Return what a sum of losses is divided by, () or one per completion (..., 1)."""
    completions = weights.shape[:-1].numel()
    if loss_type == "bnpo":
        return zeros_to_one(weights.sum())
    if loss_type in ("dapo", "cispo", "vespo"):
        return count_tensor("num_items_in_batch", count, weights)
    if loss_type == "dr_grpo":
        return completions * count_tensor("max_completion_length", length, weights)
    if loss_type == "luspo":
        return weights.new_tensor(float(completions))
    lengths = zeros_to_one(weights.sum(-1, keepdim=True))
    if loss_type in ("grpo", "sapo"):
        return completions * lengths
    if count is None:
        full = zeros_to_one((weights != 0).any(-1).sum()).to(weights)
    else:
        full = count_tensor("num_items_in_batch", count, weights)
    return full * lengths if loss_type == "seq-mean-token-mean" else full


def _over_completions(values: Tensor, weights: Tensor, mean: bool) -> Tensor:
    """Return each token's sum or mean of values (N,) over its completion."""
    total = (weights * values.view(weights.shape)).sum(-1, keepdim=True)
    if mean:
        total = total / zeros_to_one(weights.sum(-1, keepdim=True))
    return total.expand(weights.shape).reshape(-1)


@torch.no_grad()
def _vespo_weights(
    log_ratio: Tensor, advantage: Tensor, factors: Tensor | None, weights: Tensor
) -> Tensor:
    """Return e^lambda w^k e^(-lambda w) of each completion's ratio of probabilities w."""
    logs = log_ratio.clamp(-20, 20)
    if factors is not None:
        logs = logs + factors.log().clamp(*VESPO_LOG_RANGE)
    log_w = _over_completions(logs, weights, mean=False).clamp(*VESPO_LOG_RANGE)
    (k_up, lambda_up), (k_down, lambda_down) = VESPO_SHAPES
    k = torch.where(advantage >= 0, k_up, k_down)
    decay = torch.where(advantage >= 0, lambda_up, lambda_down)
    return torch.exp(decay + k * log_w - decay * log_w.exp())
