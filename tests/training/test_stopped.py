"""Runs that run out of memory or disk, or get a signal, and are resumed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from spawned import outlived, wait_for
from training.faults import ROOM, size
from training.lives import MODES, assert_same, begin, content, slow
from training.tiny import read

OUT_OF_MEMORY = "memory for 40 tokens from update 2 on"


@pytest.mark.slow
def test_less_memory_than_planned(start, resume, tmp_path):
    """Numbers are the same to rounding; a resumed run keeps the smaller sizes."""
    auto = {"micro_batch": "auto", "rollout_batch": "auto", "save_optimizer": False}
    assert start("plain", **auto).code == 0
    ended = start("whole", OUT_OF_MEMORY, **auto)
    assert ended.code == 0 and "Out of memory: trying again with micro_batch 36" in ended.err
    plain, whole = (read(tmp_path / name / "metrics.jsonl") for name in ("plain", "whole"))
    assert [row["micro_batch"] for row in plain] == [72] * 4
    assert [row["micro_batch"] for row in whole] == [72, 36, 36, 36]
    for name in ("entropy", "grad_norm"):
        for row, other in zip(plain, whole, strict=True):
            assert row[name] == pytest.approx(other[name], rel=1e-5)
    assert start("run", OUT_OF_MEMORY, "half of the fourth metrics", **auto).code < 0
    assert resume("run", points=["slab 1 of update 1"]).code < 0
    assert resume("run").code == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_less_memory_before_the_state(start, resume, tmp_path):
    """The update after the saved state begins with the size that the one before ended with, and may
    halve it again.
    """
    auto = {"micro_batch": "auto", "save_at": (3,)}
    assert start("whole", OUT_OF_MEMORY, **auto).code == 0
    assert start("run", OUT_OF_MEMORY, "the first save", **auto).code < 0
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert resume("run").code == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    ended = resume("again", points=["memory for 30 tokens"])
    assert ended.code == 0 and "trying again with micro_batch 18" in ended.err
    assert [row["micro_batch"] for row in read(tmp_path / "again" / "metrics.jsonl")][2:] == [
        36,
        18,
    ]


def test_no_memory_for_a_gradient_that_has_arrived(start, tmp_path):
    """The retry does not count that gradient twice."""
    auto = {"micro_batch": "auto", "steps": 2}
    assert start("plain", **auto).code == 0
    ended = start("run", "no memory for a gradient", **auto)
    assert ended.code == 0 and "Out of memory: trying again with micro_batch 36" in ended.err
    plain, other = (read(tmp_path / name / "metrics.jsonl") for name in ("plain", "run"))
    for row, found in zip(plain, other, strict=True):
        assert found["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_no_memory_to_sample(start, tmp_path):
    assert start("plain", steps=2).code == 0
    ended = start("run", "memory for 2 completions", steps=2, rollout_batch="auto")
    assert ended.code == 0 and "Out of memory: trying again with rollout_batch 3" in ended.err
    assert [row["rollout_batch"] for row in read(tmp_path / "run" / "metrics.jsonl")] == [1, 1]
    names = [tmp_path / name / "rollouts.jsonl" for name in ("plain", "run")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.slow
def test_no_memory_to_start(start, tmp_path):
    line = start("run", "no memory for the optimizer").refused()
    assert line.startswith(
        "out of memory with micro_batch 20, rollout_batch 64; no update is finished; "
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_memory_left_to_free(start, resume, whole_of, tmp_path):
    """Out of memory in the middle of the weights' step: another process resumes the run."""
    line = start("run", "no memory in the step").refused()
    assert line.startswith("out of memory with micro_batch 20, rollout_batch 64; --resume ")
    assert "--resume " + f"{tmp_path}/run continues it; use --micro-batch auto, " in line
    assert resume("run").code == 0
    assert_same(tmp_path / "run", whole_of("full"))


# Full disks


FULL = [
    ["full at metrics of update 3", "room for a checkpoint"],
    ["full at metrics of update 3"],
    ["full at completions of update 3"],
    ["full at the second checkpoint"],
]
DISKS = [(mode, points) for points in FULL for mode in ("full", "replay")]


@pytest.mark.parametrize("mode, points", [DISKS[0], *(slow(*disk) for disk in DISKS[1:])])
def test_a_full_disk_stops_it(mode, points, start, resume, whole_of, tmp_path):
    line = start("run", *points, **MODES[mode]).refused()
    assert line.startswith("output: cannot write ") and "File too large" in line
    goes_on = f"--resume {tmp_path}/run continues it"
    last = f"{tmp_path}/run/checkpoints/step-00002 holds the last update"
    assert line.endswith(f"; {last if 'completions' in points[0] else goes_on}")
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00002"]
    assert resume("run").code == 0
    assert_same(tmp_path / "run", whole_of(mode))


@pytest.mark.slow
@pytest.mark.parametrize("kib", ROOM)
def test_a_disk_that_others_fill(kib, start, resume, whole_of, tmp_path):
    """Others leave so many KiB once the run has begun."""
    disk = tmp_path / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        line = start("run", f"{kib} KiB left").refused()
        assert line.startswith("output: cannot write ") and "No space left on device" in line
        size("9m")(disk)
        ended = resume("run") if (disk / "config.yaml").exists() else start("run")
        assert ended.code == 0
        assert_same(disk, whole_of("full"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Signals and other processes


@pytest.mark.slow
def test_another_process_in_the_folder(start, resume, whole_of, tmp_path):
    assert start("run", "the norm of update 2").code < 0
    arguments = ["train", "--resume", str(tmp_path / "run")]
    with outlived(begin(arguments, tmp_path / "1", "stopped")) as first:
        status = Path(f"/proc/{first.pid}/status")
        wait_for(lambda: "State:\tT" in status.read_text(), first.is_alive)
        before = content(tmp_path / "run")
        line = resume("run").refused()
        assert line == f"output: another process works in {tmp_path}/run now; wait, or name another"
        assert content(tmp_path / "run") == before
    assert f"Process {first.pid} died here without a message, in update 1" in resume("run").err
    assert_same(tmp_path / "run", whole_of("full"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "replay"])
@pytest.mark.parametrize("point", ["Ctrl-C in update 2", "Ctrl-C twice in the second save"])
def test_ctrl_c_and_on(point, mode, start, resume, whole_of, tmp_path):
    ended = start("run", point, **MODES[mode])
    assert ended.code == 130 and ended.out == ""
    last = ended.err.splitlines()[-1]
    kept = f"; {tmp_path}/run/checkpoints/step-00002 holds the last update"
    assert last == "em-kernels train: interrupted" + ("" if "twice" in point else kept)
    assert resume("run").code == 0
    assert_same(tmp_path / "run", whole_of(mode))
