"""Architectures with unusual features do what docs/architectures.md says."""

import pytest
import torch
from training.architectures import KINDS, PAGE, examine, make, page
from training.tiny import make_tokenizer, run, settings
from transformers import AutoModelForCausalLM

from em_kernels.cli import main

slow = pytest.mark.slow
EIGHT = [
    "bloom",  # no sdpa; positions by the mask
    pytest.param("doge", marks=slow),  # its cache gives other logits
    "gemma3",  # a language model beside a vision tower
    pytest.param("gemma4_text", marks=slow),  # layers that share others' keys
    pytest.param("gpt_neo", marks=slow),  # a window that its cache does not know
    pytest.param("mpt", marks=slow),  # positions by the place in a row
    "openai-gpt",  # no cache
    pytest.param("phimoe", marks=slow),  # a router that is an nn.Linear and gives three things
]


def rows(text, kind):
    return [line for line in text.splitlines() if line.startswith(f"| {kind} |")]


@pytest.mark.parametrize("kind", EIGHT)
def test_is_as_the_page_says(kind, tmp_path):
    found = examine(kind, tmp_path)
    assert found["verdict"] in ("accepted", "refused"), found
    assert rows(page({kind: found}), kind) == rows(PAGE.read_text(encoding="utf-8"), kind)


def test_a_refusal_is_one_line(tmp_path, capfd):
    """CpmAnt fails on meta tensors, for which torch logs a traceback of its own."""
    make("cpmant").save_pretrained(tmp_path / "model")
    capfd.readouterr()
    assert main(["plan", "--model", str(tmp_path / "model"), "--max-new-tokens", "8"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("em-kernels plan: error: model: CpmAntForCausalLM cannot be planned (")


def test_a_vision_tower_stays_as_it_was(tmp_path):
    make("gemma3").bfloat16().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    result = run(settings(tmp_path / "model", tmp_path / "run", steps=1, lr=0.01))
    after = AutoModelForCausalLM.from_pretrained(result.checkpoint).state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    text = {name for name in before if "language_model" in name or "lm_head" in name}
    assert changed <= text and len(changed) > len(text) / 2 and text < before.keys()


def test_the_page_has_all():
    text = PAGE.read_text(encoding="utf-8")
    missing = text.partition("## Not tried")[2].strip(" .\n").split(", ")
    assert {kind for kind in KINDS if not rows(text, kind)} == set(missing)
