"""Textbook formulas of the statistics, which share no code with em_kernels; tolerances."""

import math

import torch
import torch.nn.functional as F

FLOAT_STATS = ("entropy", "logprob", "logsumexp", "mean_logit", "log_collision")


def draw(n, d, v, *, dtype=torch.float32, scale=3.0, seed=0):
    """Return hidden (n, d), weight (v, d), bias (v,), targets (n,); logits deviate by `scale`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(v, d, generator=generator) * (scale / d**0.5)
    bias = torch.randn(v, generator=generator)
    targets = torch.randint(v, (n,), generator=generator)
    leaves = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    return *leaves, targets


def leaves(*tensors, dtype=None):
    """Return new leaves that require grad, with the same values and strides."""
    return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]


def logits_of(hidden, weight, bias=None, temperature=1.0, logit_scale=1.0, softcap=None):
    """Compute logits as eager PyTorch does: a product in the inputs' dtype, then fp32 (or fp64)."""
    y = F.linear(hidden, weight, bias)
    u = y.to(torch.promote_types(y.dtype, torch.float32)) * logit_scale
    c = u if softcap is None else softcap * torch.tanh(u / softcap)
    if bias is not None:
        c = c.masked_fill(bias == -torch.inf, -torch.inf)
    tau = torch.as_tensor(temperature, dtype=c.dtype)
    return c / (tau[..., None] if tau.dim() else tau)


def stats_of(logits, targets=None):
    """Return every statistic by name, differentiable; logits may be -inf."""
    masked = logits == -torch.inf
    logp = logits.log_softmax(-1)
    finite_logp = logp.masked_fill(masked, 0)
    found = {
        "entropy": -(logp.exp() * finite_logp).sum(-1),
        "logsumexp": logits.logsumexp(-1),
        "mean_logit": logits.mean(-1),
        "log_collision": (2 * logp).logsumexp(-1),
        "argmax": logits.argmax(-1),
    }
    if targets is not None:
        chosen = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        found["logprob"] = torch.where(targets == -100, 0, chosen)
    return found


def entropy_of(hidden, weight, bias=None, **transform):
    return stats_of(logits_of(hidden, weight, bias, **transform))["entropy"]


def relative_error(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


def assert_no_worse_than_eager(ours, eager, truth, floor, name=""):
    """Check |ours - fp64| <= 2 |eager in the same dtype - fp64| + floor, in norms."""
    error = (ours.double() - truth).norm().item()
    allowed = 2 * (eager.double() - truth).norm().item() + floor
    assert error <= allowed, f"{name}: error {error:.3e} > {allowed:.3e} (floor {floor:.1e})"


def floors(inputs, transform, upstream):
    """Return error floors for a sum of statistics, dhidden, dweight, dbias: a few roundings each.

    They are needed where eager happens to be exact: for V = 1, or a gradient that cancels.
    """
    hidden, weight, _ = wide = [x.detach().double() for x in inputs]
    logits = logits_of(*wide, **transform)
    accuracy = torch.finfo(torch.promote_types(inputs[0].dtype, torch.float32)).eps
    largest = logits.abs().max() + math.log(len(weight))  # of z, log p and the entropy
    each = 2 * accuracy * (1 + largest) * upstream.norm()
    slope = abs(transform.get("logit_scale", 1.0))
    slope = slope / torch.as_tensor(transform.get("temperature", 1.0)).min()
    n = len(hidden)
    return each * n**0.5, *(
        each * slope * size for size in (weight.norm(dim=1).max(), hidden.norm(), n**0.5)
    )


def compare(names, ours, eager, truth, floors):
    """Check that each result is no worse than eager's, but for one rounding to its dtype."""
    for name, mine, theirs, true, floor in zip(names, ours, eager, truth, floors, strict=True):
        if theirs.isfinite().all():  # eager overflows in fp16
            rounding = torch.finfo(mine.dtype).eps / 2 * true.norm()
            assert_no_worse_than_eager(mine, theirs, true, (floor + rounding).item(), name)
