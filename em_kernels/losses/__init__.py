"""Losses on given tokens, policy losses, and rewards that need no reward model."""

from .covariance import clip_cov_loss, kl_cov_loss
from .policy import LOSS_TYPES, grpo_loss
from .rewards import (
    em_rl_sequence_reward,
    em_rl_token_reward,
    entropy_mask,
    group_advantages,
    intuitor_reward,
    rent_reward,
    self_certainty,
)
from .supervised import cross_entropy, dft_loss, eaft_loss

__all__ = [
    "LOSS_TYPES",
    "clip_cov_loss",
    "cross_entropy",
    "dft_loss",
    "eaft_loss",
    "em_rl_sequence_reward",
    "em_rl_token_reward",
    "entropy_mask",
    "group_advantages",
    "grpo_loss",
    "intuitor_reward",
    "kl_cov_loss",
    "rent_reward",
    "self_certainty",
]
