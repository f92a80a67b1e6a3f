"""em_kernels.losses against its docstrings' formulas on plain logits, and against TRL's."""

import doctest
import inspect
import math
import textwrap
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spawned import spawn
from torch.testing import assert_close
from truth import leaves, logits_of, stats_of

from em_kernels import TokenStats, fused_token_stats, losses
from em_kernels.losses import LOSS_TYPES, grpo_loss, linear_cross_entropy

B, T, D, V = 4, 5, 6, 37
LENGTHS = torch.tensor([5, 2, 3, 0])  # the last completion is empty
BOOL = torch.arange(T) < LENGTHS[:, None]
WEIGHTS = BOOL * torch.linspace(0.25, 3, T, dtype=torch.float64)
SHIFT = {"plain": 0.0, "all negative": -900.0, "large": 0.0}
REWARDS = {
    losses.self_certainty: lambda stats, mask: losses.self_certainty(stats, V),
    losses.intuitor_reward: lambda stats, mask: losses.intuitor_reward(stats, mask, V),
    losses.em_rl_sequence_reward: losses.em_rl_sequence_reward,
    losses.em_rl_token_reward: losses.em_rl_token_reward,
    losses.rent_reward: losses.rent_reward,
}


def inputs(kind="plain"):
    """Return hidden (B, T, D), weight (V, D), targets (B, T) of completions, in fp64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    hidden[..., 0], weight[:, 0] = 1, SHIFT[kind]
    targets = torch.randint(V, (B, T), generator=generator)
    hidden *= 30 if kind == "large" else 1
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def with_nan(hidden):
    """Return hidden with NaN at the tokens outside the completions."""
    return hidden.detach().masked_fill(~BOOL[..., None], torch.nan).requires_grad_()


def by_docstring(function, name, **names):
    """Run the plain-torch code of a docstring; return its variable `name`."""
    code = inspect.getdoc(function).split("::\n\n", 1)[1].split("\n\n", 1)[0]
    exec(textwrap.dedent(code), {"torch": torch, "math": math, "F": F}, names)
    return names[name]


def assert_same_gradients(ours, our_inputs, truth, true_inputs):
    assert_close(ours, truth, rtol=1e-11, atol=1e-11)
    found, expected = (
        torch.autograd.grad(x, at, retain_graph=True)
        for x, at in ((ours, our_inputs), (truth, true_inputs))
    )
    for mine, true in zip(found, expected, strict=True):
        assert_close(mine, true, rtol=1e-10, atol=1e-11 * (1 + true.abs().max().item()))


@pytest.mark.parametrize("function", REWARDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", SHIFT)
@pytest.mark.parametrize("temperature", [0.5, 1.7])
@pytest.mark.parametrize("mask", [BOOL, WEIGHTS], ids=["bool", "weights"])
def test_rewards_equal_their_formulas(function, kind, temperature, mask):
    hidden, weight, targets = inputs(kind)
    ours = with_nan(hidden), *leaves(weight)
    stats = fused_token_stats(
        *ours, targets, stats=TokenStats._fields, mask=mask, temperature=temperature
    )
    reward = REWARDS[function](stats, mask)
    logits = logits_of(hidden, weight, temperature=temperature)
    if function is losses.self_certainty:  # it is per token
        truth = by_docstring(function, "result", logits=logits, vocab_size=V)[BOOL]
        uniform = torch.full_like(logits, 1 / V)
        kl = F.kl_div(logits.log_softmax(-1), uniform, reduction="none").sum(-1)
        assert_close(truth, kl[BOOL])
        reward = reward[BOOL]
    else:
        assert reward[-1] == 0
        some = LENGTHS > 0
        truth = by_docstring(
            function,
            "result",
            logits=logits[some],
            mask=mask[some],
            targets=targets[some],
            vocab_size=V,
        )
        reward = reward[some]
    upstream = torch.linspace(-1, 2, len(truth), dtype=torch.float64)
    assert_close(reward, truth, rtol=1e-11, atol=1e-11)
    assert_same_gradients(
        (upstream * reward).sum(), ours, (upstream * truth).sum(), (hidden, weight)
    )


def test_rewards_of_knowing_nothing():
    stats = fused_token_stats(
        torch.zeros(B, T, D), torch.ones(V, D), torch.ones(B, T).long(), stats=TokenStats._fields
    )
    log_v = math.log(V)
    assert_close(losses.intuitor_reward(stats, BOOL, V), torch.zeros(B), rtol=0, atol=1e-6)
    assert_close(losses.rent_reward(stats, BOOL), -log_v * (LENGTHS > 0).float())
    assert_close(losses.em_rl_token_reward(stats, BOOL), -log_v * LENGTHS.float())
    assert_close(losses.em_rl_sequence_reward(stats, BOOL), -log_v * LENGTHS.float())


def test_statistics_outside_the_mask_may_be_nan():
    entropy = torch.ones(B, T).masked_fill(~BOOL, torch.nan).requires_grad_()
    reward = losses.rent_reward(TokenStats(entropy=entropy), BOOL)
    assert_close(reward, -(LENGTHS > 0).float())
    (gradient,) = torch.autograd.grad(reward.sum(), entropy)
    assert_close(gradient, -BOOL.float() / LENGTHS.clamp(min=1)[:, None])


def test_examples_of_docstrings():
    found = doctest.testmod(losses, extraglobs={"torch": torch})
    assert found.attempted > 0 and found.failed == 0


def test_group_advantages():
    rewards = torch.tensor([0, 1, 1, 1, 5, 5])
    found = losses.group_advantages(rewards, 2)
    deviation = 0.5**0.5
    expected = torch.tensor([-0.5, 0.5]) / (deviation + 1e-4)
    assert_close(found, torch.cat([expected, torch.zeros(4)]))


def grpo_arguments(hidden, weight, targets, temperature):
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


def trl_loss(stats, loss_type, a):
    """Compute TRL 1.16's loss token by token (grpo_trainer.py, _compute_loss)."""
    completions, entropies = [], []
    for i in range(B):
        tokens = []
        for t in range(LENGTHS[i]):
            logp, advantage = stats["logprob"][i, t], a["advantages"][i]
            ratio = torch.exp(logp - a["old_logprobs"][i, t])
            within = torch.clamp(ratio, 1 - a["epsilon"], 1 + a["epsilon_high"])
            away = a["ref_logprobs"][i, t] - logp
            kl = torch.exp(away) - away - 1
            policy = -torch.min(ratio * advantage, within * advantage)
            tokens.append(policy + a["beta"] * kl)
            entropies.append(stats["entropy"][i, t])
        completions.append(sum(tokens, torch.zeros((), dtype=torch.float64)))
    total, count = sum(completions), len(entropies)
    loss = {
        "grpo": sum(c / max(1, n) for c, n in zip(completions, LENGTHS, strict=True)) / B,
        "bnpo": total / count,
        "dapo": total / a["num_items_in_batch"],
        "dr_grpo": total / (B * a["max_completion_length"]),
    }[loss_type]
    return loss - a["entropy_coef"] * sum(entropies) / count


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy_coef", [0.2, -0.2])
def test_grpo_equals_trl(loss_type, temperature, entropy_coef):
    hidden, weight, targets = inputs()
    arguments = grpo_arguments(hidden, weight, targets, temperature)
    arguments["entropy_coef"] = entropy_coef
    ours = with_nan(hidden), *leaves(weight)
    settings = {"loss_type": loss_type, "temperature": temperature, "chunk_bytes": 3 * V * 8}
    loss = grpo_loss(*ours, targets, **settings, **arguments)
    stats = stats_of(logits_of(hidden, weight, temperature=temperature), targets)
    assert_same_gradients(loss, ours, trl_loss(stats, loss_type, arguments), (hidden, weight))
    clean = {k: v.nan_to_num() if torch.is_tensor(v) else v for k, v in arguments.items()}
    names = {**clean, **stats, "loss_type": loss_type, "mask": BOOL.double()}
    assert_close(by_docstring(grpo_loss, "loss", **names), loss)


def test_grpo_of_the_policy_that_sampled():
    hidden, weight, targets = inputs()
    logprob = stats_of(logits_of(hidden, weight), targets)["logprob"].detach()
    advantages = torch.tensor([1.5, -0.7, -1.1, 0.3], dtype=torch.float64)
    arguments = {"mask": BOOL, "entropy_coef": 0.1}
    loss = grpo_loss(hidden, weight, targets, advantages=advantages, **arguments)
    per_token = advantages[:, None].expand(B, T)
    given = grpo_loss(
        hidden, weight, targets, advantages=per_token, old_logprobs=logprob, **arguments
    )
    assert_same_gradients(loss, (hidden, weight), given, (hidden, weight))
    # The policy gradient is that of -advantage * logprob.
    stats = stats_of(logits_of(hidden, weight), targets)
    truth = -(per_token * stats["logprob"] + 0.1 * stats["entropy"])[BOOL].mean()
    truth = truth + (loss - truth).detach()
    assert_same_gradients(loss, (hidden, weight), truth, (hidden, weight))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grpo_without_tokens_is_zero(loss_type):
    hidden, weight, targets = inputs()
    divisors = {"num_items_in_batch": 13, "max_completion_length": 8, "loss_type": loss_type}
    nothing = torch.zeros_like(BOOL)
    advantages = torch.full((B,), torch.nan)
    arguments = {"entropy_coef": 1.0, **divisors}
    loss = grpo_loss(hidden, weight, targets, mask=nothing, advantages=advantages, **arguments)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and all((g == 0).all() for g in gradients)
    empty = (x[:0] for x in (nothing, advantages))
    arguments |= dict(zip(("mask", "advantages"), empty, strict=True))
    assert grpo_loss(hidden[:0], weight, targets[:0], **arguments) == 0


def lce_gradients(logprobs, entropy, tensors):
    upstream = torch.linspace(-1, 2, entropy.numel(), dtype=entropy.dtype)
    total = (logprobs * upstream[: logprobs.numel()].view(logprobs.shape)).sum()
    return torch.autograd.grad(total + (entropy * upstream.flip(0)).sum(), tensors)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", SHIFT)
def test_linear_cross_entropy(reduction, temperature, kind):
    hidden, weight, labels = inputs(kind)
    ours = linear_cross_entropy(hidden, weight, labels.view(1, -1), temperature, reduction)
    names = {"hidden": hidden, "weight": weight, "labels": labels, "temperature": temperature}
    logprobs = by_docstring(linear_cross_entropy, "logprobs", **names)
    entropy = by_docstring(linear_cross_entropy, "entropy", **names)
    if reduction != "none":
        logprobs = getattr(logprobs, reduction)()
    assert_close(ours, (logprobs, entropy), rtol=1e-11, atol=1e-11)
    found, true = (lce_gradients(*x, (hidden, weight)) for x in (ours, (logprobs, entropy)))
    assert_close(found, true, rtol=1e-10, atol=1e-9)


def test_linear_cross_entropy_without_labels():
    hidden, weight, labels = inputs()
    labels[0, 0] = -100
    logprobs, entropy = linear_cross_entropy(hidden, weight, labels)
    mean, _ = linear_cross_entropy(hidden, weight, labels, 1.0, "mean")
    assert logprobs[0] == 0 and entropy[0] > 0
    assert_close(mean, logprobs.sum() / (B * T))
    assert linear_cross_entropy(hidden[:0], weight, labels[:0], 1.0, "mean")[0] == 0


SPLIT = (20, V - 20)


def of_a_shard(weight, group):
    """Return outputs and gradients of both functions, given this rank's rows of the weight."""
    hidden, _, targets = inputs()
    found = []
    for temperature in (1.0, 0.6):
        outputs = linear_cross_entropy(hidden, weight, targets, temperature, "none", group)
        found.append((outputs, lce_gradients(*outputs, (hidden, weight))))
    arguments = grpo_arguments(*inputs(), 1.0)
    loss = grpo_loss(hidden, weight, targets, **arguments, process_group=group)
    found.append(((loss,), torch.autograd.grad(loss, (hidden, weight))))
    return found


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    weight = inputs()[1].detach().split(SPLIT)[rank].requires_grad_()
    found = of_a_shard(weight, dist.group.WORLD)
    torch.save(torch.utils._pytree.tree_map(torch.Tensor.detach, found), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_vocabulary_of_two_ranks(tmp_path):
    spawn(worker, str(tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = of_a_shard(inputs()[1], None)
    for first, second, (outputs, (dh, dw)) in zip(*ranks, whole, strict=True):
        for mine, (our_dh, _) in (first, second):
            assert_close(mine, outputs, rtol=1e-11, atol=1e-11)
            assert_close(our_dh, dh, rtol=1e-10, atol=1e-11)
        our_dw = torch.cat([gradients[1] for _, gradients in (first, second)])
        assert_close(our_dw, dw, rtol=1e-10, atol=1e-11)


def grpo(**changes):
    hidden, weight, targets = inputs()
    arguments = {"mask": BOOL, "advantages": torch.ones(B), "targets": targets, **changes}
    return grpo_loss(hidden, weight, **arguments)


def lce(*labels, **changes):
    return linear_cross_entropy(*inputs()[:2], *labels, **changes)


STATS = TokenStats(logsumexp=torch.ones(B, T), mean_logit=torch.ones(B, T))
BAD = {
    "stats: has no entropy": lambda: losses.rent_reward(STATS, BOOL),
    "stats: has no logprob": lambda: losses.em_rl_sequence_reward(STATS, BOOL),
    "vocab_size: 0 is not an int > 0": lambda: losses.self_certainty(STATS, 0),
    "mask: expected exactly": lambda: losses.intuitor_reward(STATS, BOOL[0], V),
    "mask: expected a tensor": lambda: grpo(mask=None),
    "group_size: 1 is not": lambda: losses.group_advantages(torch.ones(4), 1),
    r"rewards: \(4,\) is not whole": lambda: losses.group_advantages(torch.ones(4), 3),
    "loss_type: 'luspo' is unknown; use one of": lambda: grpo(loss_type="luspo"),
    "num_items_in_batch: is None": lambda: grpo(loss_type="dapo"),
    "max_completion_length: is None": lambda: grpo(loss_type="dr_grpo"),
    "ref_logprobs: is None with beta = 0.1": lambda: grpo(beta=0.1),
    "epsilon: -0.1 is not >= 0": lambda: grpo(epsilon=-0.1),
    "epsilon_high: -0.1 is not >= 0": lambda: grpo(epsilon_high=-0.1),
    "targets: expected a tensor": lambda: grpo(targets=None),
    "advantages: expected exactly": lambda: grpo(advantages=torch.ones(T)),
    "old_logprobs: expected exactly": lambda: grpo(old_logprobs=torch.ones(B)),
    "ref_logprobs: must not require grad": lambda: grpo(
        ref_logprobs=torch.ones(B, T, requires_grad=True)
    ),
    "reduction: 'max' is unknown": lambda: lce(inputs()[2], reduction="max"),
    r"labels: expected exactly \(20,\), got \(3,\)": lambda: lce(torch.ones(3).long()),
    "labels: expected a tensor": lambda: lce([1, 2]),
}


@pytest.mark.parametrize("text", BAD)
def test_errors(text):
    with pytest.raises((ValueError, TypeError), match=f"^{text}"):
        BAD[text]()
