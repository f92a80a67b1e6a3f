"""Equations (1)-(9) in plain, differentiable PyTorch, which every kernel is tested against.

Symbols: N tokens, D hidden size, V vocabulary size. For one token with raw logits y (V,):

    u = logit_scale * y;  c = softcap * tanh(u / softcap), or u;  z = c / temperature
    (1) m = max_j z_j;  s' = sum over j != argmax of e^(z_j - m);  s = 1 + s';
        t = sum_j e^(z_j - m) (z_j - m)
    (2) log s = log1p(s');  logsumexp = m + log s
    (3) entropy = log s - t / s                                        [nats]
    (4) log p_j = (z_j - m) - log s;  logprob = log p_target, 0 where the target is -100
    (5) mean_logit = (1/V) sum_j z_j
    (6) log_collision = log sum_j p_j^2 = log q - 2 log s,  q = sum_j e^(2 (z_j - m))
    (7) two parts of one vocabulary merge with r_i = e^(m_i - max m): s = sum r_i s_i,
        t = sum r_i (t_i + s_i (m_i - m)), q = sum r_i^2 q_i, sums of z add
    (8) gradient, with upstream gH, gl, gL, ga, gR of the five statistics:
        dz_j = p_j (alpha + beta log p_j + rho p_j) + gamma [j = target] + delta
        beta = -gH;  alpha = -gH H - gl + gL - 2 gR;  gamma = gl;  delta = ga / V;
        rho = 2 gR / sum_j p_j^2
        with several targets: -G p_j in place of -gl p_j, where G sums the targets' g_k; at target k
        -g_k expm1(log p_k) - p_k (G - g_k), where equal targets' g are one g_k
        dy_j = dz_j / temperature * (1 - (c_j / softcap)^2) * logit_scale
    (9) dhidden = dy W;  dW = dy^T hidden;  dbias = sum over tokens of dy

The 1 of the argmax is kept out of s' (and q'), because 1 + s' in fp32 loses the digits of s' when a
model is confident. A raw logit of -inf masks its vocabulary entry: p = 0, p log p = 0, no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


class TokenStats(NamedTuple):
    """Statistics of each token's next-token distribution, in nats; those not asked for are None.

    Where there is no distribution (a NaN, or no finite logit) all are NaN, argmax is 0 and
    top_indices are 0, 1, 2 and so on.
    """

    entropy: Tensor | None = None
    logprob: Tensor | None = None  # (..., K) for several targets a token
    logsumexp: Tensor | None = None
    mean_logit: Tensor | None = None
    log_collision: Tensor | None = None
    argmax: Tensor | None = None
    top_logprobs: Tensor | None = None  # (..., k) descending
    top_indices: Tensor | None = None  # (..., k) int64; of equal entries the lower index is first
    tail_logprob: Tensor | None = None  # log of the sum of all other probabilities


class RowTransform(NamedTuple):
    """Parameters of the map from raw logits (rows, V) to z, and the rows' targets."""

    bias: Tensor | None  # (V,)
    inv_temperature: Tensor  # (rows,)
    logit_scale: float = 1.0
    softcap: float | None = None
    # (rows,) int64, or (rows, K) for several a row; outside [0, V): in another part
    targets: Tensor | None = None


class RowParts(NamedTuple):
    """Results of one pass over (a part of) each row of logits; every field is (rows,).

    Several parts of the same rows have fields (parts, rows). q1, total and argmax may be None where
    they were not asked for.
    """

    m: Tensor  # maximum
    s1: Tensor  # s' of (1)
    t: Tensor
    target_logit: Tensor  # z of the target, -inf where it is not in this part
    q1: Tensor | None = None  # q without the argmax's 1
    total: Tensor | None = None  # sum of z
    argmax: Tensor | None = None  # int64


class Coefficients(NamedTuple):
    """Factors of (8), each (rows,).

    at_target is the target's gamma (1 - p), computed as -gamma expm1(log p), which keeps its digits
    where the model is confident. All other vocabulary entries get -gamma p_j.
    """

    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    delta: Tensor
    rho: Tensor
    at_target: Tensor


def transform(y: Tensor, row: RowTransform) -> Tensor:
    """Return z for raw logits y (rows, V)."""
    if row.bias is not None:
        y = y + row.bias.to(y.dtype)
    masked = y == -torch.inf  # found before the softcap turns -inf into -softcap
    u = y.masked_fill(masked, 0) * row.logit_scale
    c = u if row.softcap is None else row.softcap * torch.tanh(u / row.softcap)
    return (c * row.inv_temperature[:, None]).masked_fill(masked, -torch.inf)


class TargetTerms(NamedTuple):
    """Upstream gradients of log-probabilities at several targets a row, as (8) needs them.

    Each field is (rows, K).
    """

    gradient: Tensor  # g_k, of equal targets together
    others: Tensor  # G - g_k


def take_targets(y: Tensor, row: RowTransform) -> tuple[Tensor, Tensor, RowTransform, Tensor]:
    """Gather the raw logits of several targets a row, as if there were no other entries.

    Returns (targets (rows, K), raw logits (rows, K), their transform, and whether each is in this
    part (rows, K)). For a target in another part entry 0 stands in.
    """
    assert row.targets is not None
    is_here = (row.targets >= 0) & (row.targets < y.shape[1])
    targets = row.targets.masked_fill(~is_here, 0)
    bias = None if row.bias is None else row.bias[targets]
    return targets, y.gather(1, targets), row._replace(bias=bias, targets=None), is_here


def target_logits(y: Tensor, row: RowTransform) -> Tensor:
    """Return z of several targets a row (rows, K), -inf for those in another part."""
    _, chosen, transform_of_chosen, is_here = take_targets(y, row)
    return transform(chosen, transform_of_chosen).masked_fill(~is_here, -torch.inf)


def row_parts(z: Tensor, targets: Tensor | None = None) -> RowParts:
    """Compute equation (1) and the sums of (5) and (6) for z (rows, V)."""
    if z.shape[1] == 0:  # an empty shard of the vocabulary
        lowest, zero = z.new_full(z.shape[:1], -torch.inf), z.new_zeros(z.shape[:1])
        return RowParts(lowest, zero, zero, lowest, zero, zero, zero.long())
    argmax = z.argmax(dim=1, keepdim=True)
    m = z.gather(1, argmax)
    masked = z == -torch.inf
    d = (z - m).masked_fill(masked, 0)  # 0 * inf would be NaN, also in the gradient
    others = torch.exp(d).masked_fill(masked, 0).scatter(1, argmax, 0)
    if targets is None:
        target_logit = torch.full_like(m[:, 0], -torch.inf)
    else:
        is_in_part = (targets >= 0) & (targets < z.shape[1])
        index = targets.clamp(0, z.shape[1] - 1)[:, None]
        target_logit = z.gather(1, index)[:, 0].masked_fill(~is_in_part, -torch.inf)
    return RowParts(
        m[:, 0],
        others.sum(1),
        (others * d).sum(1),
        target_logit,
        (others * others).sum(1),
        z.sum(1),
        argmax[:, 0],
    )


def merge(parts: RowParts) -> RowParts:
    """Merge parts of the same rows, fields (parts, rows), by equation (7).

    Parts are in the vocabulary's order, and argmax counts from its start.
    """
    m_i, s1, t, target_logit, q1, total, argmax = parts
    m = m_i.amax(0)
    winner = (m_i == m).int().argmax(0, keepdim=True)  # the first to reach m: the lowest index wins
    empty = m_i == -torch.inf
    shift = (m_i - m).masked_fill(empty, 0)
    r = torch.exp(shift).masked_fill(empty, 0)
    # Each part leaves its own maximum out of s1 and q1; only the winner's stays out.
    maximum = torch.ones_like(r).scatter(0, winner, 0)
    return RowParts(
        m,
        (r * (maximum + s1)).sum(0),
        (r * (t + (1 + s1) * shift)).sum(0),
        target_logit.amax(0),
        None if q1 is None else (r * r * (maximum + q1)).sum(0),
        None if total is None else total.sum(0),
        None if argmax is None else argmax.gather(0, winner)[0],
    )


def statistics(parts: RowParts, vocab_size: int, targets: Tensor | None = None) -> TokenStats:
    """Compute equations (2)-(6) for whole rows; NaN where a row has a NaN or no finite logit."""
    nan_unless_finite = parts.m - parts.m
    log_s = torch.log1p(parts.s1) + nan_unless_finite
    logprob = mean_logit = log_collision = argmax = None
    if targets is not None:
        ignored = targets == IGNORE_INDEX
        logprob = ((parts.target_logit.masked_fill(ignored, 0) - parts.m) - log_s).masked_fill(
            ignored, 0
        )
    if parts.total is not None:
        mean_logit = parts.total / vocab_size + nan_unless_finite
    if parts.q1 is not None:
        log_collision = torch.log1p(parts.q1) - 2 * log_s
    if parts.argmax is not None:
        argmax = parts.argmax.masked_fill(nan_unless_finite.isnan(), 0)
    entropy = log_s - parts.t / (1 + parts.s1)
    return TokenStats(entropy, logprob, parts.m + log_s, mean_logit, log_collision, argmax)


def coefficients(stats: TokenStats, upstream: TokenStats, vocab_size: int) -> Coefficients:
    """Compute the factors of (8) from the statistics' upstream gradients (None: no gradient)."""
    assert stats.entropy is not None
    zero = torch.zeros_like(stats.entropy)
    g_h, g_l, g_lse, g_a, g_r = (zero if g is None else g for g in upstream[:5])
    rho = at_target = zero
    if upstream.log_collision is not None:
        assert stats.log_collision is not None
        # Without a gradient rho is 0, even where log_collision is -inf and 0 * inf would be NaN.
        rho = torch.where(g_r == 0, zero, 2 * g_r * torch.exp(-stats.log_collision))
    if upstream.logprob is not None:
        assert stats.logprob is not None
        at_target = -g_l * torch.expm1(stats.logprob)
    return Coefficients(
        alpha=g_lse - g_h * stats.entropy - 2 * g_r,
        beta=-g_h,
        gamma=g_l,
        delta=g_a / vocab_size,
        rho=rho,
        at_target=at_target,
    )


def row_gradient(
    y: Tensor,
    row: RowTransform,
    m: Tensor,
    log_s: Tensor,
    factors: Coefficients,
    at_targets: TargetTerms | None = None,
) -> Tensor:
    """Compute dy (8), (rows, V), from raw logits y (rows, V); m and log_s are (rows,).

    at_targets: where y holds nothing but several targets of each row.
    """
    z = transform(y, row)
    masked = z == -torch.inf
    alpha, beta, gamma, delta, rho, at_target = (factor[:, None] for factor in factors)
    log_p = ((z - m[:, None]) - log_s[:, None]).masked_fill(masked, 0)
    p = torch.exp(log_p)
    target_terms = -gamma * p
    if at_targets is not None:
        target_terms = -at_targets.gradient * torch.expm1(log_p) - at_targets.others * p
    elif row.targets is not None:
        is_target = torch.arange(y.shape[1], device=y.device) == row.targets[:, None]
        target_terms = torch.where(is_target, at_target, target_terms)
    dz = p * (alpha + beta * log_p + rho * p) + target_terms + delta
    nan_unless_finite = m - m
    return through_transform(dz, y, row).masked_fill(masked, 0) + nan_unless_finite[:, None]


def through_transform(dz: Tensor, y: Tensor, row: RowTransform) -> Tensor:
    """Return dy for the gradient dz of z, by the chain rule of the transform."""
    dy = dz * row.inv_temperature[:, None] * row.logit_scale
    if row.softcap is not None:
        u = y if row.bias is None else y + row.bias.to(y.dtype)
        dy = dy * (1 - torch.tanh(u * (row.logit_scale / row.softcap)) ** 2)
    return dy


def gradient_at_targets(
    y: Tensor, row: RowTransform, per_row: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Return several targets of each row, and dy (8) at them, both (rows, K).

    y is a part of the rows: for a target in another part entry 0 stands in. per_row (8, rows) is m,
    log s and the Coefficients; upstream (rows, K) the targets' g, 0 where they are ignored.
    """
    targets, chosen, transform_of_chosen, is_here = take_targets(y, row)
    g = upstream.double()  # G - g_k may cancel
    gradient = _sum_of_equal(targets, g.masked_fill(~is_here, 0))
    others = g.sum(1, keepdim=True) - gradient
    terms = TargetTerms(gradient.to(upstream.dtype), others.to(upstream.dtype))
    m, log_s, *factors = per_row
    rows = m, log_s, Coefficients(*factors)
    return targets, row_gradient(chosen, transform_of_chosen, *rows, terms)


def _sum_of_equal(keys: Tensor, values: Tensor) -> Tensor:
    """Return for each value the sum of those with an equal key in its row, added in pairs."""
    ordered, order = keys.sort(dim=1, stable=True)
    sums = values.gather(1, order)
    distance = 1
    while distance < keys.shape[1]:  # then each is the sum of its run of keys up to itself
        is_equal = ordered[:, distance:] == ordered[:, :-distance]
        earlier = torch.where(is_equal, sums[:, :-distance], 0)
        sums = torch.cat([sums[:, :distance], sums[:, distance:] + earlier], dim=1)
        distance *= 2
    return sums.gather(1, torch.searchsorted(ordered, keys, right=True) - 1)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    top_k: int = 0,
    support: tuple[Tensor, Tensor] | None = None,
) -> TokenStats:
    """Compute every statistic of ``fused_token_stats`` in plain torch, with all logits in memory.

    They are computed in fp32, or in fp64 for fp64, and over a support all of them.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    shape = hidden.shape[:-1]
    rows = hidden.reshape(-1, hidden.shape[-1]).to(wide)
    skip = torch.zeros_like(rows[:, 0], dtype=torch.bool)
    if mask is not None:  # a token of weight 0 may hold NaN
        skip = (mask == 0).reshape(-1)
        rows = rows.masked_fill(skip[:, None], 0)
    y = torch.nn.functional.linear(rows, weight.to(wide), None if bias is None else bias.to(wide))
    if support is not None:
        y = y.masked_fill(_outside(support, y), -torch.inf)
    tau = torch.as_tensor(temperature, dtype=wide, device=y.device).reshape(-1).expand(len(y))
    z = transform(y, RowTransform(None, 1 / tau, logit_scale, softcap))
    one = several = None
    if targets is not None and targets.dim() < hidden.dim():
        one = targets.reshape(-1)
    elif targets is not None:
        several = targets.reshape(len(y), targets.shape[-1])
    parts = row_parts(z, one)
    stats = statistics(parts, len(weight), one)
    log_s = torch.log1p(parts.s1) + (parts.m - parts.m)
    log_p = (z - parts.m[:, None]) - log_s[:, None]
    if several is not None:
        logprob = log_p.gather(1, several.clamp(min=0)).masked_fill(several == IGNORE_INDEX, 0)
        stats = stats._replace(logprob=logprob)
    if top_k > 0:
        ordered, indices = log_p.sort(dim=1, descending=True, stable=True)
        tail = ordered[:, top_k:].logsumexp(1).detach()
        stats = TokenStats(*stats[:6], ordered[:, :top_k], indices[:, :top_k], tail)
    for name, x in stats._asdict().items():
        if x is not None:
            kept = x.masked_fill(skip if x.dim() == 1 else skip[:, None], 0)
            stats = stats._replace(**{name: kept.reshape(shape + x.shape[1:])})
    return stats


def _outside(support: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    """Return which of y (rows, V) is outside the support, by rows of indices and their offsets."""
    indices, counts = support[0], support[1].diff()
    outside = torch.ones_like(y, dtype=torch.bool) & (counts > 0)[:, None]
    outside[torch.repeat_interleave(counts), indices] = False
    return outside


def entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    **transform_arguments,
) -> Tensor:
    """Compute ``fused_entropy_loss`` in plain torch; other arguments as in :func:`token_stats`."""
    entropy = token_stats(hidden, weight, mask=mask, **transform_arguments).entropy
    assert entropy is not None
    weights = torch.ones_like(entropy) if mask is None else mask.to(entropy.dtype)
    if reduction == "none":
        return weights * entropy
    total, count = (weights * entropy).sum(), weights.sum()
    return total if reduction == "sum" else total / torch.where(count == 0, 1, count)
