"""The command line: its help, what goes to stdout and stderr, and that flags override YAML."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from importlib.metadata import version
from unittest import mock

import huggingface_hub.constants
import pytest
from test_cli_refusals import PROMPT, refused
from training.lives import command
from training.tiny import save_tiny
from transformers.utils.logging import disable_progress_bar

import em_kernels
from em_kernels.cli import main
from em_kernels.training.config import Sampling, TrainConfig, read_yaml

COMMANDS = ["plan", "select", "train", "eval", "study", "report", "merge", "demo", "fetch-demo"]
COMMANDS += ["data", "info"]
SHORT = ["--steps", "1", "--rollouts", "2", "--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a model."""
    disable_progress_bar()
    return save_tiny(tmp_path_factory.mktemp("place") / "model").parent


@pytest.fixture
def at(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("arguments", [["bogus"], ["--model", "x"], []])
def test_unknown_command(arguments, capfd):
    assert main(arguments) == 2
    said = "".join(capfd.readouterr())
    assert all(f"\n  {command} " in said for command in COMMANDS)
    assert not arguments or f"unknown command {arguments[0]!r}" in said


@pytest.mark.parametrize("package", ["tyro", "accelerate", "pydantic"])
def test_missing_package_is_named(package, monkeypatch, capfd):
    for folder in ("training", "commands"):  # restored, as the modules are
        monkeypatch.setattr(em_kernels, folder, getattr(em_kernels, folder))
    below = ("em_kernels.training", "em_kernels.commands.")
    with mock.patch.dict(sys.modules):  # also forgets what is imported meanwhile
        for name in [name for name in sys.modules if name.startswith(below)]:
            del sys.modules[name]
        sys.modules[package] = None
        line = refused(["train", *PROMPT], capfd)
    assert f"{package} is not installed; pip install 'em-kernels[train,eval,gym]'" in line


def run(*arguments, cwd, stdout=subprocess.PIPE):
    """Run the command line in a new interpreter, and return the finished process."""
    command = [sys.executable, "-m", "em_kernels.cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def test_as_a_process(place, tmp_path):
    """stderr has our own lines alone, stdout the checkpoint."""
    output = tmp_path / "run"
    done = run("train", "--model", "model", *PROMPT, *SHORT, "--output", output, cwd=place)
    assert (done.returncode, done.stdout) == (0, f"{output}/checkpoints/step-00001\n")
    assert done.stderr.count("\n") == 2 and done.stderr.startswith("update  1/1  entropy")
    assert "\nWarning: 2 of 2 completions were cut off; raise" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_model_that_the_hub_would_have(tmp_path, monkeypatch, capfd):
    """One line is printed, and none of the libraries that look for the model."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    line = refused(["train", "--model", "no/such-model", *PROMPT, *SHORT], capfd)
    assert line.startswith("em-kernels train: error: model: cannot open 'no/such-model'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_nobody_reads_its_help(tmp_path):
    """The reader of the pipe has left before the command starts."""
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
    monkeypatch.setenv("COLUMNS", "40")  # So narrow that cells end in an ellipsis.
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
    assert stderr.startswith("update  1/1  entropy ")


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
    values = found.model_dump(exclude={"device"})
    open_settings = [n for n, v in values.items() if v == "auto" or n == "lr" and v is None]
    assert open_settings == []


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
    """Return a command's help, as of a wide terminal, without frames and line breaks."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setenv("COLUMNS", "200")
        main([*arguments, "--help"])
    return " ".join(capfd.readouterr().out.replace("│", " ").split())


def help_of(command, config, capfd):
    """Return a command's help, and check that it names every setting."""
    text = shown([command], capfd)
    for name in [*config.model_fields, *Sampling.model_fields]:
        flag = {"four_bit": "4bit"}.get(name, name.replace("_", "-"))
        assert name == "sampling" or f"--{flag}" in text
    return text


def test_help_of_train_tells_every_setting_and_default(capfd):
    text = help_of("train", TrainConfig, capfd)
    for default in ("0.95", "1.15", "2048", "0.9 0.999", "1e-08", "runs/one-shot-em"):
        assert f"(default: {default})" in text
    assert "--config FILE" in text and "flags override" in text


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


@pytest.mark.parametrize(
    "command, where, doing",
    [
        ("plan", "planning.planner.Planner.choose", "planning memory of Llama"),
        ("train", "planning.planner.Planner.choose", "planning memory of Llama"),
        ("train", "engines.base.check_sampling", "preparing Llama"),
        ("train", "engines.step.entropy_loss_into", "update 1 of Llama"),
        ("eval", "evaluation.task.check_head", "checking Llama"),
        ("eval", "evaluation.completions.generate", "completing"),
    ],
)
def test_what_nobody_has_foreseen(command, where, doing, at, tmp_path, monkeypatch, capfd):
    """One line says what was being done to which architecture; --debug shows where."""

    def broken(*args, **kwargs):
        raise ZeroDivisionError("of\nnothing")

    monkeypatch.setattr(f"em_kernels.training.{where}", broken)
    task = {
        "plan": ["--prompt-tokens", "6"],
        "train": [*PROMPT, "--steps", "1", "--rollouts", "2"],
        "eval": ["--data", "addition", "--count", "2", "--template", "raw"],
    }[command]
    arguments = [command, "--model", "model", "--max-new-tokens", "2", *task]
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


def test_ctrl_c_before_training(at, tmp_path, capfd):
    """Interrupt it while it waits for a prompt that nobody writes."""
    os.mkfifo(pipe := tmp_path / "pipe.jsonl")
    waiting, ended = threading.main_thread().ident, threading.Event()

    def interrupt():
        with open(pipe, "w"):  # blocks until train opens it to read
            signal.pthread_kill(waiting, signal.SIGINT)
            ended.wait()

    (thread := threading.Thread(target=interrupt, daemon=True)).start()
    assert main(["train", "--model", "model", "--prompt-from", str(pipe)]) == 130
    ended.set()
    thread.join()
    assert capfd.readouterr() == ("", "em-kernels train: interrupted\n")
