"""Drop-ins against the formulas of verl, OpenRLHF and slime on full logits."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from spawned import spawn
from test_losses import BOOL, LENGTHS, SHIFT, B, T, V, assert_same_gradients, by_docstring, inputs
from test_policy_losses import grpo_arguments
from torch.testing import assert_close
from truth import logits_of, stats_of

from em_kernels.drop_ins import (
    linear_cross_entropy,
    openrlhf_policy_loss,
    slime_log_probs_and_entropy,
    verl_policy_loss,
)
from em_kernels.losses import clip_cov_loss, cross_entropy, grpo_loss


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
    head, split = (hidden, weight, targets), {"process_group": group}
    split |= {"chunk_bytes": 5 * V * 8}
    generator = torch.Generator().manual_seed(5)
    classes = torch.rand(V, generator=generator)
    rl = {"mask": BOOL, "advantages": torch.tensor([1.0, -2.0, 0.5, 0.0]), **split}
    rl["old_logprobs"] = torch.full((B, T), -4.0)
    for loss in (
        cross_entropy(*head, class_weights=classes, **split),
        cross_entropy(*head, label_smoothing=0.1, z_loss=0.1, reduction="none", **split).mean(),
        grpo_loss(*head, importance_sampling_level="sequence", **rl),
        clip_cov_loss(*head, bounds=(0, 9), ratio=0.3, generator=generator, **rl),
    ):
        found.append(((loss,), torch.autograd.grad(loss, (hidden, weight))))
    return found


def shares_of_dhidden(weight, group):
    """Return dhidden of the drop-ins for callers that sum it over the group."""
    hidden, _, targets = inputs()
    flat = hidden.flatten(0, 1)
    settings = {"caller_sums_dhidden": True}
    outputs = linear_cross_entropy(hidden, weight, targets, group=group, **settings)
    log_prob, entropy = slime_log_probs_and_entropy(
        flat, weight, targets.flatten(), group, True, **settings
    )
    return [lce_gradients(*outputs, [hidden])[0], lce_gradients(log_prob, entropy, [hidden])[0]]


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
    found = of_a_shard(weight, dist.group.WORLD), shares_of_dhidden(weight, dist.group.WORLD)
    torch.save(torch.utils._pytree.tree_map(torch.Tensor.detach, found), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_vocabulary_of_two_ranks(tmp_path):
    spawn(worker, str(tmp_path), nprocs=2)
    ranks, shares = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    whole = of_a_shard(inputs()[1], None)
    for first, second, (outputs, (dh, dw)) in zip(*ranks, whole, strict=True):
        for mine, (our_dh, _) in (first, second):
            assert_close(mine, outputs, rtol=1e-11, atol=1e-11)
            assert_close(our_dh, dh, rtol=1e-10, atol=1e-11)
        our_dw = torch.cat([gradients[1] for _, gradients in (first, second)])
        assert_close(our_dw, dw, rtol=1e-10, atol=1e-11)
    for first, second, dh in zip(*shares, shares_of_dhidden(inputs()[1], None), strict=True):
        assert_close(first + second, dh, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("count", [B * T, 0])
def test_slime(with_entropy, temperature, count):
    hidden, weight, tokens = inputs()
    hidden, tokens = hidden.flatten(0, 1)[:count], tokens.flatten()[:count]
    names = {"hidden": hidden, "weight": weight, "tokens": tokens, "temperature": temperature}
    found = slime_log_probs_and_entropy(
        hidden, weight, tokens, None, with_entropy, temperature=temperature
    )
    truth = [by_docstring(slime_log_probs_and_entropy, x, **names) for x in ("log_prob", "entropy")]
    assert_close(found[0], truth[0], rtol=1e-11, atol=1e-11)
    assert_close(found[1], truth[1] if with_entropy else None, rtol=1e-11, atol=1e-11)


# Policy losses


def policy_inputs():
    """Return completions, the last one empty, and a ratio beyond each clip in both directions."""
    hidden, weight, targets = inputs()
    arguments = grpo_arguments(hidden, weight, targets)
    advantages = torch.tensor([1.5, -0.7, -1.1, 0.0], dtype=torch.float64)[:, None].expand(B, T)
    return hidden, weight, targets, arguments["old_logprobs"].nan_to_num(), advantages


VERL = {
    "token-mean": lambda losses: losses.sum() / BOOL.sum(),
    "seq-mean-token-mean": lambda losses: (losses.sum(-1)[:3] / LENGTHS[:3]).mean(),
    "seq-mean-token-sum": lambda losses: losses.sum(-1)[:3].mean(),
    "seq-mean-token-sum-norm": lambda losses: losses.sum(-1)[:3].mean() / T,
}


@pytest.mark.parametrize("mode", VERL)
@pytest.mark.parametrize("batch", ["", "global", "scale"])
def test_verl(mode, batch):
    hidden, weight, targets, old, advantages = policy_inputs()
    names = {"cliprange_low": 0.2, "cliprange_high": 0.28, "clip_ratio_c": 1.4}
    factors = torch.linspace(0.5, 1.5, B * T, dtype=torch.float64).view(B, T)
    shared = {**names, "rollout_is_weights": factors}
    scale = 1.0
    settings = {"loss_agg_mode": mode, **shared}
    if batch == "global":
        settings |= {"dp_size": 2, "batch_num_tokens": 30, "global_batch_size": torch.tensor(7)}
        scale = 2 * int(BOOL.sum()) / 30 if mode == "token-mean" else 2 * 3 / 7
    if batch == "scale" and mode == "seq-mean-token-sum-norm":
        settings["loss_scale_factor"] = 9
        scale = T / 9
    found = verl_policy_loss(hidden, weight, targets, old, advantages, BOOL, **settings)
    log_prob = stats_of(logits_of(hidden, weight), targets)["logprob"]
    names = {"log_prob": log_prob, "old_log_prob": old, "advantages": advantages, **shared}
    names["response_mask"] = BOOL.double()
    losses = by_docstring(verl_policy_loss, "losses", **names) * factors * BOOL
    truth = scale * VERL[mode](losses)
    assert_same_gradients(found[0], (hidden, weight), truth, (hidden, weight))
    if mode == "token-mean" and not batch:
        assert_close(by_docstring(verl_policy_loss, "pg_loss", **names), truth)
    plain, clipped = (by_docstring(verl_policy_loss, x, **names) for x in ("plain", "clipped"))
    ratio = torch.exp(log_prob - old)
    logged = clipped > plain, old - log_prob, (ratio > 1.4) & (advantages < 0)
    assert all(x[BOOL].double().mean() > 0 for x in (logged[0], logged[2]))
    for mine, true in zip(found[1:], logged, strict=True):
        assert_close(mine, true[BOOL].double().mean().detach())


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("dual_clip", [None, 1.4])
@pytest.mark.parametrize("token_level", [True, False])
def test_openrlhf(kind, dual_clip, token_level):
    hidden, weight, targets, old, advantages = policy_inputs()
    settings = {"policy_loss_type": kind, "dual_clip": dual_clip, "token_level_loss": token_level}
    settings |= {"clip_eps_low": 0.1, "clip_eps_high": 0.15}
    found = openrlhf_policy_loss(hidden, weight, targets, old, advantages, BOOL, **settings)
    # Their formula is NaN where a row has no actions.
    log_probs = stats_of(logits_of(hidden, weight), targets)["logprob"]
    names = {"log_probs": log_probs[:3], "old_log_probs": old[:3], "advantages": advantages[:3]}
    names |= {"action_mask": BOOL[:3].double(), **settings}
    truth = by_docstring(openrlhf_policy_loss, "loss", **names)
    assert_same_gradients(found[0], (hidden, weight), truth, (hidden, weight))
    ratio, clipped = (by_docstring(openrlhf_policy_loss, x, **names) for x in ("ratio", "clipped"))
    held = (clipped * advantages[:3] < ratio * advantages[:3])[BOOL[:3]].double()
    assert_close(found[1], held.mean())
    assert_close(found[2], (old - log_probs)[BOOL].mean().detach())


def lce(*labels, **changes):
    return linear_cross_entropy(*inputs()[:2], *labels, **changes)


def policy(function, **changes):
    return function(*policy_inputs(), BOOL, **changes)


BAD = {
    "reduction: 'max' is unknown": lambda: lce(inputs()[2], reduction="max"),
    r"labels: expected exactly \(20,\), got \(3,\)": lambda: lce(torch.ones(3).long()),
    "labels: expected a tensor": lambda: lce([1, 2]),
    "loss_agg_mode: 'mean' is unknown": lambda: policy(verl_policy_loss, loss_agg_mode="mean"),
    "clip_ratio_c: 1.1 is not >= 1.2": lambda: policy(verl_policy_loss, clip_ratio_c=1.1),
    "batch_num_tokens: is None with dp_size = 2": lambda: policy(verl_policy_loss, dp_size=2),
    "dp_size: 0 is not >= 1": lambda: policy(verl_policy_loss, dp_size=0),
    "cliprange: expected a number, got str": lambda: policy(verl_policy_loss, cliprange="0.2"),
    "hidden: expected .*, got a scalar": lambda: linear_cross_entropy(
        torch.ones(()), torch.ones(3, 2), torch.tensor(1)
    ),
    "cliprange_lo: verl_policy_loss has no such argument": lambda: policy(
        verl_policy_loss, cliprange_lo=1
    ),
    "beta: openrlhf_policy_loss has no such argument": lambda: policy(
        openrlhf_policy_loss, beta=0.1
    ),
    "policy_loss_type: 'cispo' is unknown": lambda: policy(
        openrlhf_policy_loss, policy_loss_type="cispo"
    ),
    "dual_clip: 1 is not >= 1.2": lambda: policy(openrlhf_policy_loss, dual_clip=1),
}


@pytest.mark.parametrize("text", BAD)
def test_errors(text):
    with pytest.raises((ValueError, TypeError), match=f"^{text}"):
        BAD[text]()
