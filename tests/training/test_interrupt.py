"""Signals to a training process."""

import os
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.training.trainer import Interrupted, StopRequest

PATIENCE_S = 60


def wait_for(condition):
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    return found


def lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def start(folder, output, *options):
    """A run that would take hours."""
    command = [sys.executable, "-m", "em_kernels.cli", "train", "--model", str(folder)]
    command += ["--prompt", "What is 2 + 3?", "--output", str(output), "--device", "cpu"]
    command += [
        "--steps",
        "100000",
        "--save-at",
        "100000",
        "--rollouts",
        "4",
        "--max-new-tokens",
        "8",
        *options,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_opens(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    assert AutoTokenizer.from_pretrained(checkpoint)("a").input_ids


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_last_finished_update(number, folder, tmp_path):
    output = tmp_path / "run"
    process = start(folder, output)
    wait_for(lambda: lines(output / "metrics.jsonl") >= 2)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and stdout == ""
    updates = lines(output / "metrics.jsonl")
    checkpoint = output / "checkpoints" / f"step-{updates:05d}"
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    last = " ".join(stderr.split("em-kernels train: ")[1].split())
    assert last == f"interrupted; {checkpoint} holds the last update"
    assert "Traceback" not in stderr
    assert_opens(checkpoint)
    assert lines(output / "rollouts.jsonl") in (4 * updates, 4 * updates + 4)  # one was sampled


def test_two_signals_exit_too(folder, tmp_path):
    output = tmp_path / "run"
    process = start(folder, output)
    wait_for(lambda: lines(output / "metrics.jsonl") >= 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and "Traceback" not in stderr
    for checkpoint in (output / "checkpoints").glob("*"):
        assert_opens(checkpoint)


def test_a_signal_before_the_first_update(folder, tmp_path):
    """Update 1 alone would take minutes."""
    output = tmp_path / "run"
    process = start(folder, output, "--rollouts", "30000")
    wait_for(lambda: (output / "config.yaml").exists())
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert stderr == "em-kernels train: interrupted; no update yet\n"
    assert not (output / "checkpoints").exists()


def test_stop_request():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
