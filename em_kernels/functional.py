"""The public functions: each checks, casts under autocast, flattens, calls the op and reshapes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .ops import torch_library
from .ops.checks import check_arguments, check_support, check_tolerance, check_top_k
from .reference import TokenStats

STATS, OF_TOP = TokenStats._fields[:6], TokenStats._fields[6:]  # without top_k, and with it
OF_SUPPORT = TokenStats._fields[:3]
REDUCTIONS = ("mean", "sum", "none")


def fused_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    grad_tolerance: float = 0.0,
    chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Compute the entropy of the next-token distributions, straight from the hidden states.

    Equivalent to this, without the logits ever being in memory::

        logits = F.linear(hidden, weight, bias).float() * logit_scale
        logits = softcap * torch.tanh(logits / softcap)
        entropy = torch.distributions.Categorical(logits=logits / temperature).entropy()
        loss = (mask * entropy).sum() / mask.sum()

    Args:
        hidden: (..., D) final hidden states; fp32, bf16, fp16, or fp64.
        weight: (V, D) of the output head, as in nn.Linear; hidden's dtype unless autocast is on.
        bias: (V,) or None; a bias of -inf removes an entry from the vocabulary.
        mask: (...) bool, int or float weight of each token. Tokens of weight 0 cost nothing and may
            hold NaN.
        temperature: > 0, a number or (...) one per token, that the logits are divided by. Under
            torch.compile a number is compiled in: give one that changes as a tensor of shape ().
        reduction: "mean" (divided by the mask's sum; 0 where that is 0), "sum", or "none". Negative
            weights are for "sum" and "none" only.
        logit_scale, softcap: for models that have them (Cohere, Granite; Gemma 2).
        grad_tolerance: in [0, 1): the share of the L1 mass of d loss / d logits that the backward
            may drop. It drops vocabulary entries whose gradient is next to nothing, and with them
            most of the GEMM work where distributions are peaked. 0 is exact; 2**-9 is bf16's own
            rounding. The bound holds per chunk (and rank), not per token: a token of little weight
            may lose more. The gradients of weight and bias are 0 at dropped entries; dhidden is
            corrected by a mean of their weights, so the d loss / d logits that it implies is off by
            at most twice the share. "none" is always exact, as are calls so small that choosing
            entries would take longer than it saves (:func:`em_kernels.gradient_report` says so).
        chunk_bytes: memory for the logits held at a time; default the smaller of 1 GiB and an
            eighth of the free memory, rounded down to a power of two (on a GPU 256 tokens at least,
            while a quarter of the free memory holds them). It sets the order of sums,
            and which entries a tolerance drops: give it to get the same bits again on a machine
            with less free memory.
        process_group: ranks that each hold consecutive rows of the weight, and the same entries of
            the bias. Every rank passes the same hidden, all with the same requires_grad, and gets
            the same loss and dhidden.

    Returns:
        The loss in nats, fp32 (fp64 for fp64): (), or (...) for "none".

    Gradient: for hidden, weight and bias, equation (8) of ``em_kernels.reference``. For "mean" and
        "sum" it is computed during the forward: GEMM work is 3 times that of the forward alone, 2
        with a frozen weight; with a tolerance 1 + 2 A, or 1 + A, where a share A of the vocabulary
        is kept. For "none" as in :func:`fused_token_stats`. No second derivatives.
    Precision: logits, statistics and accumulated gradients are fp32 whatever the inputs' dtype;
        gradients are rounded once, to the inputs' dtype (under autocast to autocast's, as
        nn.Linear's).
    Memory: one chunk, and an fp32 gradient of hidden. Up to 2 D tokens (D in fp32), d loss /
        d logits (N, V) is kept until the backward, in the dtype of the weight's GEMM and, where one
        chunk holds all tokens, in that chunk's memory. The backward multiplies dweight from it and
        from hidden: neither hidden nor the mask may be changed before. For more tokens an fp32
        dweight takes less, and is kept instead. With a tolerance dweight is always kept, with rows
        only for the entries that any chunk kept, and at most 64 MiB more are used; on a GPU two
        chunks of half the size take turns, so that the next one is computed ahead.
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward.
    Source: One-shot Entropy Minimization, arXiv 2505.20282; the tolerance's certificate is proven
        in ``em_kernels/ops/sparse.py``.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r} is unknown; use one of {', '.join(REDUCTIONS)}")
    grad_tolerance = check_tolerance(grad_tolerance)
    if reduction == "none":
        entropy = fused_token_stats(
            hidden,
            weight,
            bias=bias,
            mask=mask,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            chunk_bytes=chunk_bytes,
            process_group=process_group,
        ).entropy
        assert entropy is not None
        return entropy if mask is None else mask.to(entropy.dtype) * entropy
    transform = (temperature, logit_scale, softcap)
    head = check_arguments(hidden, weight, bias, None, mask, transform, chunk_bytes, process_group)
    loss, *_ = torch_library.entropy_loss_op(
        *head, grad_tolerance, reduction == "mean", _require_grad(*head[:3])
    )
    return loss


def fused_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    stats: Sequence[str] | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    top_k: int | None = None,
    support: tuple[Tensor, Tensor] | None = None,
) -> TokenStats:
    """Compute differentiable statistics of each token's next-token distribution.

    Equivalent to this, without the logits ever being in memory::

        logits = F.linear(hidden, weight, bias).float() / temperature
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        logprob = logp.gather(-1, targets[..., None])[..., 0]
        logsumexp = logits.logsumexp(-1)
        mean_logit = logits.mean(-1)
        log_collision = (2 * logp).logsumexp(-1)
        argmax = logits.argmax(-1)
        top_logprobs, top_indices = logp.topk(top_k)
        tail_logprob = logp.scatter(-1, top_indices, -math.inf).logsumexp(-1)

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, chunk_bytes, process_group: as in
            :func:`fused_entropy_loss`.
        targets: (...) int64, each in [0, V), or -100 for a token without one (its logprob is 0,
            without gradient). Or (..., K), several for each token: logprob is then (..., K), that
            of ``logp.gather(-1, targets)``. A target may be there more than once.
        stats: names of the fields to return; default entropy, and logprob where there are targets.
            With top_k its three fields come in addition, and () asks for these alone.
        mask: (...) weights; tokens of weight 0 are left out: their statistics are 0, and they may
            hold NaN.
        top_k: int in [1, V]: adds top_logprobs and top_indices (..., top_k) of the most probable
            entries, descending, of equal ones the lower index first; and tail_logprob (...), the
            log of the sum of all other probabilities, -inf where there are none.
        support: (indices (nnz,), offsets (N + 1,)), int64: restricts the distribution of token i of
            the flattened N, masked ones included, to the entries indices[offsets[i]:offsets[i + 1]]
            (what top-k or top-p sampling left, say), as if all other logits were -inf. They are
            distinct, in any order; none at all stand for the whole vocabulary. Targets lie within.
            For entropy, logprob and logsumexp, and not with top_k or a process_group.

    Returns:
        TokenStats; each field (...) fp32 in nats (fp64 for fp64), logprob (..., K) for several
        targets, argmax and top_indices int64, None where not asked for.

    Gradient: for hidden, weight and bias, with any upstream per token and statistic; argmax,
        top_indices and tail_logprob have none. Where all fp32 logits (N, V) fit into chunk_bytes
        they are kept, and GEMM work is 3 times that of the forward alone; otherwise the backward
        recomputes them: 4 times. A single statistic with weight and bias frozen keeps its gradient
        from the forward: 2 times. A support of at most N V / 16 entries, some for each token, takes
        the products with these alone. No second derivatives.
    Precision: as in :func:`fused_entropy_loss`.
    Memory: the kept logits, until the graph is freed: at most chunk_bytes, by default 1 GiB or an
        eighth of the free memory, whichever is less; and in the backward a slab of at most 64 MiB.
        Otherwise chunk_bytes for a slab of logits (all tokens, some vocabulary entries) and of
        dweight, by default 64 MiB or, if that is more, 16 times an fp32 hidden. The backward also
        holds an fp32 dhidden; a single statistic with a frozen head holds it from the forward on.
        top_k takes some copies of 8 MiB of logits, on a GPU 64 MiB. A small support takes its
        logits, chunk_bytes (by default 64 MiB) of gathered weights, and in the backward an fp32
        dweight of its entries.
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward.
    Source: equations (1)-(8) of ``em_kernels.reference``.
    """
    k = check_top_k(top_k)
    names = _names_of(stats, targets is not None, k > 0)
    if support is not None:
        _check_for_support(names, k, process_group)
    transform = (temperature, logit_scale, softcap)
    head = check_arguments(
        hidden, weight, bias, targets, mask, transform, chunk_bytes, process_group
    )
    entries = check_support(support, hidden)
    needs, shape = _require_grad(*head[:3]), hidden.shape[:-1]
    floats = [name for name in names if name != "argmax"]
    several = head.targets is not None and head.targets.dim() == 2
    # One statistic under a frozen head gets its gradient in the forward: no logits recomputed.
    is_single = len(floats) == 1 and needs == [True, False, False]
    is_single = is_single and not several and k == 0 and support is None
    single_stat_index = STATS.index(floats[0]) if is_single else -1
    with_collision_and_argmax = not set(names) <= set(OF_SUPPORT)
    statistics, argmax, *_, chosen, top_indices, tail_logprob = torch_library.token_stats_op(
        *head, needs, with_collision_and_argmax, single_stat_index, k, *entries
    )
    fields = dict(zip(STATS, statistics.unbind(0), strict=False), argmax=argmax)
    if several:
        fields["logprob"] = chosen[:, : chosen.shape[1] - k]
    if k > 0:
        names = (*names, "top_logprobs", "top_indices", "tail_logprob")
        fields["top_logprobs"] = chosen[:, chosen.shape[1] - k :]
        fields |= {"top_indices": top_indices, "tail_logprob": tail_logprob}
    # The backward needs the op's own outputs, and the caller may write into what it gets.
    copies = {name: fields[name].clone() for name in names}
    return TokenStats(**{name: x.reshape(shape + x.shape[1:]) for name, x in copies.items()})


def _names_of(stats: Sequence[str] | None, has_targets: bool, has_top: bool) -> tuple[str, ...]:
    """Return the names of the statistics that are asked for, those of top_k aside."""
    default = ("entropy", "logprob") if has_targets else ("entropy",)
    _check_is_names("stats", stats)
    names = default if stats is None else tuple(stats)
    if not names and not has_top:
        raise ValueError(f"stats: {stats!r} is not a sequence of names; give some, or None")
    if not has_top and set(names) == set(TokenStats._fields):
        names = STATS
    _check_stat_names("stats", names, has_targets, has_top)
    return tuple(name for name in names if name not in OF_TOP)


def _check_for_support(
    names: tuple[str, ...], top_k: int, process_group: ProcessGroup | None
) -> None:
    """Refuse what is not defined, or not built, for distributions over a support."""
    if process_group is not None:
        raise ValueError("support: is not for a vocabulary split over a process_group; give none")
    if top_k > 0:
        raise ValueError("support: is not for top_k; leave one of them out")
    for name in names:
        if name not in OF_SUPPORT:
            known = ", ".join(OF_SUPPORT)
            raise ValueError(f"support: is not for {name}; stats may have {known}")


@torch._disable_dynamo  # torch.compiler.disable would import the compiler here and now
def fused_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    loss_fn: Callable[[TokenStats, Tensor], Tensor | tuple[Tensor, dict[str, Tensor]]],
    *,
    return_stats: Sequence[str] | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    grad_tolerance: float = 0.0,
    chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    top_k: int | None = None,
) -> Any:
    """Sum any loss that is a function of each token's own statistics.

    Examples: policy gradients, GRPO and PPO with clip and entropy bonus, cross-entropy, z-loss,
    self-certainty. Equivalent to this for hidden (N, D), at 3/4 of the GEMM work where it would
    recompute logits::

        stats = fused_token_stats(hidden, weight, targets, stats=TokenStats._fields)
        loss = (mask * loss_fn(stats, torch.arange(len(hidden)))).sum()

    GRPO with clip and entropy bonus, over the answers' tokens::

        def loss_fn(stats, index):
            ratio = torch.exp(stats.logprob - old_logprob[index])
            clipped = ratio.clamp(1 - 0.2, 1 + 0.2)
            gain = torch.minimum(ratio * advantage[index], clipped * advantage[index])
            return -(gain + 0.01 * stats.entropy) / token_count

        fused_token_loss(hidden, weight, tokens, loss_fn, mask=is_answer).backward()

    Values to log, from the same pass and without another product::

        def loss_fn(stats, index):
            ratio = torch.exp(stats.logprob - old_logprob[index])
            return -ratio * advantage[index], {"clipped": (ratio - 1).abs() > 0.2}

        loss, stats, extras = fused_token_loss(
            hidden, weight, tokens, loss_fn, mask=is_answer, return_stats=("entropy", "argmax")
        )
        entropy = stats.entropy[is_answer].mean()
        accuracy = (stats.argmax == tokens)[is_answer].float().mean()
        clip_share = extras["clipped"][is_answer].float().mean()

    Forward KL over a teacher's stored ids (N, K) and probabilities (N, K), 0 where an id is -100::

        def loss_fn(stats, index):
            q = probabilities[index]
            return (torch.xlogy(q, q) - q * stats.logprob).sum(-1)

        loss = fused_token_loss(hidden, weight, ids, loss_fn, mask=mask / mask.sum())

    Args:
        hidden, weight, bias, temperature, logit_scale, softcap, grad_tolerance, chunk_bytes,
            process_group: as in :func:`fused_entropy_loss`.
        targets: (...) or (..., K) int64 as in :func:`fused_token_stats`, or None: then there is no
            logprob. (..., K) is exact, whatever grad_tolerance is.
        loss_fn: called once per chunk with (stats, index) -> losses (n,), real: stats is TokenStats
            of the chunk's n tokens, each field (n,), logprob (n, K) for several targets; index (n,)
            int64 their positions in the flattened hidden. Autograd differentiates it there. It may
            read other tensors, which must not require grad. With return_stats it may return
            (losses, extras) instead, extras a dict of tensors (n,); where the mask leaves no token
            it is then called once, with n = 0.
        top_k: adds top_logprobs and top_indices (n, top_k) and tail_logprob (n,) to loss_fn's
            stats, as in :func:`fused_token_stats`. A loss that depends on top_logprobs is exact,
            whatever grad_tolerance is.
        return_stats: names of statistics to return, () for loss_fn's extras alone; None returns
            the loss alone.
        mask: (...) weights of the losses, negative ones too. Tokens of weight 0 never reach
            loss_fn; what is returned for them is 0.

    Returns:
        The loss, () fp32 (fp64 for fp64). With return_stats (loss, TokenStats), and where loss_fn
        returns extras (loss, TokenStats, extras): detached, each field and extra (...).

    Gradient: for hidden, weight and bias, computed during the forward: GEMM work is 3 times that of
        the forward alone, 2 with a frozen weight. No second derivatives.
    Precision, memory: as in :func:`fused_entropy_loss`.
    Raises: ValueError, TypeError naming the argument; RuntimeError on double backward. Under
        torch.compile a graph break.
    Source: equation (8) of ``em_kernels.reference``.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function, got {type(loss_fn).__name__}")
    k = check_top_k(top_k)
    _check_stat_names("return_stats", return_stats, targets is not None, k > 0)
    grad_tolerance = check_tolerance(grad_tolerance)
    transform = (temperature, logit_scale, softcap)
    head = check_arguments(
        hidden, weight, bias, targets, mask, transform, chunk_bytes, process_group
    )
    if head.targets is not None and head.targets.dim() == 2:
        grad_tolerance = 0.0
    needs, grad_enabled = _require_grad(*head[:3]), torch.is_grad_enabled()
    loss, *found = torch_library.TokenLoss.apply(
        *head, grad_tolerance, needs, loss_fn, grad_enabled, return_stats, k
    )
    if return_stats is None:
        return loss
    shape = hidden.shape[:-1]
    stats, extras = (
        {name: x.reshape(shape + x.shape[1:]) for name, x in values.items()} for values in found
    )
    return (loss, TokenStats(**stats), extras) if extras else (loss, TokenStats(**stats))


def _check_is_names(argument: str, names: Sequence[str] | None) -> None:
    if isinstance(names, str) or not isinstance(names, Iterable | None):
        raise ValueError(f"{argument}: {names!r} is not a sequence of names; give some, or None")


def _check_stat_names(
    argument: str, names: Sequence[str] | None, has_targets: bool, has_top: bool = False
) -> None:
    _check_is_names(argument, names)
    for name in names or ():
        if name in OF_TOP and not has_top:
            raise ValueError(f"{argument}: {name} needs top_k")
        if name not in TokenStats._fields:
            known = ", ".join(TokenStats._fields if has_top else STATS)
            raise ValueError(f"{argument}: {name!r} is unknown; use some of {known}")
        if name == "logprob" and not has_targets:
            raise ValueError(f"{argument}: logprob needs targets")


def _require_grad(*tensors: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
