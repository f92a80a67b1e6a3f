"""Policy losses against TRL's formulas, and their docstrings', on full logits."""

import math
from itertools import product

import pytest
import torch
from test_losses import (
    BOOL,
    LENGTHS,
    B,
    T,
    V,
    assert_same_gradients,
    by_docstring,
    inputs,
    with_nan,
)
from torch.testing import assert_close
from truth import leaves, logits_of, stats_of

from benchmarks.measure import gemm_flops
from em_kernels.losses import LOSS_TYPES, clip_cov_loss, grpo_loss, kl_cov_loss

FULL = LENGTHS > 0
LIMITED = ("cispo", "sapo", "vespo")  # in other ways than by clipping


def grpo_arguments(hidden, weight, targets, temperature=1.0):
    """Return ratios beyond both clips for advantages of both signs; NaN where nothing is read."""
    logprob = stats_of(logits_of(hidden, weight, temperature=temperature), targets)["logprob"]
    log_ratio = torch.tensor([-0.5, 0.5, 0.1, -0.1, 0.3], dtype=torch.float64)
    old, ref = ((logprob.detach() + x).masked_fill(~BOOL, torch.nan) for x in (-log_ratio, 0.4))
    advantages = torch.tensor([1.5, -0.7, -1.1, torch.nan], dtype=torch.float64)
    return {
        "mask": BOOL,
        "advantages": advantages,
        "old_logprobs": old,
        "ref_logprobs": ref,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.3,
        "entropy_coef": 0.2,
        "num_items_in_batch": 13,
        "max_completion_length": 8,
    }


def factors_per_token():
    factors = torch.linspace(0.5, 1.5, B * T, dtype=torch.float64).view(B, T)
    return factors.masked_fill(~BOOL, torch.nan)


def trl_loss(stats, a):
    """Compute TRL 1.16's loss (grpo_trainer.py, _compute_loss) completion by completion."""
    loss_type, sums, means, entropies = a["loss_type"], [], [], []
    factors = a.get("importance_weights", torch.ones(B, T))
    for i in range(B):
        n = int(LENGTHS[i])
        logp, advantage = stats["logprob"][i, :n], a["advantages"][i]
        log_ratio = logp - a["old_logprobs"][i, :n]
        if a.get("importance_sampling_level") == "sequence" and n:
            log_ratio = log_ratio.mean().expand(n)
        ratio, factor = log_ratio.exp(), factors[i, :n]
        if loss_type == "cispo":
            policy = -ratio.clamp(max=a["epsilon_high"]).detach() * advantage * logp
        elif loss_type == "sapo":
            tau = 1.0 if advantage > 0 else 1.05
            policy = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
        elif loss_type == "vespo":
            k, decay = (2, 3) if advantage >= 0 else (3, 2)
            token_ratio = logp - a["old_logprobs"][i, :n] + factor.log()
            w = token_ratio.sum().clamp(math.log(1e-8), 20).exp()
            policy = -(math.e**decay * w**k * (-decay * w).exp()).detach() * advantage * logp
            factor = 1
        else:
            within = torch.clamp(ratio, 1 - a["epsilon"], 1 + a["epsilon_high"])
            two_sided = ratio.clamp(max=a.get("delta") or math.inf)
            policy = -torch.min(two_sided * advantage, within * advantage)
        away = a["ref_logprobs"][i, :n] - logp
        kl = (away.exp() - away - 1) * (ratio if a.get("bias_corrected_kl") else 1)
        tokens = policy * factor + a["beta"] * kl
        sums.append(tokens.sum())
        means.append(tokens.sum() / max(1, n))
        entropies += stats["entropy"][i, :n]
    total, count, full = sum(sums), len(entropies), int(FULL.sum())
    loss = {
        "grpo": sum(means) / B,
        "sapo": sum(means) / B,
        "bnpo": total / count,
        "dr_grpo": total / (B * a["max_completion_length"]),
        "luspo": total / B,
        "seq-mean-token-mean": sum(means) / full,
        "seq-mean-token-sum": total / full,
    }
    loss = loss[loss_type] if loss_type in loss else total / a["num_items_in_batch"]
    return loss - a["entropy_coef"] * sum(entropies) / count


VARIANTS = {
    "": {},
    "minimised entropy": {"entropy_coef": -0.2},
    "delta": {"delta": 1.4},
    "factors": {"importance_weights": factors_per_token()},
    "factors per completion": {"importance_weights": torch.tensor([0.5, 1.5, 2.0, torch.nan])},
    "corrected KL": {"bias_corrected_kl": True},
    "all": {
        "delta": 1.4,
        "importance_weights": factors_per_token(),
        "bias_corrected_kl": True,
    },
}
CASES = [
    (loss_type, level, variant)
    for loss_type, level, variant in product(LOSS_TYPES, ("token", "sequence"), VARIANTS)
    if not (loss_type in LIMITED and "delta" in VARIANTS[variant])
    and not (loss_type == "vespo" and variant == "factors per completion")
    and (variant in ("", "all") or level == "sequence" or loss_type in ("bnpo", "cispo", "sapo"))
]


@pytest.mark.parametrize("loss_type, level, variant", CASES)
def test_grpo_equals_trl(loss_type, level, variant):
    hidden, weight, targets = inputs()
    arguments = grpo_arguments(hidden, weight, targets, temperature=0.6) | VARIANTS[variant]
    arguments |= {"loss_type": loss_type, "importance_sampling_level": level}
    if loss_type in ("seq-mean-token-mean", "seq-mean-token-sum"):
        del arguments["num_items_in_batch"]
    ours = with_nan(hidden), *leaves(weight)
    settings = {"temperature": 0.6, "chunk_bytes": 3 * V * 8}
    loss = grpo_loss(*ours, targets, **settings, **arguments)
    stats = stats_of(logits_of(hidden, weight, temperature=0.6), targets)
    whole = dict(arguments)
    factors = whole.get("importance_weights")
    if factors is not None and factors.dim() == 1:
        whole["importance_weights"] = factors.double()[:, None].expand(B, T)
    assert_same_gradients(loss, ours, trl_loss(stats, whole), (hidden, weight))
    if loss_type == "vespo":
        return
    names = {"importance_weights": torch.ones(B, T), "delta": math.inf, "bias_corrected_kl": False}
    clean = {k: v.nan_to_num() if torch.is_tensor(v) else v for k, v in whole.items()}
    names |= {"num_items_in_batch": 1, **clean, **stats, "mask": BOOL.double()}
    names["tau"] = torch.where(names["advantages"] > 0, 1.0, 1.05).double()[:, None]
    assert_close(by_docstring(grpo_loss, "loss", **names), loss)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_over_what_sampling_left(level):
    """Of each token the sampled id and four others; padding has the whole vocabulary."""
    hidden, weight, targets = inputs()
    is_left = torch.zeros(B, T, V).bool().scatter_(-1, torch.randint(V, (B, T, 4)), True)
    is_left.scatter_(-1, targets.clamp(min=0)[..., None], True)
    counts = is_left.sum(-1).masked_fill(~BOOL, 0).flatten()
    indices = (is_left & BOOL[..., None]).nonzero()[:, -1]
    csr = indices, torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    arguments = grpo_arguments(hidden, weight, targets)
    arguments |= {"loss_type": "bnpo", "importance_sampling_level": level}
    ours = with_nan(hidden), *leaves(weight)
    loss = grpo_loss(*ours, targets, support=csr, **arguments)
    logp = logits_of(hidden, weight).masked_fill(~is_left, -1e9).log_softmax(-1)
    logprob = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    stats = {"logprob": logprob, "entropy": -(logp.exp() * logp).sum(-1)}
    assert_same_gradients(loss, ours, trl_loss(stats, arguments), (hidden, weight))
    whole = grpo_loss(*ours, targets, support=None, **arguments)
    assert torch.equal(whole, grpo_loss(*ours, targets, **arguments)) and whole != loss


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grpo_of_the_policy_that_sampled(loss_type):
    """At ratio 1 the policy gradient is that of -advantage * logprob, whatever limits the ratio."""
    hidden, weight, targets = inputs()
    logprob = stats_of(logits_of(hidden, weight), targets)["logprob"].detach()
    advantages = torch.tensor([1.5, -0.7, -1.1, 0.3], dtype=torch.float64)
    arguments = {"mask": BOOL, "entropy_coef": 0.1, "loss_type": loss_type}
    arguments |= {"num_items_in_batch": 13, "max_completion_length": 8}
    loss = grpo_loss(hidden, weight, targets, advantages=advantages, **arguments)
    per_token = advantages[:, None].expand(B, T)
    given = grpo_loss(
        hidden, weight, targets, advantages=per_token, old_logprobs=logprob, **arguments
    )
    assert_same_gradients(loss, (hidden, weight), given, (hidden, weight))
    if loss_type == "bnpo":
        stats = stats_of(logits_of(hidden, weight), targets)
        truth = -(per_token * stats["logprob"] + 0.1 * stats["entropy"])[BOOL].mean()
        truth = truth + (loss - truth).detach()
        assert_same_gradients(loss, (hidden, weight), truth, (hidden, weight))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["bnpo", "cispo", "sapo"])
def test_metrics_of_the_same_pass(loss_type, level):
    hidden, weight, targets = inputs()
    arguments = grpo_arguments(hidden, weight, targets)
    arguments |= {"loss_type": loss_type, "importance_sampling_level": level, "chunk_bytes": 600}
    if loss_type == "bnpo":
        arguments["delta"] = 1.4
    if loss_type == "cispo":
        arguments["epsilon_high"] = 1.2
    ours = with_nan(hidden), *leaves(weight)
    bare = grpo_loss(*ours, targets, **arguments)
    loss, metrics = grpo_loss(*ours, targets, return_metrics=True, **arguments)
    assert torch.equal(loss, bare)
    for mine, true in zip(*(torch.autograd.grad(x, ours) for x in (loss, bare)), strict=True):
        assert torch.equal(mine, true)
    stats = stats_of(logits_of(hidden, weight), targets)
    log_ratio = stats["logprob"] - arguments["old_logprobs"]
    away = arguments["ref_logprobs"] - stats["logprob"]
    truth = {"entropy": stats["entropy"], "approx_kl": -log_ratio, "kl": away.exp() - away - 1}
    if level == "sequence":
        log_ratio = (log_ratio.nan_to_num() * BOOL).sum(-1) / LENGTHS
        log_ratio = log_ratio[:, None].expand(B, T)
    ratio, advantage = log_ratio.exp(), arguments["advantages"][:, None].expand(B, T)
    if loss_type == "bnpo":
        truth["clip_low"] = (ratio < 0.8) & (advantage < 0)
        truth["clip_high"] = (ratio > 1.28) & (advantage > 0)
        truth["clip_delta"] = (ratio > 1.4) & (advantage < 0)
    if loss_type == "cispo":
        truth["clip_high"] = (ratio > 1.2) & (advantage > 0)
    assert metrics.keys() == truth.keys()
    for name, values in truth.items():
        assert not metrics[name].requires_grad
        assert_close(metrics[name], values[BOOL].double().mean().detach(), msg=name)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_loss_and_metrics_are_fp32_whatever_the_advantages(level, loss_type):
    """numpy's are fp64."""
    hidden, weight, targets = (x.detach() for x in inputs())
    arguments = grpo_arguments(hidden, weight, targets)
    arguments |= {"loss_type": loss_type, "importance_sampling_level": level}
    loss, metrics = grpo_loss(
        hidden.float(), weight.float(), targets, return_metrics=True, **arguments
    )
    assert {x.dtype for x in (loss, *metrics.values())} == {torch.float32}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grpo_without_tokens_is_zero(loss_type):
    hidden, weight, targets = inputs()
    divisors = {"num_items_in_batch": 13, "max_completion_length": 8, "loss_type": loss_type}
    nothing = torch.zeros_like(BOOL)
    advantages = torch.full((B,), torch.nan)
    arguments = {"entropy_coef": 1.0, "return_metrics": True, **divisors}
    loss, metrics = grpo_loss(
        hidden, weight, targets, mask=nothing, advantages=advantages, **arguments
    )
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and all((g == 0).all() for g in gradients)
    assert metrics["entropy"] == 0
    arguments |= {"mask": nothing[:0], "advantages": advantages[:0]}
    assert grpo_loss(hidden[:0], weight, targets[:0], **arguments)[0] == 0


@pytest.mark.parametrize(
    "level, chunk_bytes, units", [("token", None, 6), ("sequence", None, 6), ("sequence", 4096, 8)]
)
def test_work(level, chunk_bytes, units):
    hidden, weight, targets = inputs()
    arguments = grpo_arguments(hidden, weight, targets) | {"return_metrics": True}
    arguments |= {"mask": torch.ones(B, T), "advantages": torch.ones(B)}
    arguments |= {name: torch.zeros(B, T) for name in ("old_logprobs", "ref_logprobs")}
    arguments |= {"importance_sampling_level": level, "chunk_bytes": chunk_bytes}

    def run():
        torch.autograd.grad(grpo_loss(hidden, weight, targets, **arguments)[0], (hidden, weight))

    assert gemm_flops(run) == pytest.approx(units * hidden.numel() * V, rel=0.05)


# Clip-Cov and KL-Cov

COVARIANCE = {
    clip_cov_loss: {"ratio": 0.3, "bounds": (0.05, 5.0), "epsilon": 0.3, "epsilon_high": 0.4},
    kl_cov_loss: {"ratio": 0.3, "kl_coef": 0.7},
}


@pytest.mark.parametrize("function", COVARIANCE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("defaults", [True, False])
def test_losses_by_covariance(function, defaults):
    hidden, weight, targets = inputs()
    arguments = grpo_arguments(hidden, weight, targets)
    arguments = {name: arguments[name] for name in ("mask", "advantages", "old_logprobs")}
    settings = {} if defaults else COVARIANCE[function]
    ours = with_nan(hidden), *leaves(weight)
    if function is clip_cov_loss:
        settings = settings | {"generator": torch.Generator().manual_seed(3)}
    loss, metrics = function(*ours, targets, return_metrics=True, **settings, **arguments)
    stats = stats_of(logits_of(hidden, weight), targets)
    names = {"ratio": 0.0002, "bounds": (1.0, 5.0), "epsilon": 1.0, "epsilon_high": 1.0}
    names |= {"kl_coef": 1.0, "logprob": stats["logprob"][BOOL], **settings}
    names["old_logprobs"] = arguments["old_logprobs"][BOOL]
    names["advantages"] = arguments["advantages"][:, None].expand(B, T)[BOOL]
    if function is clip_cov_loss:
        names["generator"] = torch.Generator().manual_seed(3)
    truth = by_docstring(function, "loss", **names)
    assert_same_gradients(loss, ours, truth, (hidden, weight))
    assert_close(metrics["entropy"], stats["entropy"][BOOL].mean().detach())
    chosen = metrics["dropped" if function is clip_cov_loss else "penalised"]
    assert chosen * BOOL.sum() == pytest.approx(1 if defaults else int(0.3 * BOOL.sum()))
    if function is clip_cov_loss:
        settings["generator"].manual_seed(3)
    assert torch.equal(function(*ours, targets, **settings, **arguments), loss)


@pytest.mark.parametrize("function", COVARIANCE, ids=lambda f: f.__name__)
def test_losses_by_covariance_without_tokens(function):
    hidden, weight, targets = inputs()
    loss = function(
        hidden, weight, targets, mask=0 * LENGTHS[:, None].expand(B, T), advantages=FULL
    )
    assert loss == 0 and (torch.autograd.grad(loss, weight)[0] == 0).all()


def grpo(**changes):
    hidden, weight, targets = inputs()
    arguments = {"mask": BOOL, "advantages": torch.ones(B), "targets": targets, **changes}
    return grpo_loss(hidden, weight, **arguments)


def of_covariance(function, **changes):
    return function(*inputs(), mask=BOOL, advantages=torch.ones(B), **changes)


BAD = {
    "mask: expected a tensor": lambda: grpo(mask=None),
    "loss_type: 'gspo' is unknown; use one of": lambda: grpo(loss_type="gspo"),
    "importance_sampling_level: 'word' is unknown": lambda: grpo(importance_sampling_level="word"),
    "num_items_in_batch: is None": lambda: grpo(loss_type="dapo"),
    "num_items_in_batch: expected one number": lambda: grpo(
        loss_type="dapo", num_items_in_batch=torch.ones(2)
    ),
    "max_completion_length: is None": lambda: grpo(loss_type="dr_grpo"),
    "ref_logprobs: is None with beta = 0.1": lambda: grpo(beta=0.1),
    "epsilon: -0.1 is not >= 0": lambda: grpo(epsilon=-0.1),
    "epsilon_high: -0.1 is not >= 0": lambda: grpo(epsilon_high=-0.1),
    "delta: 0 is not > 0": lambda: grpo(delta=0),
    "delta: loss_type 'sapo' limits": lambda: grpo(loss_type="sapo", delta=2.0),
    "sapo_temperatures: .0, 1. is not": lambda: grpo(loss_type="sapo", sapo_temperatures=(0, 1)),
    "sapo_temperatures: 1.0 is not two": lambda: grpo(loss_type="sapo", sapo_temperatures=1.0),
    "top_entropy: grpo_loss has no such argument": lambda: grpo(top_entropy=0.2),
    "targets: expected a tensor": lambda: grpo(targets=None),
    r"advantages: expected exactly \(\d+,\), one per completion, or": lambda: grpo(
        advantages=torch.ones(T)
    ),
    "old_logprobs: expected exactly": lambda: grpo(old_logprobs=torch.ones(B)),
    "importance_weights: expected exactly": lambda: grpo(
        loss_type="vespo", num_items_in_batch=9, importance_weights=torch.ones(B)
    ),
    "ref_logprobs: must not require grad": lambda: grpo(
        ref_logprobs=torch.ones(B, T, requires_grad=True)
    ),
    "ratio: 0 is not": lambda: of_covariance(kl_cov_loss, ratio=0),
    "beta: kl_cov_loss has no such argument": lambda: of_covariance(kl_cov_loss, beta=0.1),
    "epsilon: -1 is not >= 0": lambda: of_covariance(clip_cov_loss, epsilon=-1),
    "bounds: 1.0 is not two numbers": lambda: of_covariance(clip_cov_loss, bounds=1.0),
    r"bounds: \(5, 1\) is not two": lambda: of_covariance(clip_cov_loss, bounds=(5, 1)),
    "generator: with a process_group": lambda: of_covariance(clip_cov_loss, process_group="any"),
}


@pytest.mark.parametrize("text", BAD)
def test_errors(text):
    with pytest.raises((ValueError, TypeError), match=f"^{text}"):
        BAD[text]()
