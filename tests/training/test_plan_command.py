"""The plan command: its table, and the train command that it prints."""

import json
import shlex

import pytest
import torch
from training.shapes import SMALL, two_layers
from transformers import AutoConfig

from em_kernels.commands import plan
from em_kernels.commands.flags import as_flags, train_settings
from em_kernels.training.config import TrainConfig
from em_kernels.training.planning.plan import CPU_RATES, GIB
from em_kernels.training.planning.planner import Planner
from em_kernels.training.settings import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    two_layers().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Let tables take the width that they need, whatever the terminal."""
    monkeypatch.setenv("COLUMNS", "200")


def flags_of(line):
    words = shlex.split(line)
    assert words[:2] == ["em-kernels", "train"]
    return words[2:]


@pytest.mark.parametrize("file", [False, True])
def test_command_for_another_machine(file, folder, capsys):
    asked = [
        "--gpu-memory",
        "0.56",
        "--host-memory",
        "8",
        "--max-new-tokens",
        "40",
        "--prompt",
        "a b",
    ]
    source = folder / "config.json" if file else folder
    arguments = ["--model", str(source), "--device", "cuda", "--prompt-tokens", "20", *asked]
    assert plan.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ["full", "offload", "offload to disk", "lora", "lora 4bit"]
    assert [mode["name"] for mode in found["modes"]] == names
    chosen = found["chosen"]
    assert chosen["fits"] and chosen["download"] == 0 and chosen["device_limit"] == int(0.56 * GIB)
    assert chosen["rates"]["flops"] > 0 and "sensitive" in found["note"]
    train = train_settings("plan", flags_of(found["command"]), "")[0]
    assert train.model == str(folder) and train.prompt == "a b" and train.mode == chosen["name"]
    again = Planner(train, two_layers(), 20, torch.device("cuda")).resolve()
    assert again.device == chosen["device"] and again.host == chosen["host"]
    different = {
        k for k, v in again.config.model_dump(mode="json").items() if v != chosen["config"][k]
    }
    assert different <= {"model"}


@pytest.mark.parametrize("layers", [pytest.param(8, marks=pytest.mark.slow), 2])
def test_speed_of_this_processor(layers, tmp_path, capsys):
    """Measure it at layers that are alike; with fewer layers, or for another machine, estimate."""
    config = AutoConfig.for_model("qwen2", **SMALL | {"num_hidden_layers": layers})
    config.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--device", "cpu", "--max-new-tokens", "40"]
    assert plan.run(arguments) == 0
    here = "Measured on this processor" in capsys.readouterr().out
    assert here == (layers == 8)
    assert plan.run([*arguments, "--json"]) == 0
    rates = json.loads(capsys.readouterr().out)["chosen"]["rates"]
    assert all(0 < rate < 1e18 for rate in rates.values())
    found = ("flops", "sampled_flops", "read", "entries", "bandwidth", "host")
    same = {name for name in found if rates[name] == getattr(CPU_RATES, name)}
    assert same == (set() if here else {*found})
    assert plan.run([*arguments, "--host-memory", "4"]) == 0
    assert "Assuming two cores" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gpt2", "mpt"])
def test_speed_with_a_short_context(kind, tmp_path, capsys):
    """GPT-2 is measured within its context; MPT, whose context has another name, is estimated."""
    small = {"n_positions": 64, "n_embd": 64, "n_head": 4, "n_layer": 8}
    if kind == "mpt":
        small = {"max_seq_len": 64, "d_model": 64, "n_heads": 4, "n_layers": 8}
    AutoConfig.for_model(kind, **small).save_pretrained(tmp_path)
    asked = ["--device", "cpu", "--prompt-tokens", "8", "--max-new-tokens", "9"]
    assert plan.run(["--model", str(tmp_path), *asked]) == 0
    told = {"gpt2": "Measured on this processor", "mpt": "Assuming two cores"}
    assert told[kind] in capsys.readouterr().out


def test_table(folder, capsys):
    arguments = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "40"]
    assert plan.run([*arguments, "--host-memory", "4"]) == 0
    text = capsys.readouterr().out
    for word in ("full", "lora", "scratch", "KV cache", "TFLOP/s", "Seconds", "sensitive"):
        assert word in text
    line = next(line for line in text.splitlines() if line.startswith("em-kernels train"))
    assert train_settings("plan", flags_of(line), "")[0].prompt == "YOUR PROMPT"
    assert plan.run([*arguments, "--host-memory", "0.01"]) == 1
    assert "missing" in capsys.readouterr().out


def test_flags_are_parsed_back():
    changed = TrainConfig(
        model="m",
        prompt='it\'s "quoted" -- $HOME',
        save_at=(2, 4),
        chat_template=False,
        save_optimizer=True,
        gradient_checkpointing=False,
        four_bit=True,
        mode="lora",
        lora_targets=("q_proj", "v_proj"),
        offload_dir="some where",
        sampling={"temperature": 0.25, "stop": ("a b", "x"), "max_new_tokens": 7},
        betas=(0.8, 0.9),
        micro_batch=77,
        keep=3,
        eps=1e-10,
    )
    assert train_settings("plan", as_flags(changed), "")[0] == changed


@pytest.mark.parametrize(
    "arguments, word",
    [
        ([], "model"),
        (["--model", "./nowhere"], "model"),
        (["--model", "demo", "--prompt-tokens", "0"], "prompt_tokens"),
        (["--model", "demo", "--prompt-tokens", "8192"], "prompt_tokens"),
        (["--model", "demo", "--max-new-tokens", "8192"], "sampling.max_new_tokens"),
    ],
)
def test_bad_plans(arguments, word):
    with pytest.raises(UserError, match=f"^{word}: "):
        plan.run(arguments)
