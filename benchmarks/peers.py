"""Calls of other libraries' released kernels; none of their code is here.

Their signatures are those of trl 1.16.0, liger-kernel 0.8.5, verl 0.9.1, cut-cross-entropy 25.1.1
and quack-kernels 0.6.5. trl, liger and verl return (entropy, logprob) per token, cce and quack the
mean cross-entropy, in nats; *_divergence return the mean over tokens. A library is imported when it
is called.
"""

from torch import Tensor

TRL_CHUNK = 32768  # vocabulary entries per tile, as in TRL's own trainer


def trl(problem) -> tuple[Tensor, Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logprob, entropy, *_ = ChunkedLogProbFunction.apply(
        problem.hidden,
        problem.weight,
        None,  # bias
        problem.targets,
        problem.temperature,
        TRL_CHUNK,
        problem.softcap,
        1.0,  # logit_scale
        ("entropy",),
    )
    return entropy, logprob


def liger(problem) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.temperature,
        return_entropy=True,
    )
    return entropy.float(), -nll


def trl_divergence(problem, beta: float) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    no_bias = no_softcap = None
    heads = (problem.hidden, problem.weight, no_bias, problem.ref_hidden, problem.ref_weight)
    options = (beta, 1.0, 1.0, no_softcap, 1.0, no_softcap)  # temperature; scale, softcap of each
    each, _ = ChunkedDivergenceFunction.apply(*heads, no_bias, *options)
    return each.mean()


def liger_divergence(problem, beta: float) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    labels = problem.ids[:, 0]  # whose cross-entropy has the weight 0
    return loss(problem.hidden, problem.weight, problem.ref_hidden, problem.ref_weight, labels)


def verl(problem) -> tuple[Tensor, Tensor]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logprob, entropy = linear_cross_entropy(
        problem.hidden, problem.weight, problem.targets, problem.temperature, "none"
    )
    return entropy, logprob


def cce(problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    hidden = problem.hidden / problem.temperature
    softcap = problem.softcap and problem.softcap / problem.temperature
    return linear_cross_entropy(hidden, problem.weight, problem.targets, softcap=softcap)


def quack(problem) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    hidden = problem.hidden / problem.temperature
    return chunked_linear_cross_entropy(hidden, problem.weight, problem.targets)
