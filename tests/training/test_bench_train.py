"""Whole updates of the benchmark's loops."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.tiny import PLAIN, run, save_tiny, settings

from benchmarks import report
from benchmarks.loops import by_hand

ROOT = Path(__file__).parents[2]


class Enough(Exception):
    pass


@pytest.mark.parametrize("official", [False, True])
def test_the_loops_are_the_same_work(official, tmp_path):
    """Losses of three updates agree on the same completions, in several micro-batches."""
    folder = save_tiny(tmp_path / "model")
    sampling = PLAIN.model_copy(update={"stop": ("\n",)})
    config = settings(folder, tmp_path / "run", steps=3, rollouts=10, sampling=sampling)
    expected = [row["entropy"] for row in run(config).metrics]
    found = []

    def done(row):
        found.append(row["entropy"])
        assert 10 <= row["tokens"] <= 120 and row["sampling_s"] > 0 and row["training_s"] > 0
        if len(found) == 3:
            raise Enough

    with pytest.raises(Enough):
        by_hand(config, official, config.output, 4, done)
    assert expected[0] - expected[2] > 0.01 and found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_in_turns_and_reported(tmp_path):
    folder, path = save_tiny(tmp_path / "model"), tmp_path / "device.json"
    few = ["--model", folder, "--rollouts", 6, "--updates", 2, "--device", "cpu"]
    command = [sys.executable, "-m", "benchmarks.bench_train", *few, "--results", path]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(path.read_text())["training"]
    assert [row["updates"] for row in rows.values()] == [2, 2, 2, 1]
    assert rows["ours-fp32"]["ratio"] == 1 and rows["official"]["ratio"] > 0
    assert all(row["program"] in report.page([path], []) for row in rows.values())
