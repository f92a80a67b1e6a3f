"""What fails in the middle of a run leaves what was finished."""

from pathlib import Path

import pytest
import torch
from training.tiny import make_model, make_tokenizer, run, settings
from transformers import AutoModelForCausalLM

from em_kernels.training.checkpoint import save_checkpoint
from em_kernels.training.config import UserError
from em_kernels.training.trainer import _append


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_full_disk(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="output: cannot write .*metrics.jsonl: .*No space left"):
        _append(tmp_path / "metrics.jsonl", [{"update": 1}])


def test_checkpoint_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    model = make_model()
    with pytest.raises(UserError, match="output: cannot write the checkpoint .*Not a directory"):
        save_checkpoint(model, make_tokenizer(), tmp_path / "file" / "step-00001")


@pytest.mark.parametrize("finished", [0, 1])
def test_gradient_that_is_not_finite(finished, folder, tmp_path):
    """The update is not applied, and what was finished before is kept."""
    config = settings(folder, tmp_path / "run")
    model = make_model()
    calls = []

    def overflow(module, inputs, outputs):
        calls.append(module)
        return (inputs[0] * torch.inf,) if len(calls) > finished else None

    model.model.layers[0].mlp.register_full_backward_hook(overflow)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    kept = "step-00001 holds the last update" if finished else "no update yet"
    message = f"lr: the gradient of update {finished + 1} is not finite; lower it; .*{kept}"
    with pytest.raises(UserError, match=message):
        run(config, model)
    saved = tmp_path / "run" / "checkpoints" / "step-00001"
    left = AutoModelForCausalLM.from_pretrained(saved).state_dict() if finished else before
    assert all(torch.equal(left[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("finished", [0, 1])
def test_out_of_memory_keeps_what_was_finished_and_names_the_remedies(finished, folder, tmp_path):
    model = make_model()
    calls = []

    def exhaust(module, inputs, outputs):
        calls.append(module)
        if len(calls) > finished:
            raise torch.OutOfMemoryError

    model.model.layers[0].mlp.register_full_backward_hook(exhaust)
    kept = "step-00001 holds the last update" if finished else "no update yet"
    with pytest.raises(UserError, match=f"out of memory; .*{kept}; lower micro_batch_tokens"):
        run(settings(folder, tmp_path / "run"), model)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [p.name for p in checkpoints.glob("*")] == ["step-00001"] * finished
