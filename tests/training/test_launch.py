"""accelerate launch and torchrun: what they are given and say; signals and deaths."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training.processes import FSDP2, environment, example_run, flags, launched, torchrun
from training.tiny import read

from em_kernels.training.config import TrainConfig, UserError
from em_kernels.training.ranks import find_ranks
from em_kernels.training.records import Running


@pytest.mark.parametrize(
    ("example", "engine", "model"),
    [("2-gpus", "replicas", True), ("8-gpus-fsdp2", "fsdp2", "falcon")],  # whose layers are its h
)
def test_examples(folders, tmp_path, example, engine, model):
    code, out, err = example_run(example, folders[model], tmp_path)
    assert code == 0, err
    assert out.splitlines()[-1] == "run/checkpoints/step-00002"
    assert out.count("step-00002") == 1 and err.count("update  2/2") == 1
    state = json.loads((tmp_path / "run/checkpoints/step-00002/training_state.json").read_text())
    assert (state["settings"]["ranks"], state["settings"]["engine"]) == (2, engine)
    assert [row["index"] for row in read(tmp_path / "run/rollouts.jsonl")] == [*range(6)] * 2


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
        find_ranks(TrainConfig(device="cpu"))


def test_a_folder_in_use_is_one_line(folders, tmp_path):
    command = ("-m", "em_kernels.cli", "train", *flags(folders[True], "run"))
    with Running(tmp_path / "run"):
        code, out, err = launched(torchrun(), *command, where=tmp_path)
    ours = [words for words in err.splitlines() if words.startswith("em-kernels train:")]
    assert code != 0 and len(ours) == 1 and "another process works in run now" in ours[0], err


@pytest.fixture(params=[("replicas", {}), ("fsdp2", FSDP2)], ids=["replicas", "fsdp2"])
def running(request, folders, tmp_path):
    """A job of many updates that has finished some, its launcher and the process of rank 1."""
    command = [f"{Path(sys.executable).parent}/torchrun", *torchrun()[1:], "-m", "em_kernels.cli"]
    command += ["train", *flags(folders[True], "run", "--steps", "100000", "--save-at", "100000")]
    env = {**environment(), **request.param[1]}
    with open(tmp_path / "said", "w+") as said:
        job = subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=said, stderr=said, start_new_session=True
        )
        deadline = time.monotonic() + 120
        metrics = tmp_path / "run/metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert job.poll() is None and time.monotonic() < deadline, said.read()
            time.sleep(0.2)
        yield job, tmp_path
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def rank_of(job, rank):
    """Its process."""
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
    pid, began = rank_of(job, 1), time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    assert time.monotonic() - began < 60
    said = (home / "said").read_text()
    root = said[said.index("Root Cause") :]
    assert "rank      : 1 " in root and f"-9 (pid: {pid})" in root
    # what was recorded is whole
    config = TrainConfig(output=home / "run")
    rows = read(config.output / "metrics.jsonl")
    assert [row["update"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 3


@pytest.mark.parametrize("everyone", [True, False], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_leaves_the_last_finished_update(running, everyone):
    job, home = running
    if everyone:  # as a terminal does: each process, and the launcher passes it on once more
        os.killpg(job.pid, signal.SIGINT)
    else:
        os.kill(job.pid, signal.SIGTERM)
    assert job.wait(timeout=60) != 0
    done = len(read(home / "run/metrics.jsonl"))
    said = (home / "said").read_text()
    last = f"run/checkpoints/step-{done:05d}"
    assert said.count(f"em-kernels train: interrupted; {last} holds the last update") == 1
    assert (home / last / "config.json").exists() and "Error: interrupted" not in said
