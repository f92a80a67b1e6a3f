"""Rewards and losses of reinforcement learning without a reward model.

A reward takes the TokenStats of completions, fields (..., T), and a mask (..., T) of bool or
weights, 0 outside the completions, where a statistic may be NaN. It returns (...) in nats, 0 where
the mask is 0 throughout. Compute the statistics at the temperature of sampling (the logits in the
equivalent code are already divided by it), and under ``torch.no_grad()``: else the reward has a
gradient too. ValueError and TypeError name the argument.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .functional import REDUCTIONS, fused_token_loss, fused_token_stats
from .ops.checks import check_float, check_number, check_per_token
from .reference import TokenStats

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
ADVANTAGE_EPS = 1e-4  # TRL 1.16


def self_certainty(stats: TokenStats, vocab_size: int) -> Tensor:
    """Compute each token's self-certainty: KL(uniform || p) = logsumexp - mean_logit - log V.

    Equivalent to::

        result = -(logits.log_softmax(-1) + math.log(vocab_size)).mean(-1)

    Args:
        stats: with logsumexp and mean_logit, (...).
        vocab_size: V, of the whole vocabulary if that is split over ranks.

    Returns:
        (...) in nats: >= 0 but for rounding errors relative to the logits; inf where a logit is
            -inf.

    Source: Intuitor, arXiv 2505.19590, section 3.2. Public copies of its code leave log V out,
        which does not change an advantage within a group.
    """
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ValueError(f"vocab_size: {vocab_size!r} is not an int > 0; give len(lm_head.weight)")
    return _field(stats, "logsumexp") - _field(stats, "mean_logit") - math.log(vocab_size)


def intuitor_reward(stats: TokenStats, mask: Tensor, vocab_size: int) -> Tensor:
    """Average :func:`self_certainty` over each completion's tokens.

    Equivalent to::

        token = -(logits.log_softmax(-1) + math.log(vocab_size)).mean(-1)
        result = (mask * token).sum(-1) / mask.sum(-1)

    Source: Intuitor, arXiv 2505.19590, section 3.2.
    """
    return _masked_mean(self_certainty(stats, vocab_size), mask)


def em_rl_sequence_reward(stats: TokenStats, mask: Tensor) -> Tensor:
    """Sum logprob over each completion's tokens: the log-probability of the completion.

    Equivalent to::

        token = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        result = (mask * token).sum(-1)

    Source: EM-RL-sequence of The Unreasonable Effectiveness of Entropy Minimization in LLM
        Reasoning, arXiv 2505.15134, equation (3). A public copy of its code takes the mean.
    """
    return _masked_sum(_field(stats, "logprob"), mask)


def em_rl_token_reward(stats: TokenStats, mask: Tensor) -> Tensor:
    """Sum the negative entropies of each completion's tokens.

    Equivalent to::

        logp = logits.log_softmax(-1)
        result = (mask * (logp.exp() * logp).sum(-1)).sum(-1)

    Source: EM-RL-token, arXiv 2505.15134, equation (4). A public copy of its code takes the mean,
        as :func:`rent_reward` does.
    """
    return -_masked_sum(_field(stats, "entropy"), mask)


def rent_reward(stats: TokenStats, mask: Tensor) -> Tensor:
    """Average the negative entropies of each completion's tokens.

    Equivalent to::

        logp = logits.log_softmax(-1)
        result = (mask * (logp.exp() * logp).sum(-1)).sum(-1) / mask.sum(-1)

    The mask may select tokens, such as each completion's last 2:

    >>> mask = torch.tensor([[0, 1, 1, 1, 1, 0]])
    >>> mask * (mask.flip(-1).cumsum(-1).flip(-1) <= 2)
    tensor([[0, 0, 0, 1, 1, 0]])

    Source: RENT, arXiv 2505.22660, which takes all tokens and finds that those near the end tell
        most.
    """
    return -_masked_mean(_field(stats, "entropy"), mask)


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Compute (reward - mean) / (standard deviation + 1e-4) within each group.

    Args:
        rewards: (B,), with the completions of one prompt adjacent.
        group_size: completions per prompt, >= 2.

    Source: GRPO, arXiv 2402.03300; 1e-4 and division by n - 1 as in TRL 1.16.
    """
    if not isinstance(group_size, int) or group_size < 2:
        raise ValueError(f"group_size: {group_size!r} is not an int >= 2; sample more per prompt")
    if rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(f"rewards: {tuple(rewards.shape)} is not whole groups of {group_size}")
    groups = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)
    spread = groups.std(1, keepdim=True) + ADVANTAGE_EPS
    return ((groups - groups.mean(1, keepdim=True)) / spread).view(-1)


def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    loss_type: str = "bnpo",
    num_items_in_batch: float | None = None,
    max_completion_length: float | None = None,
    **head: Any,
) -> Tensor:
    """Compute GRPO's clipped policy loss, with KL to a reference and a bonus on entropy.

    Equivalent to this, for completions (B, T) of log-probability `logprob` and entropy `entropy`::

        ratio = torch.exp(logprob - old_logprobs)
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
        gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
        log_ratio = ref_logprobs - logprob
        losses = mask * (beta * (log_ratio.exp() - log_ratio - 1) - gain)
        loss = {
            "grpo": (losses.sum(-1) / mask.sum(-1).clamp(min=1)).mean(),
            "bnpo": losses.sum() / mask.sum(),
            "dapo": losses.sum() / num_items_in_batch,
            "dr_grpo": losses.sum() / (len(mask) * max_completion_length),
        }[loss_type] - entropy_coef * (mask * entropy).sum() / mask.sum()

    Args:
        hidden: (..., T, D), the states that the tokens of `targets` were sampled from.
        weight: (V, D) of the output head.
        targets: (..., T) int64 tokens.
        mask: (..., T), 0 outside the completions, where every input may be NaN, and targets are any
            token or -100.
        advantages: (...) one per completion, or (..., T) one per token.
        old_logprobs: (..., T) of the policy that sampled; None: of this one, so the ratio is 1.
        ref_logprobs: (..., T) of the reference model; needed unless beta is 0.
        epsilon, epsilon_high: distances below and above 1 at which the ratio is clipped;
            epsilon_high defaults to epsilon.
        beta: weight of the KL.
        entropy_coef: > 0 rewards entropy, < 0 minimises it; it always applies to the mean over this
            call's tokens.
        loss_type: "grpo" averages the completions' means, "bnpo" this call's tokens; "dapo" and
            "dr_grpo" divide the sum by a given number.
        num_items_in_batch: for "dapo": the number of tokens in all calls whose gradients are
            summed; if processes average their gradients, count one process's calls only.
        max_completion_length: for "dr_grpo".
        head: bias, temperature, softcap, grad_tolerance, process_group and others, as in
            :func:`fused_token_loss`.

    Returns:
        () fp32 (fp64 for fp64); 0 where the mask is 0 throughout.

    Gradient, precision, memory: as in :func:`fused_token_loss`, which is called once.
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward.
    Source: GRPO, arXiv 2402.03300; names, averages and entropy as in TRL 1.16's GRPOTrainer (DAPO,
        arXiv 2503.14476; Dr. GRPO, arXiv 2503.20783) with importance sampling per token.
    """
    check_float("hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(f"hidden: expected (..., T, D), got {tuple(hidden.shape)}")
    high = epsilon if epsilon_high is None else epsilon_high
    for name, value in (("epsilon", epsilon), ("epsilon_high", high)):
        if not check_number(name, value) >= 0:
            raise ValueError(f"{name}: {value} is not >= 0")
    beta, entropy_coef = check_number("beta", beta), check_number("entropy_coef", entropy_coef)
    if beta != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: is None with beta = {beta}; give them, or beta=0")
    if isinstance(advantages, Tensor) and advantages.shape == hidden.shape[:-2]:
        advantages = advantages[..., None].expand(hidden.shape[:-1])
    given = {"targets": targets, "mask": mask, "advantages": advantages}
    optional = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    given |= {name: x for name, x in optional.items() if x is not None}
    for name, x in given.items():
        check_per_token(name, x, hidden)
    weights = mask.to(torch.promote_types(hidden.dtype, torch.float32))
    tokens, completions = _zeros_to_one(weights.sum()), hidden.shape[:-2].numel()
    if loss_type == "grpo":
        divisor = completions * _zeros_to_one(weights.sum(-1, keepdim=True))
    elif loss_type == "bnpo":
        divisor = tokens
    elif loss_type == "dapo":
        divisor = tokens.new_tensor(_check_positive("num_items_in_batch", num_items_in_batch))
    elif loss_type == "dr_grpo":
        length = _check_positive("max_completion_length", max_completion_length)
        divisor = tokens.new_tensor(completions * length)
    else:
        known = ", ".join(LOSS_TYPES)
        raise ValueError(f"loss_type: {loss_type!r} is unknown; use one of {known}")
    flat = {name: x.reshape(-1) for name, x in given.items()}
    # The mask passed below divides losses by the divisor; entropy is divided by the token count.
    entropy_weights = (entropy_coef * divisor / tokens).expand(mask.shape).reshape(-1)

    def loss_fn(stats: TokenStats, index: Tensor) -> Tensor:
        assert stats.logprob is not None and stats.entropy is not None
        old = flat["old_logprobs"][index] if "old_logprobs" in flat else stats.logprob.detach()
        ratio, advantage = torch.exp(stats.logprob - old), flat["advantages"][index]
        losses = -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)
        if beta != 0:
            log_ratio = flat["ref_logprobs"][index] - stats.logprob
            losses = losses + beta * (torch.expm1(log_ratio) - log_ratio)
        return losses - entropy_weights[index] * stats.entropy

    return fused_token_loss(hidden, weight, targets, loss_fn, mask=weights / divisor, **head)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities of labels, and entropies, with the signature of verl's function.

    Equivalent to::

        logp = (F.linear(hidden, weight) / temperature).log_softmax(-1).flatten(0, -2)
        logprobs = logp.gather(-1, labels.reshape(-1, 1))[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)

    Args:
        hidden: (..., D), N tokens.
        weight: (V, D).
        temperature: > 0.
        labels: N of any shape, int64; the log-probability of -100 is 0.
        reduction: of the log-probabilities: "none" (N,), "sum" () or "mean" (), divided by N.
        group: ranks that each hold consecutive rows of the weight.

    Returns:
        (log-probabilities, entropies (N,)) in nats, fp32 (fp64 for fp64), flat as verl's.

    Gradient, precision, memory: as in :func:`fused_token_stats`. With a group every rank gets the
        whole dhidden, whereas verl's backward returns each rank's part: code that sums the parts
        over ranks must not do so here.
    Raises: as :func:`fused_token_stats`, with labels for targets and group for process_group.
    Source: verl 0.9.1, verl/utils/kernel/linear_cross_entropy.py. Beyond it, this function runs on
        any device and D, with shards of different sizes, and takes labels of -100.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is unknown; use one of {', '.join(REDUCTIONS)}")
    check_float("hidden", hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat = labels.reshape(-1) if isinstance(labels, Tensor) else labels
    check_per_token("labels", flat, rows)
    stats = fused_token_stats(rows, weight, flat, temperature=temperature, process_group=group)
    assert stats.logprob is not None and stats.entropy is not None
    if reduction == "none":
        return stats.logprob, stats.entropy
    total = stats.logprob.sum()
    return total if reduction == "sum" else total / max(1, len(rows)), stats.entropy


def _field(stats: TokenStats, name: str) -> Tensor:
    value = getattr(stats, name)
    if value is None:
        raise ValueError(f"stats: has no {name}; ask for it by fused_token_stats(..., stats=...)")
    return value


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    check_per_token("mask", mask, values[..., None])
    return (mask.to(values.dtype) * values.masked_fill(mask == 0, 0)).sum(-1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return _masked_sum(values, mask) / _zeros_to_one(mask.to(values.dtype).sum(-1))


def _zeros_to_one(count: Tensor) -> Tensor:
    return torch.where(count == 0, 1, count)


def _check_positive(name: str, value: float | None) -> float:
    if value is None or not check_number(name, value) > 0:
        raise ValueError(f"{name}: is {value}; this loss_type needs a number > 0")
    return float(value)
