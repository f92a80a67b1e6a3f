"""Failures in the middle of a run keep what was finished."""

import pytest
import torch
from training.tiny import make_model, rounded, run, settings
from transformers import AutoModelForCausalLM

from em_kernels.training.rollouts import sampling
from em_kernels.training.rollouts.token_rows import TokenRows
from em_kernels.training.settings import UserError


@pytest.mark.parametrize("finished", [0, 1])
def test_gradient_that_is_not_finite(finished, folder, tmp_path):
    """The update is not applied, and what was finished before is kept."""
    config = settings(folder, tmp_path / "run")
    model = make_model()
    calls = []

    def overflow(module, inputs, outputs):
        calls.append(module)
        # An update has two backwards: the completions' and the shared prompt's.
        return (inputs[0] * torch.inf,) if len(calls) > 2 * finished else None

    model.model.layers[0].mlp.register_full_backward_hook(overflow)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    kept = "step-00001 holds the last update" if finished else "no update is finished"
    message = f"lr: the gradient of update {finished + 1} is not finite; lower it; .*{kept}"
    with pytest.raises(UserError, match=message):
        run(config, model)
    saved = tmp_path / "run" / "checkpoints" / "step-00001"
    left = AutoModelForCausalLM.from_pretrained(saved).state_dict() if finished else before
    kept = {name: rounded(x) if finished else x for name, x in model.state_dict().items()}
    assert all(torch.equal(left[name], x) for name, x in kept.items())


@pytest.mark.parametrize("finished", [0, 1])
def test_out_of_memory_keeps_what_was_finished_and_names_the_remedies(finished, folder, tmp_path):
    model = make_model()
    calls = []

    def exhaust(module, inputs, outputs):
        calls.append(module)
        if len(calls) > 2 * finished:  # two backwards an update, as above
            raise torch.OutOfMemoryError

    model.model.layers[0].mlp.register_full_backward_hook(exhaust)
    kept = ".*step-00001 holds the last update" if finished else "no update is finished"
    with pytest.raises(
        UserError, match=f"out of memory with micro_batch .*; {kept}; use .*--moments bf16"
    ):
        run(settings(folder, tmp_path / "run"), model)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [p.name for p in checkpoints.glob("*")] == ["step-00001"] * finished


def test_out_of_memory_keeps_the_completions_that_are_done(folder, tmp_path, monkeypatch):
    batches = []

    class Exhausted(TokenRows):
        def __init__(self, model, prompts, new_tokens):
            batches.append(len(prompts))
            if len(batches) in (1, 3):
                raise torch.OutOfMemoryError
            super().__init__(model, prompts, new_tokens)

    auto = {"steps": 1, "rollout_batch": "auto"}
    run(settings(folder, tmp_path / "plain", **auto))
    monkeypatch.setattr(sampling, "rows_for", lambda model: Exhausted)
    run(settings(folder, tmp_path / "run", **auto))
    assert batches == [6, 3, 3, 1, 1, 1]
    files = [tmp_path / name / "rollouts.jsonl" for name in ("plain", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
