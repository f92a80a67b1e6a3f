"""A run's base and checkpoints on several sets, and the server that the command starts."""

import json
import os
import re
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from training.tiny import TRAINING_TEXT, read, run, save_tiny, settings

from em_kernels.cli import main
from em_kernels.training.evaluation import suite as suites
from em_kernels.training.evaluation.suite import readings, table_of
from em_kernels.training.evaluation.vllm import served
from em_kernels.training.settings import UserError

FLAGS = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "6"]
SIZES = {"math500": 8, "minerva_math": 5, "amc23": 3}
COPIES = 8  # of each problem of amc23


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Write three of the suite's four sets."""
    folder = tmp_path_factory.mktemp("sets")
    for name, size in SIZES.items():
        rows = [{"problem": f"What is {i} + {size}?", "answer": i + size} for i in range(size)]
        rows *= COPIES if name == "amc23" else 1
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a tiny model, and keep two checkpoints."""
    place = tmp_path_factory.mktemp("trained")
    save_tiny(place / "model", max_position_embeddings=512)
    run(settings(place / "model", place / "run", steps=2, save_at=(1,), prompt=TRAINING_TEXT))
    return place / "run"


@pytest.mark.slow  # loads each model, and grades in worker processes
def test_the_command(trained, sets, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    asked = ["eval", "--suite", "qwen25-math", "--suite-data", str(sets), "--model", str(trained)]
    assert main([*asked, *FLAGS]) == 0
    out, err = capfd.readouterr()
    report = json.loads((trained / "suite" / "suite.json").read_text())
    assert list(report["models"]) == ["base", "step-00001", "step-00002"]
    assert report["missing"] == ["OlympiadBench"]
    assert f"OlympiadBench is left out: {sets} has no olympiadbench.jsonl" in err
    assert "48 completions, at most 0.000288 million tokens." in err  # 3 (8 + 5 + 3)
    assert "At the first batch's" in err and err.count(" hours.") == 1
    for label, scores in report["models"].items():
        assert {name: found["problems"] for name, found in scores.items()} == {
            "MATH-500": 8,
            "Minerva": 5,
            "AMC23": 3,
        }
        for name, found in scores.items():
            folder = trained / "suite" / label / name.lower()
            assert json.loads((folder / "results.json").read_text()) == found
            assert len(read(folder / "completions.jsonl")) == found["problems"]
            assert set(found["graders"]) == {"math-verify", "qwen25"}
    assert "No average, as OlympiadBench is missing." in out and "the paper's 7B, after" in out
    assert "Best on every other problem: " in out and "More updates are not better" in out
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("completions.jsonl")}
    assert main([*asked, *FLAGS]) == 0  # nothing is sampled again
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("completions.jsonl")}
    page = trained / "report.html"
    assert main(["report", str(trained), "--no-models"]) == 0
    assert "Accuracy on qwen25-math" in page.read_text("utf-8")


def scores(right, others=0.0):
    right = np.array(right, bool)
    found = {
        "accuracy": float(right.mean()),
        "interval": [0.0, 1.0],
        "right": right[:, None].tolist(),
    }
    graders = {"qwen25": {"accuracy": float(right.mean())}, "math-verify": {"accuracy": others}}
    return {**found, "graders": graders, "cut": 1}


def report_of(**models):
    sets = [each.name for each in suites.SUITES["qwen25-math"]]
    found = {label: {name: scores(rows) for name in sets} for label, rows in models.items()}
    facts = {
        "suite": "qwen25-math",
        "quick": False,
        "grader": "qwen25",
        "model": "m",
        "missing": [],
    }
    return {**facts, "models": found}


def test_a_checkpoint_is_chosen_on_one_half_and_told_of_the_other():
    first, second = [1, 0, 0, 0] * 5, [1, 1, 1, 0] * 5
    report = report_of(base=[0, 0, 1, 0] * 5, one=first, two=second)
    (told,) = readings(report)
    assert told.startswith("Best on every other problem: two, 100.0 %; on the rest, which did not")
    assert "50.0 %, +50.0 points [" in told
    (told,) = readings(report_of(base=second, one=first, two=first))
    assert told.startswith("Best on every other problem: base, 100.0 %. More updates")
    assert not list(readings(report_of(base=second, one=first)))
    cells = [list(column.cells) for column in table_of(report).columns]
    assert cells[0] == ["base", "", "one", "", "two", "", *suites.PUBLISHED]
    assert cells[-1] == ["25.0  0.0", "", "25.0  0.0", "", "75.0  0.0", "", "31.3", "56.0"]


def test_mean_and_deviation_over_runs():
    runs = [report_of(base=[1, 0], one=[1, 1]), report_of(base=[1, 0], one=[1, 0, 0, 0])]
    columns = suites.table_over_runs(runs).columns
    assert [list(column.cells) for column in columns][:2] == [
        ["base", "one"],
        ["50.0 ± 0.0", "62.5 ± 53.0"],
    ]


def test_a_server_takes_whole_models(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with (
        pytest.raises(UserError, match="holds adapters; em-kernels merge RUN"),
        served(str(tmp_path), tmp_path / "log", Console(quiet=True)),
    ):
        pass


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--suite", "none"], "suite: 'none' is unknown; choose one of qwen25-math"),
        (["--suite", "qwen25-math", "--data", "rows.jsonl"], "suite: goes without data"),
        (
            ["--suite", "qwen25-math", "--suite-data", "empty"],
            "suite: none of its sets can be read",
        ),
        (["--data", "rows.jsonl", "--quick"], "quick: goes with suite"),
        (["--data", "rows.jsonl", "--checkpoint", "7"], "checkpoint: .* has 1 and 2"),
        (
            ["--suite", "qwen25-math", "--engine", "vllm"],
            "engine: the command vllm is not installed",
        ),
    ],
)
def test_refusals(arguments, said, trained, sets, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    Path("empty").mkdir()
    given = (
        [] if "--suite-data" in arguments or "--data" in arguments else ["--suite-data", str(sets)]
    )
    base = ["eval", "--model", str(trained), "--output", str(tmp_path / "out")]
    assert main([*base, *FLAGS, *arguments, *given]) == 2
    err = capfd.readouterr().err.splitlines()[-1]
    assert re.search(said, err)


SERVER = """#!{python}
import sys
sys.path.insert(0, {tests!r})
from http.server import ThreadingHTTPServer
from training.test_server import Handler, completion

def answer(body):
    if not body:
        return 200, {{"object": "list", "data": []}}
    return completion(body, "so \\\\boxed{{13}}", usage={{"completion_tokens": 5}})

options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
server = ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler)
server.answer, server.seen = answer, []
server.serve_forever()
"""


@pytest.mark.slow  # a process for each model imports torch
def test_engine_vllm_serves_each_model(trained, sets, tmp_path, monkeypatch, capfd):
    """The command starts a server for each model, asks it, and ends it."""
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    tests = str(Path(__file__).parents[1])
    fake.write_text(SERVER.format(python=sys.executable, tests=tests))
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    output = tmp_path / "out"
    asked = ["eval", "--suite", "qwen25-math", "--suite-data", str(sets), "--model", str(trained)]
    assert main([*asked, *FLAGS, "--engine", "vllm", "--output", str(output)]) == 0
    report = json.loads((output / "suite.json").read_text())
    for found in report["models"].values():
        assert found["MATH-500"]["accuracy"] == 1 / 8  # 5 + 8
        assert found["AMC23"]["accuracy"] == 0
    assert sorted(path.name for path in output.glob("vllm-*.log")) == [
        "vllm-base.log",
        "vllm-step-00001.log",
        "vllm-step-00002.log",
    ]
