"""Training with fp16 weights: a scaled loss, overflows, and what is refused."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training.lives import comparable, content
from training.test_step import many_rollouts
from training.tiny import PLAIN, loss_and_gradients, make_model, run, settings

from em_kernels.training.engines import optimizer
from em_kernels.training.evaluation.teacher_forcing import mean_entropies
from em_kernels.training.models.loading import auto_dtype
from em_kernels.training.rollouts.sampling import generate
from em_kernels.training.settings import UserError
from em_kernels.training.trainer import train

FP16 = torch.float16
TOO_LARGE = 2.0**30
OVERFLOW = "^dtype: this model's activations overflow float16, .*; use float32 or bfloat16"


def test_gradients_that_fp16_would_round_to_zero(monkeypatch):
    """Flat distributions have small gradients: 1e-8 and less per token of a mean over many."""
    options = {"initializer_range": 0.02}
    config, rollouts = settings("-", "-", loss_temperature=8), many_rollouts(64)
    loss, truth = loss_and_gradients(make_model(dtype=FP16, **options).float(), rollouts, config)

    def errors(scale):
        monkeypatch.setattr(optimizer, "LOSS_SCALE", scale)
        same, found = loss_and_gradients(make_model(dtype=FP16, **options), rollouts, config)
        assert same.entropy == pytest.approx(loss.entropy, rel=1e-3)
        assert found.keys() == truth.keys()
        off = {name: found[name] / scale - truth[name] for name in truth}
        return {n: (off[n].norm() / truth[n].norm()).item() for n in truth if "proj" in n}

    assert max(errors(optimizer.LOSS_SCALE).values()) < 16 * torch.finfo(FP16).eps
    assert min(errors(1.0).values()) > 0.5


@pytest.fixture
def trained(folder, tmp_path, monkeypatch):
    """Return a function that trains in a folder and returns that, and how often it tried again."""

    def trained(name, steps, scale=TOO_LARGE):
        monkeypatch.setattr(optimizer, "LOSS_SCALE", scale)
        output, console = tmp_path / name, Console(file=StringIO(), width=300)
        asked = {"dtype": "float16", "save_optimizer": True, "save_at": (1,), "steps": steps}
        config = settings(folder, output, **asked)
        train(config, console=console, resume=output.exists())
        return output, console.file.getvalue().count("The gradient overflowed")

    return trained


def scale_in(run, update):
    state = load_file(run / f"checkpoints/step-0000{update}/training_state.safetensors")
    return state["loss_scale"].item()


def test_a_scale_that_is_too_large_changes_nothing_and_is_resumed(trained):
    stopped, first = trained("stopped", 1)
    fitting = scale_in(stopped, 1)
    assert first > 0 and fitting == TOO_LARGE / 2**first
    other, none = trained("fitting", 1, fitting)
    assert none == 0 and comparable(other) == comparable(stopped)
    update = content(stopped / "checkpoints/step-00001")
    assert update == content(other / "checkpoints/step-00001")
    whole, count = trained("whole", 2)
    _, second = trained("stopped", 2)
    assert second == count - first and scale_in(whole, 2) == TOO_LARGE / 2**count
    assert comparable(whole) == comparable(stopped)
    last = content(whole / "checkpoints/step-00002")
    assert last == content(stopped / "checkpoints/step-00002")


def test_a_gradient_that_is_never_finite(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer, "LOSS_SCALE", 4.0)
    model = make_model(dtype=FP16)
    mlp, calls = model.model.layers[0].mlp, []

    def overflow(module, inputs, outputs):
        calls.append(module)
        return (inputs[0] * torch.inf,)

    mlp.register_full_backward_hook(overflow)
    with pytest.raises(UserError, match="^lr: the gradient of update 1 is not finite; lower it"):
        run(settings(folder, tmp_path / "run", dtype="float16"), model)
    assert len(calls) == 2 * 3  # at 4, 2 and 1; the completions' backward and the prompt's


def overflowing():
    model = make_model()
    model.model.layers[0].mlp.down_proj.weight.data *= 1e5
    return model


def test_activations_that_overflow(folder, tokenizer, tmp_path):
    """One line, wherever it is noticed: in the first check, a sample, a score or a loss."""
    sample = [tokenizer, [[58, 75, 68, 87]], [(0,)], PLAIN]
    rollouts = generate(overflowing(), *sample)
    assert mean_entropies(overflowing(), rollouts, 1.0)[0] >= 0
    with pytest.raises(UserError, match=OVERFLOW):
        generate(overflowing().half(), *sample)
    with pytest.raises(UserError, match=OVERFLOW):
        mean_entropies(overflowing().half(), rollouts, 1.0)
    config = settings(folder, tmp_path / "run", dtype="float16")
    with pytest.raises(UserError, match=f"{OVERFLOW}$"):
        run(config, overflowing().half())
    assert not config.output.exists()
    model = make_model(dtype=FP16)
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, outputs: outputs * 1e5 if torch.is_grad_enabled() else outputs
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(UserError, match=f"{OVERFLOW}; no update is finished"):
        run(config, model)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_auto_takes_it_where_bf16_is_emulated():
    found = {sm: auto_dtype("cuda", sm) for sm in ((7, 0), (7, 5), (8, 0), (8, 9), (12, 0))}
    assert [sm for sm, dtype in found.items() if dtype == "float16"] == [(7, 0), (7, 5)]
    assert set(found.values()) == {"float16", "bfloat16"} and auto_dtype("cuda") == "bfloat16"
    assert auto_dtype("cpu") in ("float32", "bfloat16")
