"""Rewards against their docstrings' formulas on plain logits; what tests of losses share."""

import doctest
import inspect
import math
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from truth import leaves, logits_of

from em_kernels import TokenStats, fused_token_stats, losses
from em_kernels.losses import rewards

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
    if any(torch.is_tensor(x) and x.dtype == torch.float64 for x in names.values()):
        code = code.replace(".float()", "")
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
    found = doctest.testmod(rewards, extraglobs={"torch": torch})
    assert found.attempted > 0 and found.failed == 0


@pytest.mark.parametrize("epsilon", [1e-4, 1e-6])
@pytest.mark.parametrize("divide_by_std", [True, False])
def test_group_advantages(epsilon, divide_by_std):
    rewards = torch.tensor([0, 1, 1, 1, 5, 5])
    settings = {"epsilon": epsilon, "divide_by_std": divide_by_std}
    found = losses.group_advantages(rewards, 2, **settings)
    half = torch.tensor([-0.5, 0.5]) / (0.5**0.5 + epsilon if divide_by_std else 1)
    assert_close(found, torch.cat([half, torch.zeros(4)]))
    alone = losses.group_advantages(rewards, 1, **settings)  # as verl: mean 0, deviation 1
    assert_close(alone, rewards / (1 + epsilon if divide_by_std else 1))


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.37, 1.0])
@pytest.mark.parametrize(
    "mask", [BOOL, WEIGHTS, torch.zeros(B, T)], ids=["bool", "weights", "none"]
)
def test_entropy_mask(keep, mask):
    entropy = torch.rand(B, T, dtype=torch.float64)
    entropy[0, 1] = entropy[0, 3]
    clean = entropy.clone()
    entropy[~BOOL] = torch.nan
    found = losses.entropy_mask(TokenStats(entropy=entropy), mask, keep)
    if not mask.any():
        assert not found.any() and found.dtype == torch.bool
        return
    truth = by_docstring(
        losses.entropy_mask, "result", entropy=clean.where(BOOL, torch.nan), mask=mask, keep=keep
    )
    assert torch.equal(found, truth)
    assert found.sum() >= max(1, math.floor(keep * BOOL.sum()))


STATS = TokenStats(logsumexp=torch.ones(B, T), mean_logit=torch.ones(B, T))
BAD = {
    "stats: has no entropy": lambda: losses.rent_reward(STATS, BOOL),
    "stats: has no logprob": lambda: losses.em_rl_sequence_reward(STATS, BOOL),
    "stats: has no logsumexp": lambda: losses.intuitor_reward(torch.ones(B, T), BOOL, V),
    "vocab_size: expected an int, got Tensor": lambda: losses.self_certainty(STATS, torch.ones(V)),
    "vocab_size: 0 is not an int > 0": lambda: losses.self_certainty(STATS, 0),
    "mask: expected exactly": lambda: losses.intuitor_reward(STATS, BOOL[0], V),
    "group_size: 0 is not": lambda: losses.group_advantages(torch.ones(4), 0),
    "epsilon: -1 is not >= 0": lambda: losses.group_advantages(torch.ones(4), 2, epsilon=-1),
    "rewards: expected a tensor, got list": lambda: losses.group_advantages([1.0, 2.0], 2),
    r"rewards: \(4,\) is not whole": lambda: losses.group_advantages(torch.ones(4), 3),
    r"keep: 1.5 is not in \[0, 1\]": lambda: losses.entropy_mask(STATS, BOOL, 1.5),
}


@pytest.mark.parametrize("text", BAD)
def test_errors(text):
    with pytest.raises((ValueError, TypeError), match=f"^{text}"):
        BAD[text]()
