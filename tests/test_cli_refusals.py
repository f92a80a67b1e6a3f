"""Refusals of `em-kernels train`: one line, exit code 2, nothing written."""

import re

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from training.tiny import make_tokenizer, save_tiny

from em_kernels.cli import main

PROMPT = ["--prompt", "What is 2 + 3?"]
FLASH = ["--attention", "flash_attention_2"]
ROWS = {  # content of a .jsonl file, what the line says of it
    '{"prompt": ': "cannot read .*rows.jsonl",
    b"\xff\xfe\x00": "cannot read .*rows.jsonl",
    '{"text": "a"}\n': "rows.jsonl, row 0: .* problem, question, prompt",
    '{"prompt": " "}\n': "rows.jsonl, row 0: .* problem, question, prompt",
    "[1]\n": "rows.jsonl, row 0: a row is int",
    '{"prompt": ["a"]}\n': "rows.jsonl, row 0: a message of the conversation has no role",
    '{"prompt": [{"role": "user"}]}\n': "rows.jsonl, row 0: .* no text",
}
SETTINGS = {  # content of a .yaml file, what the line says of it
    "a: [1\nb: {": "settings.yaml is not YAML",
    "steps: !!python/object:os.system {}": "settings.yaml is not YAML",
    "- 1": "settings.yaml must hold",
    "": "settings.yaml must hold",
    "tempratur: 1": "settings.yaml: tempratur: unknown .* mean sampling.temperature?",
    "sampling: {top_x: 1}": "settings.yaml: sampling.top_x: unknown .* mean sampling.top_[kp]?",
    "top_p: 0.9": "settings.yaml: top_p: unknown .* mean sampling.top_p?",
    "steps: many": "settings.yaml: steps: 'many': .* integer",
    "steps: 1.5": "settings.yaml: steps: 1.5: .* integer",
    "prompt: 3": "settings.yaml: prompt: 3: .* string",
    "sampling: 3": "settings.yaml: sampling: 3",
    "lr: .nan": "settings.yaml: lr: nan",
    "sampling: {top_p: 2}": "settings.yaml: sampling.top_p: 2",
    "betas: [0.9]": "settings.yaml: betas",
    "1: 2": "settings.yaml: names of settings",
    "sampling: {1: 2}": "settings.yaml: names of settings",
}


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(arguments, capfd):
    """Return the one line on stderr of a command that exits with 2."""
    capfd.readouterr()
    assert main(arguments) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and stderr.endswith("\n") and stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    return stderr.strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a model and files, most of them bad."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "model")
    make_tokenizer().save_pretrained(place / "no-config")
    (place / "no-tokenizer").mkdir()
    config = (place / "model" / "config.json").read_bytes()
    (place / "no-tokenizer" / "config.json").write_bytes(config)
    save_tiny(place / "cut")
    (place / "cut" / "model.safetensors").write_bytes(b"cut")
    (place / "occupied").mkdir()
    (place / "occupied" / "config.yaml").write_text("steps: 3")
    (place / "good.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (place / "no-rows.jsonl").write_text("\n")
    (place / "garbage.parquet").write_text("not parquet")
    (place / "table.csv").write_text("prompt\na\n")
    pyarrow.parquet.write_table(pa.table({"text": ["a"]}), place / "no-prompt.parquet")
    return place


@pytest.fixture
def at(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def file(name, *more):
    return ["--prompt-from", name, *more]


REFUSED = [  # arguments beside --model model, what the line names
    ([], "prompt: give a text"),
    ([*PROMPT, *file("good.jsonl")], "prompt: give a text"),
    (["--prompt", " \n"], "prompt: is empty"),
    (["--prompt", "\udcff"], "prompt: is not text in UTF-8"),
    (["--prompt", "x" * 200], "prompt: has 203 tokens, too many for the model's context of 128"),
    ([*PROMPT, "--max-new-tokens", "112"], "sampling.max_new_tokens: .* give at most 111"),
    ([*PROMPT, "--model", ""], "model: missing"),
    ([*PROMPT, "--model", "/no/such/folder"], "model: there is no folder /no/such/folder"),
    ([*PROMPT, "--model", "no-config"], "model: cannot open 'no-config'"),
    ([*PROMPT, "--model", "no-tokenizer"], "model: cannot open 'no-tokenizer'"),
    ([*PROMPT, "--model", "cut"], "model: cannot load 'cut'"),
    ([*PROMPT, "--attention", "nonsense"], "attention: 'nonsense' is refused"),
    (file("missing.jsonl"), "prompt_from: cannot read missing.jsonl"),
    (file("missing.parquet"), "prompt_from: cannot read missing.parquet"),
    (file("garbage.parquet"), "prompt_from: cannot read garbage.parquet"),
    (file("table.csv"), "prompt_from: table.csv is neither .jsonl nor .parquet"),
    (file("occupied"), "prompt_from: occupied is neither"),
    (file("no-rows.jsonl"), "prompt_rows: 0 is not in no-rows.jsonl, which has 0 rows"),
    (file("good.jsonl", "--prompt-rows", "1", "2"), "prompt_rows: 2 .* has 2 rows"),
    (file("good.jsonl", "--prompt-rows", "-1"), "prompt_rows.0: -1: .* greater"),
    (file("good.jsonl", "--prompt-rows", "0:2", "1-3"), "prompt_rows: .* neither a row .3. nor a"),
    (file("good.jsonl", "--prompt-rows", "3:3"), "prompt_rows: .* at least 1 item"),
    (file("good.jsonl", "--fresh-prompts", "2"), "fresh_prompts: 2 needs at least 2 prompt_rows"),
    (
        file("good.jsonl", "--prompt-rows", "0", "1", "--rollouts", "1"),
        "rollouts: 1 are fewer",
    ),
    (file("good.jsonl", "--answer", "3", "--prompt-rows", "0", "1"), "answer: is one, but prompt_"),
    (file("good.jsonl", "--prompt-column", "x"), "prompt_column: good.jsonl has no column 'x'; it"),
    ([*PROMPT, "--answer-column", "x"], "answer_column: goes with prompt_from"),
    ([*PROMPT, "--system", "x", "--no-chat-template"], "system: only a chat template has one"),
    (file("no-prompt.parquet"), "no-prompt.parquet, row 0: .* problem, question, prompt"),
    ([*PROMPT, "--lr", "0"], "lr: 0.0: .* greater than 0"),
    ([*PROMPT, "--lr", "nan"], "lr: nan: .* finite"),
    ([*PROMPT, "--lr", "inf"], "lr: inf: .* finite"),
    ([*PROMPT, "--lr", "1"], "lr: 1.0: .* less than 1"),
    ([*PROMPT, "--betas", "0.9", "nan"], "betas.1: nan"),
    ([*PROMPT, "--eps", "0"], "eps: 0.0"),
    ([*PROMPT, "--clip", "-1"], "clip: -1.0"),
    ([*PROMPT, "--weight-decay", "-0.1"], "weight_decay: -0.1"),
    ([*PROMPT, "--temperature", "-1"], "sampling.temperature: -1.0"),
    ([*PROMPT, "--temperature", "1e-50"], "sampling.temperature: 1e-50: is below 0.01"),
    ([*PROMPT, "--chunk-bytes", "100"], "chunk_bytes: 100 is less than one row"),
    ([*PROMPT, *FLASH, "--dtype", "float32"], "attention: flash_attention_2 computes in 16"),
    ([*PROMPT, "--temperature", "nan"], "sampling.temperature: nan"),
    ([*PROMPT, "--loss-temperature", "0"], "loss_temperature: 0.0"),
    ([*PROMPT, "--top-p", "0"], "sampling.top_p: 0.0"),
    ([*PROMPT, "--top-p", "1.01"], "sampling.top_p: 1.01"),
    ([*PROMPT, "--top-k", "-1"], "sampling.top_k: -1"),
    ([*PROMPT, "--repetition-penalty", "0"], "sampling.repetition_penalty: 0.0"),
    ([*PROMPT, "--max-new-tokens", "0"], "sampling.max_new_tokens: 0"),
    ([*PROMPT, "--stop", ""], "sampling.stop.0: ''"),
    ([*PROMPT, "--steps", "0"], "steps: 0"),
    ([*PROMPT, "--rollouts", "0"], "rollouts: 0"),
    ([*PROMPT, "--seed", "-1"], "seed: -1"),
    ([*PROMPT, "--seed", str(2**32)], "seed: 4294967296"),
    ([*PROMPT, "--eps", "1e-300"], "eps: 1e-300"),
    ([*PROMPT, "--stop-below", "1"], "stop_below: 1.0"),
    ([*PROMPT, "--chunk-bytes", "0"], "chunk_bytes: 0"),
    ([*PROMPT, "--output", "occupied"], "output: occupied already holds"),
    ([*PROMPT, "--output", "table.csv"], "output: table.csv already holds"),
    ([*PROMPT, "--output", "table.csv/run"], "output: cannot write.*table.csv/run"),
    ([*PROMPT, "--config", "missing.yaml"], "config: cannot read missing.yaml"),
    ([*PROMPT, "--config", "occupied"], "config: cannot read occupied"),
]


def assert_refused(arguments, said, folder, capfd):
    before = contents(folder)
    line = refused(["train", "--model", "model", "--max-new-tokens", "8", *arguments], capfd)
    assert line.startswith("em-kernels train: error: ")
    assert re.search(said, line), line
    assert contents(folder) == before


@pytest.mark.parametrize("arguments, said", REFUSED, ids=[" ".join(a)[:50] for a, _ in REFUSED])
def test_refused_in_one_line_with_nothing_written(arguments, said, at, capfd):
    assert_refused(arguments, said, at, capfd)


@pytest.mark.parametrize("content", ROWS, ids=repr)
def test_rows_that_are_refused(content, at, tmp_path, capfd):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(file(str(path)), f"prompt_from: .*{ROWS[content]}", at, capfd)


@pytest.mark.parametrize("content", SETTINGS, ids=repr)
def test_settings_that_are_refused(content, at, tmp_path, capfd):
    (path := tmp_path / "settings.yaml").write_text(content)
    assert_refused([*PROMPT, "--config", str(path)], f"config: .*{SETTINGS[content]}", at, capfd)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu(at, capfd):
    before = contents(at)
    line = refused(["train", "--model", "model", *PROMPT, "--device", "cuda"], capfd)
    assert "device: cuda" in line and contents(at) == before


UNPARSABLE = [  # arguments, what is named
    (["train", "--tempratur", "1"], "--temperature"),
    (["train", "--max-new-token", "8"], "--max-new-tokens"),
    (["train", "stray"], "stray"),
    (["train", "--device", "tpu"], "--device"),
    (["train", "--steps"], "--steps"),
    (["train", "--steps", "1.5"], "--steps"),
    (["train", "--lr", "fast"], "--lr"),
    (["train", "--config"], "--config"),
    (["select", "--samples", "many"], "--samples"),
    (["select", "--score", "luck"], "--score"),
    (["eval", "--max-new-token", "8"], "--max-new-tokens"),
    (["eval", "--against"], "--against"),
    (["study", "--updates", "soon"], "--updates"),
]
TRAIN = ["--model", "model", *PROMPT]
OTHERS = ["select", "eval", "study", "demo", "fetch-demo", "info"]
UNPARSABLE += [([name, "--bogus"], "--bogus") for name in OTHERS]


@pytest.mark.parametrize("arguments, said", UNPARSABLE, ids=[" ".join(a) for a, _ in UNPARSABLE])
def test_flags_that_cannot_be_parsed(arguments, said, at, capfd):
    before = contents(at)
    with pytest.raises(SystemExit) as exit:
        main([arguments[0], *(TRAIN if arguments[0] == "train" else []), *arguments[1:]])
    stdout, stderr = capfd.readouterr()
    assert exit.value.code == 2 and stdout == ""
    assert said in stderr and "Traceback" not in stderr
    assert contents(at) == before


def test_demo_refuses_what_train_refuses(at, capfd):
    before = contents(at)
    line = refused(["demo", "--output", "occupied"], capfd)
    assert line == (
        "em-kernels demo: error: output: occupied already holds other files; choose another"
    )
    assert contents(at) == before
