"""GGUF files named as the model: what is made of them, what is refused, and whole commands."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from safetensors.torch import load_file
from training.gguf_files import (
    EMBEDDING,
    HEAD,
    WORDS,
    random_model,
    stored,
    weights_of,
    write_gguf,
)
from training.tiny import CONTEXT, TEMPLATE, read, rounded, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.cli import main
from em_kernels.commands.plan import open_config
from em_kernels.training.models.gguf import _quick_reader, read_config
from em_kernels.training.models.loading import resolve_source
from em_kernels.training.settings import UserError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IDS = torch.arange(40).view(2, 20) * 6
UP, DOWN = "blk.0.ffn_up.weight", "blk.1.ffn_down.weight"


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Use a cache of this test, and return its folder, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "em_kernels"


@pytest.fixture
def file(tmp_path, model):
    return write_gguf(tmp_path / "tiny.gguf", model)


def folders(cache):
    return [path for path in cache.glob("*") if path.is_dir()]


def open_folder(source):
    return AutoModelForCausalLM.from_pretrained(source, dtype="auto")


# What is made


def test_the_model_is_the_files(file, model, cache, capfd):
    source = resolve_source(str(file))
    assert [str(path) for path in folders(cache)] == [source]
    found = open_folder(source)
    here, there = dict(found.named_parameters()), dict(model.named_parameters())
    assert here.keys() == there.keys()
    assert [name for name in here if not torch.equal(here[name], there[name])] == []
    torch.testing.assert_close(found(IDS).logits, model(IDS).logits)
    assert (found.generation_config.eos_token_id, found.generation_config.pad_token_id) == (0, 2)
    assert len({path.stat().st_mode for path in cache.glob("tiny-*/*")}) == 1  # all may be read
    assert capfd.readouterr() == (
        "",
        f"Making {source}, one process at a time\nDequantising tiny.gguf\n"
        "Tied: the file has no output.weight\n",
    )


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_weights_are_those_of_the_file_in_its_dtype(kind, model, tmp_path):
    """fp32 and fp16 are kept; whatever was quantised is rounded once more, to bf16."""
    source = resolve_source(str(write_gguf(tmp_path / "tiny.gguf", model, kind)))
    found, dtype = weights_of(open_folder(source).float()), DTYPES.get(kind, torch.bfloat16)
    for name, weight in weights_of(model).items():
        expected = stored(weight, kind if weight.ndim > 1 else "F32").to(dtype).float()
        assert torch.equal(torch.from_numpy(found[name]), expected), name
        if kind == "Q8_0":  # half a step of 1/127, and the rounding of the step and to bf16
            error = np.abs(found[name] - weight).reshape(-1, 32)
            assert (error <= 2**-7 * np.abs(weight).reshape(-1, 32).max(1, keepdims=True)).all()
    saved = load_file(f"{source}/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {dtype}
    assert "lm_head.weight" not in saved and open_folder(source).dtype == dtype


def test_the_embedding_once_more_as_the_head_is_tied(model, tmp_path, capfd):
    """The head is the better copy, in files of llama.cpp, and is kept for both."""
    embedding = weights_of(model)[EMBEDDING]
    path = write_gguf(
        tmp_path / "tiny.gguf", model, "Q4_0", weights={HEAD: embedding}, kinds={HEAD: "Q8_0"}
    )
    source = resolve_source(str(path))
    assert "\nTied: output.weight is token_embd.weight, quantised" in capfd.readouterr().err
    found = open_folder(source)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(found.lm_head.weight, stored(embedding, "Q8_0").bfloat16())
    assert "lm_head.weight" not in load_file(f"{source}/model.safetensors")
    assert found.config.tie_word_embeddings and read_config(path).tie_word_embeddings


def test_a_head_of_its_own_is_kept(tmp_path, capfd):
    model = random_model(tied=False)
    path = write_gguf(tmp_path / "tiny.gguf", model, "Q8_0")
    found = open_folder(resolve_source(str(path)))
    assert "\nNot tied: output.weight is a matrix of its own\n" in capfd.readouterr().err
    for matrix, name in ((found.lm_head, HEAD), (found.model.embed_tokens, EMBEDDING)):
        assert torch.equal(matrix.weight, stored(weights_of(model)[name], "Q8_0").bfloat16())
    assert not found.config.tie_word_embeddings and not read_config(path).tie_word_embeddings


def test_tokenizer_and_template_are_the_files(file):
    tokenizer = AutoTokenizer.from_pretrained(resolve_source(str(file)))
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == WORDS
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert tokenizer.model_max_length == CONTEXT and tokenizer.chat_template == TEMPLATE
    ids = tokenizer("the 33\n\n<|end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "Ġ", "3", "3", "ĊĊ", "<|end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the 33\n\n"
    for text in ("naïve 中文 🤖", " two  spaces\t\r\n", "def f(x):\n\treturn 3.14"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_folder_is_made_once_for_each_file(file, model, cache, capfd):
    source = resolve_source(str(file))
    weights = Path(source, "model.safetensors")
    written = weights.stat().st_mtime_ns
    capfd.readouterr()
    assert resolve_source(str(file)) == source and capfd.readouterr() == ("", "")
    assert weights.stat().st_mtime_ns == written
    file.unlink()
    write_gguf(file, model, weights={UP: 2 * weights_of(model)[UP]})
    other = resolve_source(str(file))
    assert other != source and sorted(map(str, folders(cache))) == sorted([source, other])


def test_what_lies_beside_the_file_is_not_read(model, tmp_path):
    save_tiny(tmp_path / "llama")
    adapters = {"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}
    (tmp_path / "llama" / "adapter_config.json").write_text(json.dumps(adapters))
    path = write_gguf(tmp_path / "llama" / "tiny.gguf", model)
    assert read_config(path).model_type == "qwen2"
    source = resolve_source(str(path))
    assert open_folder(source).config.model_type == "qwen2"
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert len(tokenizer) == len(WORDS) and tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("name", ["with a space.gguf", "[v1] (two).x.gguf", "größe.gguf"])
def test_any_name(name, model, tmp_path, capfd):
    source = resolve_source(str(write_gguf(tmp_path / name, model)))
    told = capfd.readouterr().err
    assert f"Making {source}, one" in told and f"\nDequantising {name}\n" in told
    assert read_config(tmp_path / name).hidden_size == open_folder(source).config.hidden_size


def test_the_header_has_the_config(file, cache):
    planned = read_config(file).to_dict()
    assert not cache.parent.exists()
    whole = open_folder(resolve_source(str(file))).config.to_dict()
    names = {"architectures", "dtype", "_name_or_path"}
    assert {k: v for k, v in planned.items() if k not in names}.items() <= whole.items()


def test_our_reader_skips_nothing_but_lists(file):
    """gguf's own reader takes seconds for the lists of a real vocabulary."""
    ours, theirs = _quick_reader(file), GGUFReader(file)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in ours.fields.items():
        if field.types == [GGUFValueType.ARRAY]:
            assert name.startswith("tokenizer.") and field.data == []
        else:
            assert field.contents() == theirs.fields[name].contents()
    for tensor, expected in zip(ours.tensors, theirs.tensors, strict=True):
        assert (tensor.name, tensor.tensor_type) == (expected.name, expected.tensor_type)
        assert np.array_equal(tensor.data, expected.data)


# What is refused


def cut(size):
    return lambda path, model: path.write_bytes(write_gguf(path, model).read_bytes()[:size])


def text(content):
    return lambda path, model: path.write_text(content)


def written(*arguments, **settings):
    return lambda path, model: write_gguf(path, model, *arguments, **settings)


def spoilt(value):
    def write(path, model):
        weight = weights_of(model)[DOWN].copy()
        weight[3, 4] = value
        write_gguf(path, model, weights={DOWN: weight})

    return write


COMPLETE, FOLDER = "take a complete copy", "take the model's transformers folder"
BIAS = {"blk.0.attn_output.bias": np.ones(64, np.float32)}
FREQUENCIES = {"rope_freqs.weight": np.ones(8, np.float32)}
LONG = {"rope_factors_long.weight": np.ones(8, np.float32)}
SHAPE = {UP: np.ones((32, 64), np.float32)}
UNKNOWN = {UP: np.zeros((96, 292), np.uint8)}
HEADER = {  # seen in the header, so refused before a plan
    "cut in the header": (cut(300), COMPLETE),
    "cut in the vocabulary": (cut(2000), COMPLETE),
    "cut in the weights": (cut(-1000), COMPLETE),
    "empty": (text(""), COMPLETE),
    "not GGUF": (text("version https://git-lfs.github.com/spec/v1\n" * 9), COMPLETE),
    "no such file": (lambda path, model: None, "there is no"),
    "architecture": (written(arch="bert"), f"bert.*{FOLDER}"),
    "in parts": (
        written(weights={EMBEDDING: None}, fields={"split.count": 2}),
        "one of 2 parts; join .*llama-gguf-split",
    ),
    "vocabulary only": (written(weights={EMBEDDING: None}), f"no {EMBEDDING}; take .* whole model"),
    "Q8_K": (written(weights=UNKNOWN, kinds={UP: "Q8_K"}), "as Q8_K; take a file in Q4_K_M"),
    "rope_freqs": (written(weights=FREQUENCIES), f"rotary frequencies.*{FOLDER}"),
    "rope_factors": (written(weights=LONG), f"rotary frequencies.*{FOLDER}"),
    "yarn": (written(fields={"qwen2.rope.scaling.type": "yarn"}), f"rotary frequencies.*{FOLDER}"),
}
WEIGHTS = {
    "NaN": (spoilt(np.nan), f"usable model.layers.1.mlp.down_proj.weight; {COMPLETE}"),
    "one is missing": (written(weights={UP: None}), f"usable .*up_proj.weight; {COMPLETE}"),
    "another shape": (written(weights=SHAPE), rf"up_proj.weight as \(32, 64\), .*{FOLDER}"),
    "a bias too many": (written(weights=BIAS), f"64 weights .* Qwen2ForCausalLM .*{FOLDER}"),
}


def refused(opening, path, cache, message, capfd):
    with pytest.raises(UserError, match=f"^model: .*{message}") as caught:
        opening(str(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert folders(cache) == []
    assert not [
        line for line in capfd.readouterr().err.splitlines() if line[:2] not in ("Ma", "De")
    ]


@pytest.mark.parametrize("name", HEADER)
def test_refused_by_the_header(name, model, cache, tmp_path, capfd):
    write, message = HEADER[name]
    write(path := tmp_path / "some.gguf", model)
    refused(open_config, path, cache, message, capfd)
    refused(resolve_source, path, cache, message, capfd)


@pytest.mark.parametrize("name", WEIGHTS)
def test_refused_by_the_weights(name, model, cache, tmp_path, capfd):
    write, message = WEIGHTS[name]
    write(path := tmp_path / "some.gguf", model)
    refused(resolve_source, path, cache, message, capfd)


def test_too_little_disk(file, cache, monkeypatch):
    usage = shutil.disk_usage(file)._replace(free=3 * 10**7)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="0.0 GB of disk free, 0.1 needed.*make room in .*cache"):
        resolve_source(str(file))
    assert folders(cache) == []


def test_a_disk_that_fills_up(file, cache):
    """The system refuses to make a file larger than this; safetensors reports it in its own way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"too large.*\): make room in .*cache"):
            resolve_source(str(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folders(cache) == []


def test_a_folder_that_is_called_like_a_file(tmp_path):
    source = str(save_tiny(tmp_path / "tiny.gguf"))
    assert resolve_source(source) == source and open_config(source).model_type == "llama"


# Whole commands

SHORT = ["--device", "cpu", "--max-new-tokens", "4"]
TRAIN = [*SHORT, "--prompt", "the 3", "--rollouts", "2", "--mode", "lora", "--save-at", "1"]


def test_plan_makes_no_folder(file, cache, capsys, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert main(["plan", "--model", "tiny.gguf", "--prompt-tokens", "9", "--json", *SHORT]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["fits"] and found["chosen"]["download"] == 0
    assert "--model tiny.gguf" in found["command"] and not cache.exists()


def test_train_resume_and_merge(file, model, tmp_path, capfd, monkeypatch):
    """The file is named by a path that is right only where the run starts."""
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    given = ["train", "--model", "tiny.gguf", *TRAIN, "--output", str(run)]
    assert main([*given, "--steps", "1"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", str(run), "--steps", "2"]) == 0
    assert [row["update"] for row in read(run / "metrics.jsonl")] == [1, 2]
    adapters = run / "checkpoints" / "step-00002"
    base = json.loads((adapters / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == resolve_source(str(file))
    assert main(["merge", str(run), "--output", "merged"]) == 0
    here, there = (dict(open_folder(f).named_parameters()) for f in ("merged", base))
    changed = {name for name in here if not torch.equal(here[name], rounded(there[name]))}
    assert {name.rpartition("_proj")[1] for name in changed} == {"_proj"}
    assert AutoTokenizer.from_pretrained("merged").chat_template == TEMPLATE
    assert capfd.readouterr().err.count("Dequantising tiny.gguf\n") == 1


def test_eval_and_select(file, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"{n} + 1 =", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", "tiny.gguf", "--data", "rows.jsonl", *SHORT]
    assert main(["eval", *given, "--output", "eval"]) == 0
    assert len(read(tmp_path / "eval" / "completions.jsonl")) == 4
    few = ["--samples", "2", "--more", "2"]
    assert main(["select", *given, *few, "--output", "selection"]) == 0
    assert len(read(tmp_path / "selection" / "selection.jsonl")) == 4
    assert capfd.readouterr().err.count("Dequantising tiny.gguf\n") == 1
