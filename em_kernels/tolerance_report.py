"""Report on a gradient tolerance: the work it saved, and the gradient it dropped."""

from typing import NamedTuple

from torch import Tensor


class GradientReport(NamedTuple):
    """Work saved and gradient dropped by a tolerance.

    Each share is (), on the loss's device, and reading it synchronises. With a process_group they
    describe this rank's part of the vocabulary.
    """

    active_share: Tensor
    """Share A of the vocabulary that the backward multiplied; its work is A times the exact one's.

    At 1 the tolerance saves nothing, as the distributions are too flat for it.
    """
    dropped_share: Tensor
    """Share of the L1 mass of d loss / d logits dropped, over the chunks that dropped any."""
    why_exact: str = ""
    """Why the tolerance was not used at all: it could not pay, by shapes and dtypes. Else empty."""


def gradient_report(loss: Tensor) -> GradientReport:
    """Report what the gradient tolerance of a loss saved and dropped.

    Args:
        loss: returned by :func:`em_kernels.fused_entropy_loss` ("mean" or "sum") or
            :func:`em_kernels.fused_token_loss`, with grad; also by
            :func:`em_kernels.fused_divergence`, which takes no tolerance and drops nothing.

    Raises: ValueError for any other tensor, also for one that torch.compile returned.
    """
    node = getattr(loss, "grad_fn", None)
    report = getattr(node, "report", None)
    if report is None:
        raise ValueError(
            'loss: carries no report; give what fused_entropy_loss ("mean" or "sum") or '
            "fused_token_loss returned, before any other operation, with grad, and not compiled"
        )
    return GradientReport(report[0], report[1], getattr(node, "why_exact", ""))
