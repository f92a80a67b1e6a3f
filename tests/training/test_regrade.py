"""Evaluations under two graders: recorded, graded again, compared, of older folders."""

import json
from multiprocessing import forkserver

import numpy as np
import pytest
import yaml
from training.lives import CHILDREN
from training.test_evaluate import FLAGS, QUESTIONS, refused, rows_of
from training.tiny import read

from em_kernels.cli import main
from em_kernels.training.data import grading
from em_kernels.training.evaluation.statistics import wilson

ANSWERS = ["1", "3", "3.1416", "4", "5", "6"]
TEXTS = [r"\boxed{1}", "it is 5-3", "it is 3.1415", r"\boxed{4000}", r"\boxed{500}", "unknown"]
RIGHT = {  # by either grader
    "math-verify": [True, True, False, False, False, False],
    "qwen25": [True, False, True, False, True, False],
}
EASY = ["1", "no", "no", "4", "no", "no"]  # the same for both


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch):
    """Fork grading workers from a process that has their imports, and make tables wide."""
    forkserver.ensure_running()
    monkeypatch.setattr(grading, "_Context", lambda: CHILDREN)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def evaluated(folder, tmp_path, capfd):
    """Return a function that evaluates, puts completions in place, and returns the arguments."""

    def evaluated(name, texts):
        output = tmp_path / name
        arguments = ["eval", "--model", str(folder), *FLAGS, "--template", "raw"]
        arguments += [
            *rows_of(tmp_path / "rows.jsonl", QUESTIONS, ANSWERS),
            "--output",
            str(output),
        ]
        assert main(arguments) == 0
        rows = [row | {"text": texts[row["problem"]]} for row in read(output / "completions.jsonl")]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (output / "completions.jsonl").write_text(lines)
        assert main(["eval", "--regrade", str(output)]) == 0
        capfd.readouterr()
        return arguments

    return evaluated


def assert_graded_by(grader, output):
    results = json.loads((output / "results.json").read_text("utf-8"))
    assert results["grader"] == grader and results["right"] == [[x] for x in RIGHT[grader]]
    assert yaml.safe_load((output / "config.yaml").read_text("utf-8"))["grader"] == grader
    for name, scores in {**results["graders"], grader: results}.items():
        assert scores["right"] == [[right] for right in RIGHT[name]]
        assert scores["accuracy"] == pytest.approx(np.mean(RIGHT[name]))
        assert scores["interval"] == list(wilson(np.array(RIGHT[name])))


def without(output, *names):
    """Make a folder as it was before there were graders, or other settings."""
    path = output / "results.json"
    kept = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({k: v for k, v in kept.items() if k not in ("grader", "graders")}))
    lines = (output / "config.yaml").read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.split(":")[0] not in names]
    assert len(lines) - len(kept) == len(names)
    (output / "config.yaml").write_text("".join(kept))


def test_the_headline_is_chosen(evaluated, tmp_path, capfd):
    output = tmp_path / "eval"
    arguments = evaluated("eval", TEXTS)
    assert_graded_by("math-verify", output)
    assert main(["eval", "--regrade", str(output), "--grader", "qwen25"]) == 0
    table = capfd.readouterr().out.split("\n")
    rows = [line.split() for line in table if "accuracy" in line]
    assert [row[:4] for row in rows] == [
        ["accuracy,", "by", "qwen25", "50.0"],
        ["accuracy,", "by", "math-verify", "33.3"],
    ]
    assert_graded_by("qwen25", output)
    assert main(["eval", "--regrade", str(output)]) == 0
    assert_graded_by("qwen25", output)
    assert main(arguments) == 0  # continues it, with the default grader
    assert_graded_by("math-verify", output)
    line = refused(["--regrade", str(output), "--grader", "Qwen"], capfd)
    assert "grader: 'Qwen': input should be 'math-verify' or 'qwen25'" in line
    assert_graded_by("math-verify", output)


def test_against_compares_by_the_same_grader(evaluated, tmp_path, capfd):
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    arguments = evaluated("before", TEXTS)
    evaluated("after", EASY)
    assert main(["eval", "--regrade", after, "--against", before]) == 0
    assert "1 became right, 1 wrong." in capfd.readouterr().out
    regrade = ["--regrade", after, "--grader", "qwen25", "--against", before]
    assert main(["eval", *regrade]) == 0
    said = capfd.readouterr().out
    assert "1 became right, 2 wrong." in said and "differ" not in said
    without(tmp_path / "before")
    said = f"against: {before} has no verdicts of the grader qwen25; run em-kernels eval --regrade"
    new = [*arguments[1:-1], str(tmp_path / "new"), "--grader", "qwen25", "--against", before]
    assert f"{said} {before}\n" in refused(new, capfd)
    assert not (tmp_path / "new").exists()
    assert main(["eval", *regrade]) == 2
    assert said in capfd.readouterr().err
    assert main(["eval", "--regrade", before]) == main(["eval", *regrade]) == 0
    assert "1 became right, 2 wrong." in capfd.readouterr().out


def test_folders_from_before_a_setting(evaluated, tmp_path, capfd):
    output, other = tmp_path / "eval", tmp_path / "other"
    arguments = evaluated("eval", TEXTS)
    evaluated("other", TEXTS)
    without(output, "grader", "decoding")
    assert main(["eval", "--regrade", str(other), "--against", str(output)]) == 2
    assert main(arguments) == 0
    assert_graded_by("math-verify", output)
    without(output, "grader", "decoding")
    assert main(["eval", "--regrade", str(output)]) == 0
    assert_graded_by("math-verify", output)
    without(output, "decoding")
    assert main([*arguments, "--decoding", "em-inf", "--temperature", "0.1"]) == 2
    capfd.readouterr()
    assert main(["eval", "--regrade", str(output), "--against", str(other)]) == 0
    assert "differ" not in capfd.readouterr().out
