"""Runs and controls of benchmarks.evidence, and the table of their results."""

import io
import json

from rich.console import Console

from benchmarks import evidence
from em_kernels.training.config import TrainConfig


def test_runs_differ_and_their_controls_come_last():
    names = [arm.name for arm in evidence.ARMS]
    assert len({*names}) == len(names)
    controls = [arm.objective == "maximise" or arm.prompt == "random" for arm in evidence.ARMS]
    assert controls == sorted(controls) and any(controls)
    for arm in evidence.ARMS:
        TrainConfig(lr=arm.lr, seed=arm.seed, objective=arm.objective)


def test_table_shows_finished_runs_against_the_base(tmp_path):
    def score(right):
        return {"right": [[x] for x in right], "ended": 0.75}

    (tmp_path / "base.json").write_text(json.dumps(score([True, False, False, True] * 8)))
    arm = evidence.ARMS[0]
    done = {
        "metrics": [{"entropy": 0.5 / n} for n in range(1, 6)],
        "scores": {"1": score([True] * 32), "5": score([False] * 32)},
    }
    (tmp_path / f"{arm.name}.json").write_text(json.dumps(done))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(evidence.table(tmp_path))
    lines = [line for line in console.export_text().splitlines() if arm.name in line]
    assert "+50.0" in lines[0] and "0.500" in lines[0] and "25.0" in lines[0]
    assert "-50.0" in lines[1] and "0.100" in lines[1] and len(lines) == 2
