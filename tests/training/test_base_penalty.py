"""The penalty on the KL divergence from the base model, in updates with LoRA."""

import json

import pytest
import torch
from training.adapters import lora, trained, wide
from training.tiny import loss_and_gradients, run, save_tiny, settings

from em_kernels.commands import plan
from em_kernels.training.config import TrainConfig
from em_kernels.training.console import update_line
from em_kernels.training.rollouts.sampling import Rollout
from em_kernels.training.settings import UserError

PROMPT = [5, 6, 7]
ROLLOUTS = [Rollout(PROMPT, [*range(8, 8 + n)], False) for n in (3, 1, 5)]
WEIGHT = 0.7


def penalised(model, adapted, temperature, official):
    """Return the mean entropy and KL(model || base) from full logits, differentiable."""
    entropies, divergences = [], []
    for rollout in ROLLOUTS:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad(), adapted.disable_adapter():
            base = (model(ids).logits[0] / temperature).log_softmax(-1)
        logp = (model(ids).logits[0] / temperature).log_softmax(-1)
        first = len(PROMPT) - (not official)
        scored = slice(first, first + len(rollout.response_ids))
        entropies.append(-(logp.exp() * logp).sum(-1)[scored])
        divergences.append((logp.exp() * (logp - base)).sum(-1)[scored])
    if official:  # micro-batches of one completion
        return (torch.stack([x.mean() for x in xs]).mean() for xs in (entropies, divergences))
    return (torch.cat(xs).mean() for xs in (entropies, divergences))


@pytest.mark.parametrize("objective", ["minimise", "maximise"])
@pytest.mark.parametrize(
    "changes",
    [
        {"share_prefix": True},
        {"share_prefix": True, "micro_batch_rows": 1},
        {"share_prefix": False, "gradient_checkpointing": True},
        {"official_loss": True, "micro_batch_rows": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_loss_and_gradient(kind, changes, objective, tmp_path):
    model = wide(kind, dtype=torch.float64)
    adapted = trained(model, lora()).double()
    if kind == "gemma2":
        changes = changes | {"share_prefix": False}
    config = settings(
        "-", tmp_path, kl_weight=WEIGHT, loss_temperature=0.8, objective=objective, **changes
    )
    entropy, divergence = penalised(model, adapted, 0.8, config.official_loss)
    (config.sign * entropy + WEIGHT * divergence).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    loss, found = loss_and_gradients(model, ROLLOUTS, config)
    assert loss.entropy == pytest.approx(entropy.item(), rel=1e-6)
    assert loss.divergence == pytest.approx(divergence.item(), rel=1e-6) and divergence > 1e-4
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


@pytest.mark.filterwarnings("error:Converting a tensor")
def test_a_run(tmp_path):
    """A new adapter does nothing, so the first update's divergence is exactly 0."""
    base = save_tiny(tmp_path / "model", "qwen2", tied=False)
    free, held = (
        run(settings(base, tmp_path / mode, mode=mode, steps=3, lr=0.01, kl_weight=weight)).metrics
        for mode, weight in (("lora", 0.0), ("auto", 5.0))
    )
    assert "divergence" not in free[0]
    assert held[0]["divergence"] == 0 and held[-1]["divergence"] > 0
    assert " nats  KL 0  " in update_line(held[0], 3) and "KL" not in update_line(free[0], 3)
    assert held[0]["entropy"] == free[0]["entropy"] and held[-1]["entropy"] > free[-1]["entropy"]


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_it_needs_a_base(mode):
    config = TrainConfig(model="demo", prompt="p", mode=mode, kl_weight=0.1)
    with pytest.raises(UserError, match=f"^kl_weight: goes with mode lora; mode {mode} keeps no"):
        config.check_complete()


def test_plans_have_its_modes_only(capsys):
    command = ["--model", "demo", "--kl-weight", "0.1", "--gpu", "4090"]
    assert plan.run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [mode["name"] for mode in found["modes"]] == ["lora", "lora 4bit"]
    assert "--kl-weight 0.1 --mode lora" in found["command"]
    for more in (["--mode", "full"], ["--engine", "fsdp2", "--ranks", "2"]):
        with pytest.raises(UserError, match="^kl_weight: "):
            plan.run([*command, *more])
