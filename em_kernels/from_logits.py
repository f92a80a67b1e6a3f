"""The entropy of logits that already exist."""

from torch import Tensor

from .ops import torch_library
from .ops.checks import check_float, check_transform


def entropy_from_logits(logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Compute the entropy of logits that already exist.

    The forward needs no second tensor of their size. Equivalent to
    ``torch.distributions.Categorical(logits=logits.float() / temperature).entropy()``,
    with -inf allowed.

    Args:
        logits: (..., V) fp32, bf16, fp16, or fp64.
        temperature: > 0; a number, or (...) one per row.

    Returns:
        (...) entropy in nats, fp32 (fp64 for fp64).

    Gradient: for logits, in their dtype. No second derivatives.
    Precision: fp32 statistics whatever the logits' dtype.
    Memory: 16 MiB of work space; the gradient in the backward; a copy of logits whose leading
        dimensions no view can flatten, such as logits[:, :-1].
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward.
    Source: equations (1)-(3) and (8) of ``em_kernels.reference``.
    """
    check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected (..., V) with V > 0, got {tuple(logits.shape)}")
    temperatures, scalars = check_transform(temperature, 1.0, None, logits)
    flat = logits.reshape(-1, logits.shape[-1])
    entropy, *_ = torch_library.entropy_from_logits_op(flat, temperatures, scalars[2])
    return entropy.clone().reshape(logits.shape[:-1])  # the backward needs the op's own output
