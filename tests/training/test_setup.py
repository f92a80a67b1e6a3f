"""Inputs of a run, and refusals before anything is written."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from training.tiny import TRAINING_TEXT, make_model, read, run, save_tiny, settings
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from em_kernels.training.config import read_yaml
from em_kernels.training.settings import UserError
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


def test_weights_of_another_shape(tmp_path):
    model = save_tiny(tmp_path / "model", tied=False)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 31)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    said = r"up_proj.weight is stored as \(48, 31\), and config.json says \(48, 32\); take the"
    with pytest.raises(UserError, match=said):
        run(settings(model, tmp_path / "run"))


def test_code_of_a_model_is_not_run(tmp_path, monkeypatch):
    """A model's own code is refused without asking on the terminal."""
    model = save_tiny(tmp_path / "model")
    path = model / "config.json"
    values = {**json.loads(path.read_text()), "model_type": "its_own"}
    values["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    path.write_text(json.dumps(values))
    (model / "own.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="^model: cannot open .* brings code of its own, which is"):
        run(settings(model, tmp_path / "run"))


def test_attention_that_the_model_has(tmp_path):
    """auto falls back to eager and says so; an attention asked for by name is refused."""
    model = save_tiny(tmp_path / "model", "bloom", n_layer=2, n_head=4)
    text = StringIO()
    config = settings(model, tmp_path / "run", steps=1, attention="auto")
    train(config, console=Console(file=text, width=200))
    assert "Attention: eager; BloomForCausalLM has no sdpa." in text.getvalue()
    with pytest.raises(UserError, match="^attention: 'sdpa' is refused: Bloom.*; use auto$") as it:
        run(settings(model, tmp_path / "other", attention="sdpa"))
    assert "http" not in str(it.value)


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
    with pytest.raises(UserError, match="prompt: the tokenizer returns no tokens for it"):
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
    (model / "model.safetensors").write_bytes(b"")  # broken, if it were read
    config = settings(model, tmp_path / "run", mode="lora", lora_targets=(target,))
    with pytest.raises(UserError, match=f"lora_targets: {target} {said}"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_a_token_that_the_model_does_not_have(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    with pytest.raises(
        UserError,
        match=r"prompt: has token 267 \('<new>'\), but the model's vocabulary has 267 entries",
    ):
        run(settings(model, tmp_path / "run", prompt="a <new> one"))
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_when_its_template_tells_another_day(folder, tmp_path):
    """The template tells the time, as Llama's tells the day."""
    model = shutil.copytree(folder, tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%f') }}" + template.read_text())
    first = settings(model, tmp_path / "run", steps=1)
    run(first)
    more = first.model_copy(update={"steps": 2})
    assert len(train(more, console=Console(quiet=True), resume=True).metrics) == 2
    replayed = {"output": tmp_path / "again", "rollouts_from": first.output}
    run(more.model_copy(update=replayed))
    rows = read(first.output / "rollouts.jsonl")
    assert len({tuple(row["prompt_ids"]) for row in rows}) == 1 and len(rows) == 12
    assert (tmp_path / "again" / "rollouts.jsonl").read_bytes() == (
        first.output / "rollouts.jsonl"
    ).read_bytes()
    other = {"output": tmp_path / "other", "rollouts_from": first.output, "prompt": "Hello"}
    with pytest.raises(UserError, match="prompt: the completions .* are of another prompt"):
        run(more.model_copy(update=other))


def test_a_run_of_relative_paths_goes_on_from_anywhere(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "here" / "model")
    (tmp_path / "here" / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    changes = {"prompt": None, "prompt_from": "prompts.jsonl"}
    run(settings("model", "run", steps=1, **changes))
    monkeypatch.chdir(tmp_path / "there")
    later = read_yaml(tmp_path / "here" / "run" / "config.yaml")
    update = {"output": Path("../here/run"), "steps": 2, "model": "../here/model"}
    later = later.model_copy(update=update)
    assert len(train(later, console=Console(quiet=True), resume=True).metrics) == 2
