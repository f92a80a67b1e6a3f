"""The command line: what it says, what it refuses in one line, and that flags override YAML."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from importlib.metadata import version

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from training.lives import command
from training.tiny import make_tokenizer, save_tiny
from transformers.utils.logging import disable_progress_bar

import em_kernels
from em_kernels.cli import main
from em_kernels.training.config import Sampling, TrainConfig, read_yaml

PROMPT = ["--prompt", "What is 2 + 3?"]
COMMANDS = ["plan", "select", "train", "eval", "study", "report", "merge", "demo", "fetch-demo"]
COMMANDS += ["info"]
SHORT = ["--steps", "1", "--rollouts", "2", "--max-new-tokens", "4"]
FILES = {
    "good.jsonl": '{"prompt": "a"}\n{"prompt": "b"}\n',
    "broken.jsonl": '{"prompt": ',
    "bytes.jsonl": b"\xff\xfe\x00",
    "garbage.parquet": "not parquet",
    "table.csv": "prompt\na\n",
    "no-rows.jsonl": "\n",
    "no-prompt.jsonl": '{"text": "a"}\n',
    "empty-prompt.jsonl": '{"prompt": " "}\n',
    "list.jsonl": "[1]\n",
    "words.jsonl": '{"prompt": ["a"]}\n',
    "no-content.jsonl": '{"prompt": [{"role": "user"}]}\n',
    "typo.yaml": "tempratur: 1",
    "typo-inside.yaml": "sampling: {top_x: 1}",
    "flat.yaml": "top_p: 0.9",
    "not.yaml": "a: [1\nb: {",
    "list.yaml": "- 1",
    "empty.yaml": "",
    "word.yaml": "steps: many",
    "half.yaml": "steps: 1.5",
    "number.yaml": "prompt: 3",
    "flat-sampling.yaml": "sampling: 3",
    "nan.yaml": "lr: .nan",
    "range.yaml": "sampling: {top_p: 2}",
    "short.yaml": "betas: [0.9]",
    "numbered.yaml": "1: 2",
    "numbered-inside.yaml": "sampling: {1: 2}",
    "python.yaml": "steps: !!python/object:os.system {}",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a model and files, most of them bad."""
    disable_progress_bar()
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "model")
    make_tokenizer().save_pretrained(place / "no-config")
    (place / "no-tokenizer").mkdir()
    (place / "no-tokenizer" / "config.json").write_bytes(
        (place / "model" / "config.json").read_bytes()
    )
    save_tiny(place / "cut")
    (place / "cut" / "model.safetensors").write_bytes(b"cut")
    (place / "occupied").mkdir()
    (place / "occupied" / "config.yaml").write_text("steps: 3")
    for name, content in FILES.items():
        data = content if isinstance(content, bytes) else content.encode()
        (place / name).write_bytes(data)
    pyarrow.parquet.write_table(pa.table({"text": ["a"]}), place / "no-prompt.parquet")
    return place


@pytest.fixture
def at(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


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


def file(name, *more):
    return ["--prompt-from", name, *more]


def yaml(name):
    return [*PROMPT, "--config", name]


REFUSED = [  # arguments beside --model model, what the line names
    ([], "prompt: give a text"),
    ([*PROMPT, *file("good.jsonl")], "prompt: give a text"),
    (["--prompt", " \n"], "prompt: is empty"),
    (["--prompt", "\udcff"], "prompt: is not text in UTF-8"),
    (["--prompt", "x" * 200], "prompt: has 203 tokens, the model's context 128"),
    ([*PROMPT, "--max-new-tokens", "112"], "sampling.max_new_tokens: .* give at most 111"),
    ([*PROMPT, "--model", ""], "model: missing"),
    ([*PROMPT, "--model", "/no/such/folder"], "model: there is no folder /no/such/folder"),
    ([*PROMPT, "--model", "no-config"], "model: cannot open 'no-config'"),
    ([*PROMPT, "--model", "no-tokenizer"], "model: cannot open 'no-tokenizer'"),
    ([*PROMPT, "--model", "cut"], "model: cannot load 'cut'"),
    ([*PROMPT, "--attention", "nonsense"], "attention: 'nonsense' is refused"),
    (file("missing.jsonl"), "prompt_from: cannot read missing.jsonl"),
    (file("missing.parquet"), "prompt_from: cannot read missing.parquet"),
    (file("broken.jsonl"), "prompt_from: cannot read broken.jsonl"),
    (file("bytes.jsonl"), "prompt_from: cannot read bytes.jsonl"),
    (file("garbage.parquet"), "prompt_from: cannot read garbage.parquet"),
    (file("table.csv"), "prompt_from: table.csv is neither .jsonl nor .parquet"),
    (file("occupied"), "prompt_from: occupied is neither"),
    (file("no-rows.jsonl"), "prompt_rows: 0 is not in no-rows.jsonl, which has 0 rows"),
    (file("good.jsonl", "--prompt-rows", "1", "2"), "prompt_rows: 2 .* has 2 rows"),
    (file("good.jsonl", "--prompt-rows", "-1"), "prompt_rows.0: -1: .* greater"),
    (file("good.jsonl", "--prompt-rows", "0", "1", "--rollouts", "1"), "rollouts: 1 do not reach"),
    (file("good.jsonl", "--answer", "3"), "answer: goes with a prompt"),
    (file("no-prompt.jsonl"), "no-prompt.jsonl, row 0: .* problem, question, prompt"),
    (file("no-prompt.parquet"), "no-prompt.parquet, row 0: .* problem, question, prompt"),
    (file("empty-prompt.jsonl"), "prompt_from: empty-prompt.jsonl"),
    (file("list.jsonl"), "prompt_from: list.jsonl, row 0: a row is int"),
    (file("words.jsonl"), "prompt_from: words.jsonl"),
    (file("no-content.jsonl"), "prompt_from: no-content.jsonl"),
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
    (
        [*PROMPT, "--attention", "flash_attention_2", "--dtype", "float32"],
        "attention: flash_attention_2 computes in 16",
    ),
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
    (yaml("missing.yaml"), "config: cannot read missing.yaml"),
    (yaml("occupied"), "config: cannot read occupied"),
    (yaml("not.yaml"), "config: not.yaml is not YAML"),
    (yaml("python.yaml"), "config: python.yaml is not YAML"),
    (yaml("list.yaml"), "config: list.yaml must hold"),
    (yaml("empty.yaml"), "config: empty.yaml must hold"),
    (yaml("typo.yaml"), "typo.yaml: tempratur: unknown .* mean sampling.temperature?"),
    (yaml("typo-inside.yaml"), "sampling.top_x: unknown .* mean sampling.top_[kp]?"),
    (yaml("flat.yaml"), "flat.yaml: top_p: unknown .* mean sampling.top_p?"),
    (yaml("word.yaml"), "config: word.yaml: steps: 'many': .* integer"),
    (yaml("half.yaml"), "config: half.yaml: steps: 1.5: .* integer"),
    (yaml("number.yaml"), "config: number.yaml: prompt: 3: .* string"),
    (yaml("flat-sampling.yaml"), "config: flat-sampling.yaml: sampling: 3"),
    (yaml("nan.yaml"), "config: nan.yaml: lr: nan"),
    (yaml("range.yaml"), "config: range.yaml: sampling.top_p: 2"),
    (yaml("short.yaml"), "config: short.yaml: betas"),
    (yaml("numbered.yaml"), "config: numbered.yaml: names of settings"),
    (yaml("numbered-inside.yaml"), "config: numbered-inside.yaml: names of settings"),
]


@pytest.mark.parametrize("arguments, said", REFUSED, ids=[" ".join(a)[:50] for a, _ in REFUSED])
def test_refused_in_one_line_with_nothing_written(arguments, said, at, capfd):
    before = contents(at)
    length = [] if "--max-new-tokens" in arguments else ["--max-new-tokens", "8"]
    line = refused(["train", "--model", "model", *length, *arguments], capfd)
    assert line.startswith("em-kernels train: error: ")
    assert re.search(said, line), line
    assert contents(at) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu(at, capfd):
    before = contents(at)
    line = refused(["train", "--model", "model", *PROMPT, "--device", "cuda"], capfd)
    assert "device: cuda" in line and contents(at) == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tempratur", "1"], "--temperature"),
        (["--max-new-token", "8"], "--max-new-tokens"),
        (["stray"], "stray"),
        (["--device", "tpu"], "--device"),
        (["--steps"], "--steps"),
        (["--steps", "1.5"], "--steps"),
        (["--lr", "fast"], "--lr"),
        (["--config"], "--config"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_flags_that_cannot_be_parsed(arguments, said, at, capfd):
    before = contents(at)
    with pytest.raises(SystemExit) as exit:
        main(["train", "--model", "model", *PROMPT, *arguments])
    stdout, stderr = capfd.readouterr()
    assert exit.value.code == 2 and stdout == ""
    assert said in stderr and "Traceback" not in stderr
    assert contents(at) == before


@pytest.mark.parametrize("arguments", [["bogus"], ["--model", "x"], []])
def test_unknown_command(arguments, capfd):
    assert main(arguments) == 2
    said = "".join(capfd.readouterr())
    assert all(f"\n  {command} " in said for command in COMMANDS)
    assert not arguments or f"unknown command {arguments[0]!r}" in said


@pytest.mark.parametrize("package", ["tyro", "accelerate", "pydantic"])
def test_missing_package_is_named(package, monkeypatch, capfd):
    for part in ("training", "commands"):  # restored afterwards, like the modules
        monkeypatch.setattr(em_kernels, part, getattr(em_kernels, part))
    below = ("em_kernels.training", "em_kernels.commands.")
    for name in [name for name in sys.modules if name.startswith(below)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(["train", *PROMPT], capfd)
    assert f"{package} is not installed; pip install 'em-kernels[train,eval,gym]'" in line


def run(*arguments, cwd, stdout=subprocess.PIPE):
    """Run the command line in a process of its own; return it when it has ended."""
    command = [sys.executable, "-m", "em_kernels.cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def test_as_a_process(place, tmp_path):
    """stderr holds only our own lines, stdout the checkpoint."""
    output = tmp_path / "run"
    done = run("train", "--model", "model", *PROMPT, *SHORT, "--output", output, cwd=place)
    assert (done.returncode, done.stdout) == (0, f"{output}/checkpoints/step-00001\n")
    assert done.stderr.count("\n") == 2 and done.stderr.startswith("update  1/1  loss = entropy")
    assert "\nWarning: 2 of 2 completions were cut off; raise" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_model_that_the_hub_would_have(tmp_path, monkeypatch, capfd):
    """The error is one line of ours, without those of the libraries that look for the model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    line = refused(["train", "--model", "no/such-model", *PROMPT, *SHORT], capfd)
    assert line.startswith("em-kernels train: error: model: cannot open 'no/such-model'")
    assert list(tmp_path.iterdir()) == []


def test_nobody_reads_its_help(tmp_path):
    """The pipe's reader has left before the command starts."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run("train", "--help", cwd=tmp_path, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_for_what_it_prints(tmp_path):
    with open("/dev/full", "w") as full:
        done = run("info", cwd=tmp_path, stdout=full)
    said = "em-kernels: error: cannot write: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_nobody_reads_a_table(at, tmp_path):
    asked = ["--model", at / "model", "--device", "cpu", "--prompt-tokens", "9"]
    asked += ["--max-new-tokens", "9"]
    done = command(["plan", *asked], tmp_path / "log", "nobody reads stdout")
    assert (done.code, done.err) == (0, "")


def test_a_table_in_a_locale_that_lacks_its_letters(at, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # too few, so that words are cut short by an ellipsis
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    asked = ["--model", "model", "--device", "cpu", "--prompt-tokens", "9", "--max-new-tokens", "9"]
    assert main(["plan", *asked]) == 0
    assert b"?" in sys.stdout.buffer.getvalue()


def test_training_goes_on_when_nobody_reads_its_progress(at, tmp_path):
    asked = ["train", "--model", at / "model", *PROMPT, *SHORT, "--steps", "5", "--output", "run"]
    done = command(asked, tmp_path / "log", "nobody reads stderr")
    assert (done.code, done.out) == (0, "run/checkpoints/step-00005\n")


def test_progress_goes_to_stderr_and_the_checkpoint_to_stdout(at, tmp_path, capfd):
    output = tmp_path / "[/odd] folder"
    assert main(["train", "--model", "model", *PROMPT, *SHORT, "--output", str(output)]) == 0
    stdout, stderr = capfd.readouterr()
    assert stdout == f"{output}/checkpoints/step-00001\n"
    assert stderr.startswith("update  1/1  loss = entropy ")


def test_flags_override_yaml_and_yaml_the_defaults(at, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "model: model\nprompt: from YAML\nsteps: 1\nrollouts: 3\nlr: 1e-5\nseed: 4\n"
        'sampling: {max_new_tokens: 3, top_k: 7, stop: ["\\n"]}\n'
    )
    output = tmp_path / "run"
    flags = ["--rollouts", "2", "--top-k", "9", "--output", str(output), "--prompt", "from a flag"]
    assert main(["train", "--config", str(settings), *flags]) == 0
    wanted = {"prompt": "from a flag", "steps": 1, "rollouts": 2, "lr": 1e-5}
    wanted |= {"model": str(at / "model"), "seed": 4, "output": output, "clip": 1.0}
    wanted["sampling"] = Sampling(max_new_tokens=3, top_k=9, stop=("\n",))
    found = read_yaml(output / "config.yaml")
    assert {name: getattr(found, name) for name in wanted} == wanted
    left = [
        n
        for n, v in found.model_dump(exclude={"device"}).items()
        if v == "auto" or n == "lr" and v is None
    ]
    assert left == []


def test_config_of_a_run_repeats_it(at, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    flags = [*SHORT, "--temperature", "1.5", "--stop", "\n", "abc", "--no-chat-template"]
    assert main(["train", "--model", "model", *PROMPT, *flags, "--output", str(first)]) == 0
    config = str(first / "config.yaml")
    assert main(["train", f"--config={config}", "--output", str(again)]) == 0
    assert (first / "rollouts.jsonl").read_bytes() == (again / "rollouts.jsonl").read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_each_command(command, flag, capfd):
    with pytest.raises(SystemExit) as exit:
        main([command, flag])
    stdout, stderr = capfd.readouterr()
    assert exit.value.code == 0 and stderr == "" and f"em-kernels {command}" in stdout


def shown(arguments, capfd):
    """Return a command's help as one line, without frames and broken words."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setenv("COLUMNS", "200")
        main([*arguments, "--help"])
    return " ".join(capfd.readouterr().out.replace("│", " ").split())


def help_of(command, config, capfd):
    """Return the help of a command; check that it names every setting."""
    text = shown([command], capfd)
    for name in [*config.model_fields, *Sampling.model_fields]:
        flag = {"four_bit": "4bit"}.get(name, name.replace("_", "-"))
        assert name == "sampling" or f"--{flag}" in text
    return text


def test_help_of_train_tells_every_setting_and_default(capfd):
    text = help_of("train", TrainConfig, capfd)
    for default in ("0.95", "1.15", "512", "0.9 0.999", "1e-08", "runs/one-shot-em"):
        assert f"(default: {default})" in text
    assert "--config FILE" in text and "flags win" in text


def test_help_of_demo_tells_its_defaults(capfd):
    text = shown(["demo"], capfd)
    assert "(default: 0)" in text and "runs/demo-N" in text


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help(arguments, capfd):
    assert main(arguments) == 0
    assert "usage: em-kernels COMMAND" in capfd.readouterr().out


def test_info(capfd):
    assert main(["info"]) == 0
    rows = dict(line.split("  ", 1) for line in capfd.readouterr().out.splitlines() if "  " in line)
    rows = {name: text.strip() for name, text in rows.items()}
    assert rows["torch"] == version("torch")  # PyPI's CUDA build calls itself 2.13.0+cu130
    assert {"em_kernels", "python", "transformers", "triton", "CPU"} <= set(rows)
    assert any(name.startswith("GPU") for name in rows)
    assert rows["row kernels, cpu"] in ("C++ (em_kernels._C)", "portable, plain torch")
    assert "optional: accelerate" in rows and "optional: vllm" in rows


@pytest.mark.parametrize("name", ["select", "eval", "study", "demo", "fetch-demo", "info"])
def test_other_commands_refuse_unknown_flags(name, capfd):
    with pytest.raises(SystemExit) as exit:
        main([name, "--bogus"])
    assert exit.value.code == 2 and "--bogus" in capfd.readouterr().err


@pytest.mark.parametrize(
    "command, where, doing",
    [
        ("plan", "planning.planner.Planner.choose", "planning memory of Llama"),
        (
            "train",
            "planning.planner.Planner.choose",
            "planning memory of Llama",
        ),
        ("train", "engines.base.check_sampling", "preparing Llama"),
        ("train", "engines.step.entropy_loss_into", "update 1 of Llama"),
        ("eval", "evaluation.completions.check_head", "checking Llama"),
        ("eval", "evaluation.completions.generate", "completing"),
    ],
)
def test_what_nobody_has_foreseen(command, where, doing, at, tmp_path, monkeypatch, capfd):
    """An unforeseen error: one line says what was being done, on which architecture."""

    def broken(*args, **kwargs):
        raise ZeroDivisionError("of\nnothing")

    monkeypatch.setattr(f"em_kernels.training.{where}", broken)
    task = {
        "plan": ["--prompt-tokens", "6", "--max-new-tokens", "2"],
        "train": [*PROMPT, "--steps", "1", "--rollouts", "2", "--max-new-tokens", "2"],
        "eval": [
            "--data",
            "addition",
            "--count",
            "2",
            "--template",
            "raw",
            "--max-new-tokens",
            "2",
        ],
    }[command]
    arguments = [command, "--model", "model", *task]
    if command != "plan":
        arguments += ["--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    line = capfd.readouterr().err.strip().splitlines()[-1]
    name = "ForCausalLM" if "Llama" in doing else ""
    said = f"em-kernels {command}: error: {doing}{name}: ZeroDivisionError: of nothing"
    assert line == f"{said}; --debug shows where"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert main([*arguments, "--debug"]) == 1
    error = capfd.readouterr().err
    assert "Traceback" in error and ", in broken" in error and error.endswith(f"{said}\n")


def test_demo_refuses_what_train_refuses(at, capfd):
    before = contents(at)
    line = refused(["demo", "--output", "occupied"], capfd)
    assert line == (
        "em-kernels demo: error: output: occupied already holds other files; choose another"
    )
    assert contents(at) == before


def test_ctrl_c_before_training(at, tmp_path, capfd):
    """Ctrl-C comes while the command waits for a prompt that nobody writes."""
    os.mkfifo(pipe := tmp_path / "pipe.jsonl")
    waiting, ended = threading.main_thread().ident, threading.Event()

    def interrupt():
        with open(pipe, "w"):  # waits until main() opens it to read
            signal.pthread_kill(waiting, signal.SIGINT)
            ended.wait()

    (thread := threading.Thread(target=interrupt, daemon=True)).start()
    assert main(["train", "--model", "model", *file(str(pipe))]) == 130
    ended.set()
    thread.join()
    assert capfd.readouterr() == ("", "em-kernels train: interrupted\n")
