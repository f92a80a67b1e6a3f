"""accelerate launch and torchrun: examples, refusals, signals, deaths."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from spawned import HANG_S, wait_for
from training.lives import slow
from training.processes import FSDP2, environment, example_run, flags, launched, torchrun
from training.tiny import read

from em_kernels.training.config import TrainConfig
from em_kernels.training.distributed import find_ranks
from em_kernels.training.runs.records import Running
from em_kernels.training.settings import UserError


@pytest.mark.parametrize(
    ("example", "engine", "model"),
    [slow("2-gpus", "replicas", True), slow("8-gpus-fsdp2", "fsdp2", "falcon")],  # layers named h
)
def test_examples(folders, tmp_path, example, engine, model):
    code, out, err = example_run(example, folders[model], tmp_path)
    assert code == 0, err
    assert out.splitlines()[-1] == "run/checkpoints/step-00002"
    assert out.count("step-00002") == 1 and err.count("update  2/2") == 1
    state = json.loads((tmp_path / "run/checkpoints/step-00002/training_state.json").read_text())
    assert (state["settings"]["ranks"], state["settings"]["engine"]) == (2, engine)
    assert [row["index"] for row in read(tmp_path / "run/rollouts.jsonl")] == [*range(6)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "env", "line"),
    [
        (["--steps", "0"], {}, "greater than or equal to 1"),
        (["--rollouts", "1"], {}, "rollouts: 1 are fewer than the 2 processes"),
        (["--mode", "lora"], FSDP2, "mode: lora does not go with fsdp2, which has full"),
        ([], {**FSDP2, "FSDP_VERSION": "1"}, "fsdp: version 1 is not supported"),
    ],
)
def test_what_cannot_work_is_one_line(folders, tmp_path, more, env, line):
    command = ("-m", "em_kernels.cli", "train", *flags(folders[True], "run", *more))
    code, out, err = launched(torchrun(), *command, where=tmp_path, **env)
    assert code != 0 and not (tmp_path / "run").exists()
    ours = [words for words in err.splitlines() if words.startswith("em-kernels train: error")]
    assert [line in words for words in ours] == [True], err
    assert "rank      : " in err  # the launcher's own table


def test_a_mesh_of_many_dimensions_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(UserError, match="parallelism_config: is not supported"):
        find_ranks("cpu")


@pytest.mark.slow
def test_a_folder_in_use_is_one_line(folders, tmp_path):
    command = ("-m", "em_kernels.cli", "train", *flags(folders[True], "run"))
    with Running(tmp_path / "run"):
        code, out, err = launched(torchrun(), *command, where=tmp_path)
    ours = [words for words in err.splitlines() if words.startswith("em-kernels train:")]
    assert code != 0 and len(ours) == 1 and "another process works in run now" in ours[0], err
    assert "rank      : " in err  # the launcher's own table


ENGINES = [slow({}, id="replicas"), slow(FSDP2, id="fsdp2")]


@pytest.fixture(params=ENGINES)
def running(request, folders, tmp_path):
    """Start a long job, and yield it with its folder once it has finished three updates."""
    command = [f"{Path(sys.executable).parent}/torchrun", *torchrun()[1:], "-m", "em_kernels.cli"]
    command += ["train", *flags(folders[True], "run", "--steps", "100000", "--save-at", "100000")]
    env, metrics = {**environment(), **request.param}, tmp_path / "run" / "metrics.jsonl"
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=said, stderr=said, start_new_session=True
        )
    try:
        wait_for(
            lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3,
            lambda: job.poll() is None,
        )
        yield job, tmp_path
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def rank_of(job, rank):
    """Return the process id of a rank."""
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = status.read_bytes().split(b"\0")
            parent = int(re.search(r"PPid:\t(\d+)", (status.parent / "status").read_text())[1])
        except OSError:
            continue
        if f"RANK={rank}".encode() in words and parent == job.pid:
            return int(status.parent.name)
    raise AssertionError("there is no such process")


def test_a_rank_that_dies_ends_the_job_with_its_name(running):
    job, home = running
    pid = rank_of(job, 1)
    os.kill(pid, signal.SIGKILL)
    assert job.wait(timeout=HANG_S) != 0
    said = (home / "said").read_text()
    root = said[said.index("Root Cause") :]
    assert "rank      : 1 " in root and f"-9 (pid: {pid})" in root
    # The records are whole.
    config = TrainConfig(output=home / "run")
    rows = read(config.output / "metrics.jsonl")
    assert [row["update"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 3


@pytest.mark.parametrize(
    "everyone",
    [pytest.param(True, id="Ctrl-C", marks=pytest.mark.slow), pytest.param(False, id="SIGTERM")],
)
def test_a_signal_leaves_the_last_finished_update(running, everyone):
    job, home = running
    if everyone:  # a terminal signals each process, and the launcher passes it on once more
        os.killpg(job.pid, signal.SIGINT)
    else:
        os.kill(job.pid, signal.SIGTERM)
    assert job.wait(timeout=HANG_S) != 0
    done = len(read(home / "run/metrics.jsonl"))
    said = (home / "said").read_text()
    last = f"run/checkpoints/step-{done:05d}"
    assert said.count(f"em-kernels train: interrupted; {last} holds the last update") == 1
    assert (home / last / "config.json").exists() and "Error: interrupted" not in said
