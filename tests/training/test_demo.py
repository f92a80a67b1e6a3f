"""The whole demo on a tiny random model, stopped and continued; and its verdicts."""

import json
from pathlib import Path

import numpy as np
import pytest
from training.tiny import read, save_tiny

from em_kernels.cli import main
from em_kernels.commands import demo as demo_module
from em_kernels.commands.demo import reading
from em_kernels.training.config import read_yaml
from em_kernels.training.data.problems import few_shot, read_problems
from em_kernels.training.models import loading

PARTS = ["after", "before", "report-plots", "report.html", "run", "selection"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A random model replaces the 135M one, and there are only a few problems."""
    folder = save_tiny(tmp_path / "model", max_position_embeddings=512)
    monkeypatch.setattr(loading, "fetch_demo", lambda: folder)
    monkeypatch.setattr(demo_module, "POOL", 4)
    monkeypatch.setattr(demo_module, "HELD_OUT", 10)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_the_whole_demo(small, tmp_path, capfd):
    (tmp_path / "runs" / "demo-1").mkdir(parents=True)
    assert main(["demo", "--seed", "4"]) == 0
    said, output = capfd.readouterr().out, Path("runs", "demo-2")  # the first free
    assert sorted(path.name for path in output.iterdir()) == PARTS
    problems = read_problems("addition", count=16, seed=4)
    ranked = read(output / "selection" / "selection.jsonl")
    pool = [few_shot(problems[:2], problem) for problem in problems[2:6]]
    assert sorted(row["prompt"] for row in ranked) == sorted(pool)
    config = read_yaml(output / "run" / "config.yaml")
    chosen = (output / "selection" / "selection.jsonl").absolute()
    assert (config.prompt_from, config.prompt) == (chosen, None)
    assert (config.seed, config.steps, config.rollouts, config.lr) == (4, 5, 32, 5e-6)
    assert 1 <= len(read(output / "run" / "metrics.jsonl")) <= 5
    held_out = [{"prompt": p.prompt, "answer": p.answer} for p in problems[6:]]
    for name in ("before", "after"):
        assert read(output / name / "problems.jsonl") == held_out
    texts = [(output / name / "results.json").read_text("utf-8") for name in ("before", "after")]
    before, after = map(json.loads, texts)
    assert before["model"] == "demo" and after["model"] == str(output / "run")
    assert before["probability"] != after["probability"]
    assert reading(before, after) in said and f"Everything is in {output}." in said
    assert "by McNemar's exact test" in said and "The first 4 of 4" in said
    assert "<html" in (output / "report.html").read_text("utf-8")[:200]
    lines = [line for line in said.splitlines() if line.startswith("$ em-kernels ")]
    assert [line.split()[2] for line in lines] == ["select", "eval", "train", "eval", "report"]

    rollouts = (output / "run" / "rollouts.jsonl").read_text("utf-8")
    assert main(["demo", "--seed", "4", "--output", str(output)]) == 0  # trains nothing again
    again = capfd.readouterr().out
    assert f"$ em-kernels train --resume {output / 'run'}\n" in again
    assert reading(before, after) in again
    assert (output / "run" / "rollouts.jsonl").read_text("utf-8") == rollouts
    assert main(["demo", "--seed", "5", "--output", str(output)]) == 2
    assert "was made with seed 4, not 5" in capfd.readouterr().err


def test_refused(small, tmp_path, capfd):
    assert main(["demo", "--seed", "-1", "--output", str(tmp_path / "new")]) == 2
    assert capfd.readouterr().err.startswith("em-kernels demo: error: seed: -1: ")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    for taken in ("mine", "mine/notes"):
        assert main(["demo", "--output", taken]) == 2
        said = f"output: {taken} already holds other files; choose another"
        assert capfd.readouterr() == ("", f"em-kernels demo: error: {said}\n")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def results(right, **probability):
    rows = {t.replace("_", "."): p for t, p in probability.items()}
    drawn = {t[1:]: (np.arange(200) < p).astype(float).tolist() for t, p in rows.items()}
    return {"right": [[i < right] for i in range(200)], "probability": drawn}


@pytest.mark.parametrize(
    "after, said",
    [
        (130, "rose by 15.0 points, more than chance explains (p = 1.9e-09)"),
        (85, "fell by 7.5 points, more than chance explains (p = 6.1e-05)"),
        (105, "changed by +2.5 points (+0.3 to +4.7), not shown to be a change (p = 0.062)"),
        (100, "changed by +0.0 points (+0.0 to +0.0), not shown to be a change (p = 1)"),
    ],
)
def test_verdict_of_greedy_accuracy(after, said):
    text = reading(results(100, T1_0=60, T0_5=80, T0_25=90), results(after, T1_0=90, T0_5=90))
    assert f"Greedy accuracy {said}" in text
    assert "Sampled at T = 1 the trained model has 45.0 %, the untrained one 30.0 %" in text
    assert "at T = 0.25 gives 45.0 %, and the trained model is not shown to differ" in text


@pytest.mark.parametrize("after, relation", [(120, "is above that"), (60, "is below that")])
def test_verdict_of_sampled_accuracy(after, relation):
    text = reading(results(100, T1_0=50, T0_5=90, T0_25=80), results(100, T1_0=after))
    assert f"at T = 0.5 gives 45.0 %, and the trained model {relation}: a sampled gain" in text
