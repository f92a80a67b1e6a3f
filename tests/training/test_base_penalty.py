"""The penalty on the KL divergence from the base model: with LoRA, and with a copy of it."""

import copy
import json
from contextlib import nullcontext
from io import StringIO

import pytest
import torch
from rich.console import Console
from training.adapters import lora, trained, wide
from training.tiny import loss_and_gradients, make_model, run, save_tiny, settings

from em_kernels.commands import plan
from em_kernels.training.console import update_line
from em_kernels.training.rollouts.sampling import Rollout
from em_kernels.training.settings import UserError
from em_kernels.training.trainer import train

PROMPT = [5, 6, 7]
ROLLOUTS = [Rollout(PROMPT, [*range(8, 8 + n)], False) for n in (3, 1, 5)]
WEIGHT = 0.7


def penalised(model, base_model, without, temperature, official):
    """Return the mean entropy and KL(model || base) from full logits, differentiable.

    The base is base_model within the context that without() returns.
    """
    entropies, divergences = [], []
    for rollout in ROLLOUTS:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad(), without():
            base = (base_model(ids).logits[0] / temperature).log_softmax(-1)
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
@pytest.mark.parametrize(
    "mode, kind",
    [("lora", "qwen2"), ("lora", "gemma2"), ("full", "qwen2"), ("full", "phi")],
)  # phi: a head with a bias
def test_loss_and_gradient(mode, kind, changes, objective, tmp_path):
    model = wide(kind, dtype=torch.float64)
    base, without = None, nullcontext
    if mode == "lora":
        without = trained(model, lora()).double().disable_adapter
    else:
        base = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    if kind == "gemma2":
        changes = changes | {"share_prefix": False}
    config = settings(
        "-", tmp_path, kl_weight=WEIGHT, loss_temperature=0.8, objective=objective, **changes
    )
    given = model, base or model, without, 0.8, config.official_loss
    entropy, divergence = penalised(*given)
    (config.sign * entropy + WEIGHT * divergence).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    loss, found = loss_and_gradients(model, ROLLOUTS, config, base=base)
    assert loss.entropy == pytest.approx(entropy.item(), rel=1e-6)
    assert loss.divergence == pytest.approx(divergence.item(), rel=1e-6) and divergence > 1e-4
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in model.named_parameters() if mode == "full" or "lora_" in n}


@pytest.mark.filterwarnings("error:Converting a tensor")
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run(mode, tmp_path):
    """In the first update the model is the base, so the divergence is exactly 0."""
    base = save_tiny(tmp_path / "model", "qwen2", tied=False)
    changes = {"mode": mode, "steps": 3, "lr": 0.01}
    free, held = (
        run(settings(base, tmp_path / str(weight), kl_weight=weight, **changes)).metrics
        for weight in (0.0, 5.0)
    )
    assert "divergence" not in free[0]
    assert held[0]["divergence"] == 0 and held[-1]["divergence"] > 0
    assert " nats  KL 0  " in update_line(held[0], 3) and "KL" not in update_line(free[0], 3)
    assert held[0]["entropy"] == free[0]["entropy"] and held[-1]["entropy"] > free[-1]["entropy"]


def test_a_model_that_was_trained_is_no_base(tmp_path):
    """A run resumed with it would stay near what it has become."""
    base = save_tiny(tmp_path / "model", "qwen2", tied=False)
    config = settings(base, tmp_path / "run", steps=2, kl_weight=0.5)
    model = make_model("qwen2", tied=False)
    run(config, model)
    longer = config.model_copy(update={"steps": 3})
    with pytest.raises(UserError, match="^model: a run in this process has trained it; leave it"):
        train(longer, console=Console(file=StringIO()), model=model, resume=True)
    assert len(train(longer, console=Console(file=StringIO()), resume=True).metrics) == 3


def test_a_budget_below_two_rows_of_logits(tmp_path):
    base = save_tiny(tmp_path / "model", "qwen2", tied=False)
    config = settings(base, tmp_path / "run", kl_weight=0.5, chunk_bytes=1500)
    with pytest.raises(UserError, match="^chunk_bytes: "):
        run(config)
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()


@pytest.mark.slow
def test_plans_count_a_second_model(capsys):
    command = ["--model", "demo", "--gpu", "4090", "--json"]
    found = []
    for more in ([], ["--kl-weight", "0.1"]):
        assert plan.run([*command, *more]) == 0
        found.append({x["name"]: x for x in json.loads(capsys.readouterr().out)["modes"]})
    free, held = found
    assert free.keys() == held.keys()
    for name, mode in held.items():
        base = mode["device"].get("base model", 0)
        weights = mode["device"]["weights"] + mode["device"]["buffers"]
        assert base == (0 if name.startswith("lora") else weights)
        assert sum(mode["seconds"].values()) > sum(free[name]["seconds"].values())
    with pytest.raises(UserError, match="^kl_weight: "):
        plan.run([*command, "--kl-weight", "0.1", "--engine", "fsdp2", "--ranks", "2"])
