"""Providers of the losses that are measured: PyTorch, ours, and other libraries (peers.py)."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from em_kernels import fused_entropy_loss, fused_token_stats

TOLERANCE = 2**-9  # grad_tolerance of "ours sparse": the trainer's default


class HeadProblem(NamedTuple):
    """Inputs of a head, and what is done with its logits."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,) int64
    temperature: float
    softcap: float | None


Loss: TypeAlias = Callable[[HeadProblem], Tensor]
Statistics: TypeAlias = Callable[[HeadProblem], tuple[Tensor, Tensor]]  # entropy, logprob (N,)


class Provider(NamedTuple):
    """A way to compute the loss and the per-token statistics, either None if it offers none."""

    title: str
    loss: Loss | None  # mean over tokens of `quantity`
    statistics: Statistics | None = None
    quantity: str = "entropy"
    bytes_per_logit: int = 0  # peak memory if it holds all logits; 0 if it works in chunks
    package: str = "torch"
    softcap: bool = True  # whether it supports one
    cuda_only: bool = False
    counted: bool = True  # its GEMMs go through torch, where their work can be counted


def _logits(problem: HeadProblem) -> Tensor:
    """Return logits as transformers' models do: in the inputs' dtype, softcap included."""
    logits = problem.hidden @ problem.weight.t()
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    return logits


def official_loss(problem: HeadProblem) -> Tensor:
    """Return the mean entropy by the formula of One-shot EM's train.py, in the model's dtype."""
    probs = F.softmax(_logits(problem) / problem.temperature, dim=-1)
    return -(probs * torch.log(probs + 1e-12)).sum(-1).mean()


def stable_statistics(problem: HeadProblem) -> tuple[Tensor, Tensor]:
    """Return entropy and log-probability per token by a stable formula on an fp32 copy."""
    logp = (_logits(problem).float() / problem.temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return entropy, logp.gather(-1, problem.targets[:, None])[:, 0]


def stable_loss(problem: HeadProblem) -> Tensor:
    logp = (_logits(problem).float() / problem.temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean()


def linear_cross_entropy_loss(problem: HeadProblem) -> Tensor:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError("needs torch >= 2.13")
    hidden = problem.hidden / problem.temperature
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, problem.weight, problem.targets, options=options)


def ours_loss(tolerance: float = 0.0, chunk_bytes: int | None = None) -> Loss:
    def loss(problem: HeadProblem) -> Tensor:
        return fused_entropy_loss(
            problem.hidden,
            problem.weight,
            temperature=problem.temperature,
            softcap=problem.softcap,
            grad_tolerance=tolerance,
            chunk_bytes=chunk_bytes,
        )

    return loss


def ours_statistics(problem: HeadProblem) -> tuple[Tensor, Tensor]:
    stats = fused_token_stats(
        problem.hidden,
        problem.weight,
        problem.targets,
        temperature=problem.temperature,
        softcap=problem.softcap,
    )
    return stats.entropy, stats.logprob


def products(problem: HeadProblem, count: int) -> None:
    """Run the floor: the matrix products alone, 1 for a forward, 2 or 3 with gradients."""
    with torch.no_grad():
        logits = torch.mm(problem.hidden, problem.weight.t())
        kept = [logits]  # Results live until the end, as a caller's would.
        if count > 1:
            kept.append(torch.mm(logits, problem.weight))
        if count > 2:
            kept.append(torch.mm(logits.t(), problem.hidden))


def _compiled(function: Callable) -> Callable:
    """Compile at the first call, for the one shape that the process measures."""
    return lambda problem: torch.compile(function, dynamic=False)(problem)


CROSS_ENTROPY = {"quantity": "cross-entropy"}
PROVIDERS = {
    "floor": Provider("GEMM floor", None, bytes_per_logit=2),
    "ours-sparse": Provider(
        f"ours, grad_tolerance=2^{math.log2(TOLERANCE):.0f}", ours_loss(TOLERANCE)
    ),
    "ours": Provider("ours, exact", ours_loss(), ours_statistics),
    "ours-64mib": Provider("ours, chunk_bytes=64 MiB", ours_loss(chunk_bytes=2**26)),
    "compile": Provider(
        "torch.compile of stable eager",
        _compiled(stable_loss),
        _compiled(stable_statistics),
        bytes_per_logit=8,
    ),
    "stable-eager": Provider("stable eager", stable_loss, stable_statistics, bytes_per_logit=20),
    "official-eager": Provider(
        "eager as in One-shot EM's train.py", official_loss, bytes_per_logit=10
    ),
    "trl": Provider(
        "TRL chunked_logprob",
        lambda problem: peers.trl(problem)[0].mean(),
        peers.trl,
        package="trl",
    ),
    "liger": Provider(
        "Liger fused scaled CE, return_entropy",
        lambda problem: peers.liger(problem)[0].mean(),
        peers.liger,
        package="liger_kernel",
        softcap=False,
    ),
    "verl": Provider(
        "verl linear_cross_entropy",
        lambda problem: peers.verl(problem)[0].mean(),
        peers.verl,
        package="verl",
        softcap=False,
        cuda_only=True,
        counted=False,
    ),
    "cce": Provider(
        "Cut Cross-Entropy",
        peers.cce,
        package="cut_cross_entropy",
        cuda_only=True,
        counted=False,
        **CROSS_ENTROPY,
    ),
    "quack": Provider(
        "quack chunked_linear_cross_entropy",
        peers.quack,
        package="quack",
        softcap=False,
        cuda_only=True,
        counted=False,
        **CROSS_ENTROPY,
    ),
    "linear-cross-entropy": Provider(
        "torch F.linear_cross_entropy(options=)",
        linear_cross_entropy_loss,
        softcap=False,
        **CROSS_ENTROPY,
    ),
}
ON_REQUEST = {  # measured only when named
    # linear-cross-entropy: 80 s a call (Xeon, 2 threads, November 2026)
    "cpu": ("ours-64mib", "linear-cross-entropy"),
    "cuda": ("ours-64mib",),
}
