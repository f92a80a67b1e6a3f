"""Entropy, log-probability and their gradients over huge vocabularies, without the logits."""

from .divergence import fused_divergence
from .from_logits import entropy_from_logits
from .functional import fused_entropy_loss, fused_token_loss, fused_token_stats
from .reference import TokenStats
from .tolerance_report import GradientReport, gradient_report

__version__ = "0.1.0"
__all__ = [
    "GradientReport",
    "TokenStats",
    "entropy_from_logits",
    "fused_divergence",
    "fused_entropy_loss",
    "fused_token_loss",
    "fused_token_stats",
    "gradient_report",
]
