"""What a run refuses to start from, with nothing written."""

import shutil
from io import StringIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from training.tiny import TRAINING_TEXT, make_model, read, run, save_tiny, settings
from transformers import PreTrainedTokenizerFast

from em_kernels.training.config import UserError
from em_kernels.training.trainer import train


def test_adapter_on_the_head_is_refused_with_nothing_written(folder, tmp_path):
    model = make_model(tied=False)
    model.lm_head.base_layer = torch.nn.Linear(32, 267, bias=False)
    with pytest.raises(UserError, match="model: its head carries an adapter"):
        run(settings(folder, tmp_path / "run"), model)
    assert not (tmp_path / "run").exists()


def test_state_space_model_is_refused_with_nothing_written(folder, tmp_path):
    model = make_model("lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(UserError, match="model: Lfm2ForCausalLM keeps a LinearAttentionLayer"):
        run(settings(folder, tmp_path / "run"), model)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path):
    model = save_tiny(tmp_path / "model", tied=False)
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights: lm_head.weight"):
        run(settings(model, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_pickled_weights_are_refused(tmp_path):
    model = save_tiny(tmp_path / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model: cannot load .*no file named model.safetensors"):
        run(settings(model, tmp_path / "run"))


def test_prompt_without_tokens(tmp_path):
    """A tokenizer without bytes or an unknown token drops what it does not know."""
    model = save_tiny(tmp_path / "model")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace("x", "")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(model)
    with pytest.raises(UserError, match="prompt: the tokenizer makes no token of it"):
        run(settings(model, tmp_path / "run", prompt="x", chat_template=False))


def test_without_a_chat_template_the_prompt_is_raw_and_it_says_so(folder, tmp_path, tokenizer):
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    text = StringIO()
    train(settings(model, tmp_path / "run", steps=1), console=Console(file=text, width=200))
    assert "no chat template: the prompt is used as it is" in text.getvalue()
    record = read(tmp_path / "run" / "rollouts.jsonl")[0]
    assert tokenizer.decode(record["prompt_ids"]) == TRAINING_TEXT


@pytest.mark.parametrize("target, said", [("lm_head", "is the output head"), ("wq", "names no")])
def test_lora_target_is_refused_before_weights_are_read(target, said, tmp_path):
    model = save_tiny(tmp_path / "model", tied=False)
    (model / "model.safetensors").write_bytes(b"")  # would be found broken
    config = settings(model, tmp_path / "run", mode="lora", lora_targets=(target,))
    with pytest.raises(UserError, match=f"lora_targets: {target} {said}"):
        run(config)
    assert not (tmp_path / "run").exists()
