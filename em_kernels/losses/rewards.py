"""Rewards of reinforcement learning without a reward model, and advantages from rewards.

A reward takes the TokenStats of completions, fields (..., T), and a mask (..., T) of bool or
weights, 0 outside the completions, where a statistic may be NaN. It returns (...) in nats, 0 where
the mask is 0 throughout. Compute the statistics at the temperature of sampling (the logits in the
equivalent code are already divided by it), and under ``torch.no_grad()``: else the reward has a
gradient too. ValueError and TypeError name the argument.
"""

import math

import torch
from torch import Tensor

from ..ops.checks import check_number, check_per_token
from ..reference import TokenStats
from .averages import zeros_to_one

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
    if not isinstance(vocab_size, int):
        kind = type(vocab_size).__name__
        raise TypeError(f"vocab_size: expected an int, got {kind}; give len(lm_head.weight)")
    if vocab_size < 1:
        raise ValueError(f"vocab_size: {vocab_size} is not an int > 0; give len(lm_head.weight)")
    return _field(stats, "logsumexp") - _field(stats, "mean_logit") - math.log(vocab_size)


def intuitor_reward(stats: TokenStats, mask: Tensor, vocab_size: int) -> Tensor:
    """Average :func:`self_certainty` over each completion's tokens.

    Equivalent to::

        token = -(logits.log_softmax(-1) + math.log(vocab_size)).mean(-1)
        result = (mask * token).sum(-1) / mask.sum(-1)

    Args:
        stats: with logsumexp and mean_logit, (..., T).
        mask: (..., T), 0 outside the completions.
        vocab_size: as in :func:`self_certainty`.

    Returns: (...) in nats, 0 for a completion without tokens.
    Source: Intuitor, arXiv 2505.19590, section 3.2.
    """
    return _masked_mean(self_certainty(stats, vocab_size), mask)


def em_rl_sequence_reward(stats: TokenStats, mask: Tensor) -> Tensor:
    """Sum logprob over each completion's tokens: the log-probability of the completion.

    Equivalent to::

        token = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        result = (mask * token).sum(-1)

    Args:
        stats: with logprob, (..., T).
        mask: (..., T), 0 outside the completions.

    Returns: (...) in nats.
    Source: EM-RL-sequence of The Unreasonable Effectiveness of Entropy Minimization in LLM
        Reasoning, arXiv 2505.15134, equation (3). A public copy of its code takes the mean.
    """
    return _masked_sum(_field(stats, "logprob"), mask)


def em_rl_token_reward(stats: TokenStats, mask: Tensor) -> Tensor:
    """Sum the negative entropies of each completion's tokens.

    Equivalent to::

        logp = logits.log_softmax(-1)
        result = (mask * (logp.exp() * logp).sum(-1)).sum(-1)

    Args:
        stats: with entropy, (..., T).
        mask: (..., T), 0 outside the completions.

    Returns: (...) in nats.
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

    Args:
        stats: with entropy, (..., T).
        mask: (..., T), 0 outside the completions.

    Returns: (...) in nats, 0 for a completion without tokens.
    Source: RENT, arXiv 2505.22660, which takes all tokens and finds that those near the end tell
        most.
    """
    return -_masked_mean(_field(stats, "entropy"), mask)


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    epsilon: float = ADVANTAGE_EPS,
    divide_by_std: bool = True,
) -> Tensor:
    """Compute (reward - mean) / (standard deviation + epsilon) within each group.

    Args:
        rewards: (B,) of any real dtype, with the completions of one prompt adjacent.
        group_size: completions per prompt. A group of 1 has mean 0 and deviation 1, as in verl.
        epsilon: 1e-4 as in TRL; verl and OpenRLHF take 1e-6 and 1e-9.
        divide_by_std: False leaves the division out, as Dr. GRPO does.

    Returns: (B,), fp32 (fp64 for fp64).
    Source: GRPO, arXiv 2402.03300; 1e-4 and division by n - 1 as in TRL 1.16. Dr. GRPO, arXiv
        2503.20783.
    """
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size: {group_size!r} is not an int >= 1")
    if not check_number("epsilon", epsilon) >= 0:
        raise ValueError(f"epsilon: {epsilon} is not >= 0")
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards: expected a tensor, got {type(rewards).__name__}")
    if rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards: {tuple(rewards.shape)} is not whole groups of {group_size}; expected (B,), "
            f"B a multiple of {group_size}"
        )
    groups = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).view(-1, group_size)
    if group_size == 1:
        mean, deviation = torch.zeros_like(groups), torch.ones_like(groups)
    else:
        mean, deviation = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    centred = groups - mean
    return (centred / (deviation + epsilon) if divide_by_std else centred).view(-1)


def entropy_mask(stats: TokenStats, mask: Tensor, keep: float = 0.2) -> Tensor:
    """Select the tokens of highest entropy, those at forks of the reasoning.

    Equivalent to::

        threshold = torch.quantile(entropy[mask != 0], 1 - keep)
        result = (entropy >= threshold) & (mask != 0)

    GRPO on these tokens alone, averaged over all of them as TRL does::

        chosen = entropy_mask(stats, mask)
        loss = grpo_loss(hidden, weight, tokens, mask=mask, advantages=advantages[:, None] * chosen)

    Args:
        stats: with entropy, (...).
        mask: (...), 0 outside the completions, where entropy may be NaN.
        keep: share of the tokens kept, in [0, 1]; equal entropies are kept together, so at 0 the
            highest remains.

    Returns:
        (...) bool.

    Source: Beyond the 80/20 Rule, arXiv 2506.01939, which keeps 20 % of a batch's tokens.
    """
    if not 0 <= check_number("keep", keep) <= 1:
        raise ValueError(f"keep: {keep} is not in [0, 1]")
    entropy = _field(stats, "entropy").detach()
    check_per_token("mask", mask, entropy[..., None])
    active = mask != 0
    values = entropy[active].sort().values
    if len(values) == 0:
        return active
    # torch.quantile takes at most 2^24 values; this is its linear interpolation.
    place = round((1 - keep) * (len(values) - 1), 6)
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    threshold = torch.lerp(values[low], values[high], place - low)
    return (entropy >= threshold) & active


def _field(stats: TokenStats, name: str) -> Tensor:
    value = getattr(stats, name, None)
    if not isinstance(value, Tensor):  # a plain tensor has a method logsumexp
        raise ValueError(f"stats: has no {name}; ask for it by fused_token_stats(..., stats=...)")
    return value


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    check_per_token("mask", mask, values[..., None])
    return (mask.to(values.dtype) * values.masked_fill(mask == 0, 0)).sum(-1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return _masked_sum(values, mask) / zeros_to_one(mask.to(values.dtype).sum(-1))
