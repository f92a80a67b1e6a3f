"""Signals to a training process."""

import os
import signal
import subprocess
import sys
import time

import pytest
from spawned import HANG_S, outlived, wait_for
from training.lives import begin, command, end
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.training.trainer import Interrupted, StopRequest


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def long(folder, output, *options):
    """Return the command of a run that would take hours."""
    asked = ["train", "--model", str(folder), "--prompt", "What is 2 + 3?", "--device", "cpu"]
    asked += ["--output", str(output), "--steps", "100000", "--save-at", "100000"]
    return [*asked, "--rollouts", "4", "--max-new-tokens", "8", *options]


def assert_opens(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    assert AutoTokenizer.from_pretrained(checkpoint)("a").input_ids


def assert_left(output, code, out, err):
    """Check that the last finished update is saved, and named in the one error line."""
    assert code == 130 and out == ""
    updates = lines(output / "metrics.jsonl")
    checkpoint = output / "checkpoints" / f"step-{updates:05d}"
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    last = " ".join(err.split("em-kernels train: ")[1].split())
    assert last == f"interrupted; {checkpoint} holds the last update"
    assert "Traceback" not in err
    assert_opens(checkpoint)
    assert lines(output / "rollouts.jsonl") in (4 * updates, 4 * updates + 4)  # or one more


def test_ctrl_c_leaves_the_last_finished_update(folder, tmp_path):
    """Start an interpreter of its own, as a shell does."""
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "em_kernels.cli", *long(folder, output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with outlived(process):
        wait_for(lambda: lines(output / "metrics.jsonl") >= 2, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANG_S)
    assert_left(output, process.returncode, out, err)


def test_sigterm_leaves_the_last_finished_update(folder, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    with outlived(begin(long(folder, output), log)) as process:
        wait_for(lambda: lines(output / "metrics.jsonl") >= 2, process.is_alive)
        process.terminate()
        ended = end(process, log)
    assert_left(output, ended.code, ended.out, ended.err)


@pytest.mark.parametrize(
    "points",
    [["Ctrl-C twice in update 2"], ["Ctrl-C in update 2", "Ctrl-C in the first save"]],
    ids=["in an update", "in the save that follows"],
)
def test_two_signals_exit_too(points, folder, tmp_path):
    output = tmp_path / "run"
    ended = command(long(folder, output), tmp_path / "log", *points)
    assert ended.code == 130 and lines(output / "metrics.jsonl") >= 1
    for checkpoint in (output / "checkpoints").glob("*"):
        assert_opens(checkpoint)


def test_a_signal_before_the_first_update(folder, tmp_path):
    """A signal while it samples update 1, which would take minutes."""
    output = tmp_path / "run"
    asked = long(folder, output, "--rollouts", "30000")
    ended = command(asked, tmp_path / "log", "Ctrl-C at token 5")
    assert ended.code == 130
    assert ended.err == "em-kernels train: interrupted; no update is finished\n"
    assert (output / "config.yaml").exists() and not (output / "checkpoints").exists()


def test_stop_request():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(HANG_S)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
