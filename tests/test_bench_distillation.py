"""The benchmark of distillation losses: truth, providers, work, what it refuses, tables."""

import importlib.util
import json
from itertools import product

import pytest
from kernel_params import needs_extension

from benchmarks import bench_distillation, measure, report, tables
from benchmarks import distillation as bench

pytestmark = pytest.mark.slow  # whole measurements, some seconds

DIVERGENCES = [name for name, task in bench.TASKS.items() if task.beta is not None]


def case(provider="ours", **changes):
    sizes = dict(shape="32x48x400", tokens=24, hidden_size=32, ref_hidden_size=48, vocab_size=400)
    return bench.Case(provider, **sizes | dict(dtype="float64", task="jsd", device="cpu") | changes)


def errors(mine):
    problem = bench.make_problem(mine)
    true = bench.truth(mine, problem)
    return measure.errors(true, bench.call(mine, problem), problem)


@pytest.mark.parametrize("task", bench.TASKS)
def test_truth_agrees_with_ours_in_fp64(task, monkeypatch):
    """Compare all tokens and entries, on more tokens than one chunk of the truth."""
    monkeypatch.setattr(bench, "SAMPLE", 400)
    monkeypatch.setattr(bench, "TRUTH_BYTES", 7 * 8 * 400)
    found = errors(case(task=task))
    assert found.keys() == {"loss", "hidden", "weight"} and max(found.values()) < 1e-12


@pytest.mark.parametrize(
    ("provider", "task"),
    [*product(["eager"], bench.TASKS), *product(["trl", "liger"], DIVERGENCES)],
)
def test_providers_compute_the_same(provider, task):
    package = bench.PROVIDERS[provider].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert max(errors(case(provider, task=task, dtype="float32")).values()) < 1e-4


@needs_extension
@pytest.mark.parametrize("task", bench.TASKS)
def test_ours_does_the_work_of_the_floor(task):
    for provider in ("floor", "ours"):
        mine = case(provider, task=task, dtype="bfloat16")
        problem = bench.make_problem(mine)
        flops = measure.gemm_flops(lambda mine=mine, problem=problem: bench.call(mine, problem))
        assert flops == (8 if task in DIVERGENCES else 6) * mine.unit


def test_a_run_and_its_table(tmp_path, capfd, monkeypatch):
    """Measure in processes, skip a library that is not there, and tabulate both."""
    absent = bench.PROVIDERS["liger"]._replace(package="not_there")
    monkeypatch.setitem(bench.PROVIDERS, "liger", absent)
    path = tmp_path / "device.json"
    run = ["--shape", "32x48x400", "--tokens", "24", "--device", "cpu", "--results", str(path)]
    run += ["--task", "reverse-kl", "--provider", "ours", "liger"]
    assert bench_distillation.main(run) == 0
    assert "1 measured" in capfd.readouterr().out
    ours, liger = json.loads(path.read_text())["distillation"].values()
    assert ours["gemm_units"] == 8 and tables.worst_error(ours) < 0.01
    assert ours["rounds"] == ours["fresh_rounds"] == measure.ROUNDS
    assert liger["skipped"] == "not_there is not installed"
    page = report.page([path], [])
    line = next(line for line in page.splitlines() if "**ours**" in line)
    head = next(line for line in page.splitlines() if "over the GEMM floor" in line)
    assert line.count("|") == head.count("|") and "beta 1" in line
    assert "Not here: Liger fused linear JSD: not_there is not installed." in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "jds"], "did you mean 'jsd'"),
        (["--provider", "trll"], "did you mean 'trl'"),
        (["--shape", "qwen"], "did you mean 'qwen2.5'"),
        (["--shape", "48x32x400"], "the teacher must be wider"),
        (["--shape", "32x48x10"], "the vocabulary have 20 entries"),
        (["--dtype", "bf16"], "did you mean 'bfloat16'"),
        (["--tokens", "0"], "--tokens: 0 is not positive"),
    ],
)
def test_bad_input_gets_one_line(arguments, said, capfd):
    assert bench_distillation.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
