"""Divergence of two heads in plain, differentiable PyTorch, which every kernel is tested against.

Symbols and equations (1)-(9) are those of reference.py; p is the model's distribution:

    (10) divergence from a reference q: beta = 0: KL(q || p); beta = 1: KL(p || q); between them
        beta KL(q || r) + (1 - beta) KL(p || r), r = beta q + (1 - beta) p. Each KL(a || b) is
        summed as a log(a / b) - a + b: no term is negative, and where a is near b errors of the
        two log s cancel
    (11) its gradient: beta = 0: dz_j = p_j - q_j; else dz_j = f p_j (l_j - c), c = sum_j p_j l_j,
        with l_j = log(p_j / r_j) - log(p_a / r_a) for the argmax a of p, so that a confident
        model's gradient keeps its digits; beta = 1: f = 1 and r = q; between them f = 1 - beta
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import RowTransform, row_parts, transform


class DivergenceTerms(NamedTuple):
    """The terms of equations (10) and (11)."""

    y: Tensor  # (rows, V) raw logits
    row: RowTransform
    ref_y: Tensor  # (rows, V) of the reference
    ref_row: RowTransform
    # (7, rows): m, log s, the reference's m, log s; log(p / q) at p's argmax; c; the row's weight
    per_row: Tensor
    beta: float


def divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    beta: float = 1.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
) -> Tensor:
    """Compute ``fused_divergence`` with reduction "none" in plain torch, with all logits."""
    columns = min(len(weight), len(ref_weight))
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    log_probabilities = []
    for h, w, b, scale, cap in (
        (hidden, weight, bias, logit_scale, softcap),
        (ref_hidden.detach(), ref_weight.detach(), ref_bias, ref_logit_scale, ref_softcap),
    ):
        rows, b = h.reshape(-1, h.shape[-1]).to(dtype), None if b is None else b[:columns].to(dtype)
        y = torch.nn.functional.linear(rows, w[:columns].to(dtype), b)
        tau = torch.as_tensor(temperature, dtype=dtype, device=y.device).reshape(-1).expand(len(y))
        z = transform(y, RowTransform(None, 1 / tau, scale, cap))
        parts = row_parts(z)
        log_probabilities.append((z - parts.m[:, None]) - torch.log1p(parts.s1)[:, None])
    log_p, log_q = log_probabilities
    return divergence_sums(log_p, log_q, log_p[:, 0], beta)[0].reshape(hidden.shape[:-1])


def divergence_sums(log_p: Tensor, log_q: Tensor, pivot: Tensor, beta: float) -> Tensor:
    """Return the sums (2, rows) of (10), and c of (11), over log-probabilities (rows, V)."""
    p, q, log_ratio = torch.exp(log_p), torch.exp(log_q), _log_ratio(log_p, log_q)
    if beta == 0:
        value = _excess(q, p, -log_ratio).sum(1)
        return torch.stack([value, torch.zeros_like(value)])
    of_p = _log_p_over_r(log_ratio, beta)
    centre = _times(p, of_p - _log_p_over_r(pivot, beta)[:, None])
    if beta == 1:
        value = _excess(p, q, log_ratio)
    else:
        mixture, of_q = beta * q + (1 - beta) * p, -_log_mixture(log_ratio, 1 - beta, beta)
        value = (1 - beta) * _excess(p, mixture, of_p) + beta * _excess(q, mixture, of_q)
    return torch.stack([value.sum(1), centre.sum(1)])


def divergence_row_gradient(
    log_p: Tensor, log_q: Tensor, pivot: Tensor, centre: Tensor, beta: float
) -> Tensor:
    """Compute dz (11), (rows, V); 0 where p is."""
    p, log_ratio = torch.exp(log_p), _log_ratio(log_p, log_q)
    if beta == 0:
        below = torch.exp(log_q) * torch.expm1(log_ratio.clamp(max=0))
        dz = torch.where(log_ratio < 0, below, -p * torch.expm1(-log_ratio))
    else:
        of_p = _log_p_over_r(log_ratio, beta) - _log_p_over_r(pivot, beta)[:, None]
        dz = (1 if beta == 1 else 1 - beta) * p * (of_p - centre[:, None])
    return dz.masked_fill(log_p == -torch.inf, 0) + (centre - centre)[:, None]


def _log_p_over_r(log_ratio: Tensor, beta: float) -> Tensor:
    """Return log(p / r) from log(p / q); at beta = 1 r is q."""
    return log_ratio if beta == 1 else -_log_mixture(-log_ratio, beta, 1 - beta)


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return log(p / q); 0 where both are 0."""
    return torch.where(log_p == log_q, 0, log_p - log_q)


def _times(p: Tensor, log_ratio: Tensor) -> Tensor:
    """Return p log(p / q), 0 where p is 0, inf where only q is."""
    finite = log_ratio.masked_fill(log_ratio.isinf(), 0)
    return torch.where(log_ratio == torch.inf, torch.inf, p * finite)


def _excess(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """Return p log(p / q) - p + q >= 0 without cancellation where p is near q."""
    is_near = log_ratio.abs() < 0.25
    x = torch.where(is_near, log_ratio, 0)
    return torch.where(is_near, p * (x + torch.expm1(-x)), _times(p, log_ratio) - p + q)


def _log_mixture(x: Tensor, share: float, rest: float) -> Tensor:
    """Return log(rest + share e^x), for share + rest = 1, exact near x = 0."""
    x = x.clamp(max=80)  # beyond it what this is multiplied by is below e^-80
    change = share * torch.expm1(x)
    is_near = change > -0.5
    near = torch.log1p(torch.where(is_near, change, 0))
    return torch.where(is_near, near, torch.log(rest + share * torch.exp(x)))
