"""Saved adapters open in peft and merge exactly."""

import json
import os
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from training.adapters import (
    ARCHITECTURES,
    FP32_AND_BF16,
    IDS,
    WIDE,
    error_of,
    is_adapter,
    lora,
    saved,
    trained,
    wide,
)
from training.tiny import make_tokenizer, rounded, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from em_kernels.cli import main
from em_kernels.commands.merge import run as merge_command
from em_kernels.hf import check_head, head_of
from em_kernels.training.models.lora import add_adapters
from em_kernels.training.runs import merge as merge_module
from em_kernels.training.runs.merge import merge
from em_kernels.training.settings import UserError


def test_adapter_folder_is_written_without_the_network(tmp_path, monkeypatch):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = wide()
    model.name_or_path = "somebody/a-model"
    adapted = trained(model)
    folder = saved(adapted, tmp_path / "adapter")
    assert not asked
    names = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/a-model"
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 12, True)
    assert adapted.peft_config["default"].inference_mode is False
    opened = PeftModel.from_pretrained(wide(), folder)
    assert torch.equal(opened(IDS).logits, model(IDS).logits)
    assert not asked


@FP32_AND_BF16
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
def test_peft_opens_the_folder(targets, dtype, tmp_path):
    base = save_tiny(tmp_path / "model", **WIDE, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    adapted = trained(model, lora(lora_targets=targets))
    folder = saved(adapted, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {dtype}
    opened = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for p in opened.parameters():  # peft widens adapters to fp32.
        p.data = p.data.to(dtype)
    here, there = dict(adapted.named_parameters()), dict(opened.named_parameters())
    assert here.keys() == there.keys()
    assert all(torch.equal(here[n], there[n]) and here[n].dtype == there[n].dtype for n in here)
    assert torch.equal(opened(IDS).logits, model(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == make_tokenizer().chat_template


def test_name_is_the_settings_where_the_model_has_none(tmp_path):
    folder = saved(add_adapters(wide(), lora(model="./here")), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./here"


@pytest.fixture
def adapter(tmp_path):
    """Saved adapters of a bf16 base."""
    base = save_tiny(tmp_path / "model", dtype=torch.bfloat16, **WIDE)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return saved(trained(model), tmp_path / "adapter")


@FP32_AND_BF16
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_merged_weights_are_the_exact_sums_rounded_once(kind, dtype, tmp_path):
    base = save_tiny(tmp_path / "model", kind, dtype=dtype, **WIDE, **ARCHITECTURES[kind])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.mul(2**16).round() / 2**16  # makes fp32 sums exact
    model.to(dtype).save_pretrained(base)
    model.float()
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    adapted = trained(model)
    for name, parameter in adapted.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.mul(64).round() / 64
    logits = model(IDS).logits
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    output = merge(saved(adapted, tmp_path / "adapter"), tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(output)
    assert found.dtype == torch.bfloat16 and type(found) is type(model)
    for name, parameter in found.named_parameters():
        layer, exact = layers.get(name.removesuffix(".weight")), before[name]
        if layer is not None:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            delta = 3.0 * (b.double() @ a.double())
            exact = exact + (delta.T if kind == "gpt2" else delta)
            assert not torch.equal(rounded(before[name]), parameter)
        assert torch.equal(parameter, rounded(exact)), name
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(IDS).logits
    assert 0 < error_of(merged, logits) < 0.04


def test_deltas_that_bf16_would_round_away(tmp_path):
    """1 + 2^-11 rounds to 1 in bf16; instead one weight in sixteen must become 1 + 2^-7."""
    base = save_tiny(tmp_path / "model", dtype=torch.bfloat16, **WIDE)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    model.save_pretrained(base)
    adapted = add_adapters(model, lora(lora_rank=1, lora_alpha=1, lora_targets=("up_proj",)))
    layer = model.model.layers[0].mlp.up_proj
    layer.lora_A["default"].weight.data.fill_(1.0)
    layer.lora_B["default"].weight.data.fill_(2**-11)
    output = merge(saved(adapted, tmp_path / "adapter"), tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(output).model.layers[0].mlp.up_proj.weight
    assert set(found.unique().tolist()) == {1.0, 1 + 2**-7}
    assert (found.float().mean() - 1).item() == pytest.approx(2**-11, rel=0.1)


def test_merged_folder_is_complete(tmp_path, adapter):
    (tmp_path / "merged").mkdir()  # An empty folder may be used.
    output = merge(adapter, tmp_path / "merged")
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.startswith("adapter") for name in names)
    assert AutoConfig.from_pretrained(output).dtype == torch.bfloat16
    assert {w.dtype for w in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.generation_config.eos_token_id == 0
    check_head(model, head_of(model))
    assert head_of(model).weight is model.model.embed_tokens.weight  # still tied
    assert AutoTokenizer.from_pretrained(output).chat_template == make_tokenizer().chat_template


def test_command_takes_a_runs_newest_checkpoint(tmp_path, adapter, capsys):
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step-00009", "step-99999", "step-100000", ".step-100001.partial"):
        shutil.copytree(adapter, checkpoints / name)
    for folder in checkpoints.iterdir():
        if folder.name != "step-100000":
            (folder / "adapter_model.safetensors").write_bytes(b"")
    assert merge_command([str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'merged'}\n"
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with pytest.raises(SystemExit, match="0"):
        merge_command(["--help"])
    assert "usage: em-kernels merge [-h] --output DIR RUN_OR_CHECKPOINT" in capsys.readouterr().out


def test_neighbours_of_the_output_stay(tmp_path, adapter, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new" / ".step-00001.partial").mkdir(parents=True)
    merge(adapter, Path("new") / "merged")
    assert sorted(os.listdir("new")) == [".step-00001.partial", "merged"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert merge(adapter, Path(".")) == tmp_path / "empty"
    monkeypatch.chdir(tmp_path)  # merge has replaced the folder that was the working directory.
    AutoModelForCausalLM.from_pretrained(tmp_path / "empty")


LOFTQ = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"up_proj": 40}},
    "bias of its own": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_merged_is_what_was_trained(name, tmp_path):
    """The merged model equals peft's, with variants that change the base when they are created."""
    base = save_tiny(tmp_path / "model", "qwen2", attention_bias=True, tied=False, **WIDE)
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = model(IDS).logits
    targets = ["q_proj", "up_proj"] if name != "bias of its own" else ["q_proj"]
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, **SETTINGS[name])
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    expected = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    output = merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(IDS).logits
    assert error_of(expected, plain) > 0.1
    assert error_of(merged, expected) < 0.04  # bf16's rounding, as in the test above


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "'corda' changed the base model by something"),
        (LOFTQ, "'loftq' changed the base model by something"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' changed the base model by something"),
        ({"modules_to_save": ["lm_head"]}, "have modules_to_save; merge them by peft's"),
        ({"bias": "all"}, "have bias 'all'; merge them by peft's merge_and_unload"),
        ({"peft_type": "IA3"}, "these adapters are IA3, not LoRA; merge them by peft's"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_adapters_that_are_not_their_sum_are_refused(changes, message, tmp_path, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message) as caught:
        merge(adapter, tmp_path / "merged")
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()


def test_what_nobody_has_foreseen_is_no_fault_of_the_users(tmp_path, adapter, monkeypatch, capfd):
    def broken(*_):
        raise ZeroDivisionError("of nothing")

    monkeypatch.setattr(merge_module, "to_bf16", broken)
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged")]) == 1
    said = "merge: error: merging into LlamaForCausalLM: ZeroDivisionError: of nothing; --debug"
    assert said in capfd.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_output_that_holds_something_is_refused(tmp_path, adapter):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="^output: .*merged already holds"):
        merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "notes.txt").read_text() == "mine"


def test_what_cannot_be_merged_leaves_nothing(tmp_path, adapter, folder):
    def refused(where, message):
        with pytest.raises(UserError, match=message) as caught:
            merge(where, tmp_path / "merged")
        assert "\n" not in str(caught.value)
        assert not [p for p in tmp_path.iterdir() if "merged" in p.name]

    refused(folder, r"^merge: .* has no adapter_config.json; name a run of mode lora$")
    refused(tmp_path / "nothing", "has no adapter_config.json")
    file = adapter / "adapter_model.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    first = next(name for name in weights if ".lora_A." in name)
    save_file({n: w for n, w in weights.items() if n != first}, file)
    refused(adapter, r"model and the adapters differ in \S+lora_A\S+; is it their base\?$")
    save_file({n.replace("layers.1", "layers.7"): w for n, w in weights.items()}, file)
    refused(adapter, r"model and the adapters differ in \S+layers.7.\S+; is it their base\?$")
    save_file({**weights, first: torch.zeros(4, 3)}, file)
    refused(adapter, r"model is not the adapters' base: .*layers.0.*")
    file.write_bytes(whole[:-8])
    refused(adapter, f"^merge: {adapter}: ")
    file.write_bytes(whole)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    refused(adapter, f"^merge: {adapter}: .*{tmp_path / 'model'}")
