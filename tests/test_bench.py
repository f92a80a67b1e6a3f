"""The benchmark suite: inputs, the measuring process, what it refuses, and the report."""

import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from kernel_params import needs_extension
from spawned import HANG_S, outlived, wait_for

from benchmarks import inputs, measure, report, store, suite, tables
from benchmarks.providers import PROVIDERS, official_loss
from em_kernels.cli import main

ROOT = Path(__file__).parents[1]

TINY = ["--shape", "32x400", "--tokens", "24"]


def case(provider="ours", **changes):
    sizes = dict(shape="32x400", tokens=24, hidden_size=32, vocab_size=400, softcap=None)
    kind = dict(dtype="float32", task="loss", input="lm-0.5", device="cpu")
    return measure.Case(provider, **sizes | kind | changes)


def bench(*arguments):
    return suite.main(list(map(str, arguments)))


def refused(capfd, *arguments):
    assert bench(*arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("python -m benchmarks: error: ")
    return err


# Inputs


@pytest.mark.parametrize(
    ("hidden_size", "vocab_size"),
    [(576, 49152), pytest.param(896, 151936, marks=pytest.mark.slow)],
)
def test_lm_like_is_calibrated(hidden_size, vocab_size):
    """LM-like inputs match the figures of SmolLM2-135M, also with a larger vocabulary."""
    found = inputs.figures(inputs.lm_like(1024, hidden_size, vocab_size))
    model = inputs.SMOLLM2_FIGURES
    assert found.entropy_half == pytest.approx(model.entropy_half, rel=0.25)
    assert found.entropy_one == pytest.approx(model.entropy_one, rel=0.25)
    assert found.logit_std == pytest.approx(model.logit_std, rel=0.15)
    assert found.margin == pytest.approx(model.margin, rel=0.25)
    assert model.active_half / 3 < found.active_half < 2 * model.active_half
    assert model.active_one / 2 < found.active_one < 1.5 * model.active_one


@pytest.mark.slow
def test_real_states_have_the_recorded_figures():
    found = inputs.figures(inputs.real("real", 0.5, 1024))
    assert found == pytest.approx(inputs.SMOLLM2_FIGURES, rel=0.2)


def test_uniform_is():
    found = inputs.figures(inputs.uniform(64, 64, 4000))
    assert found.entropy_one > 0.95 * torch.tensor(4000.0).log() and found.active_one > 90


def test_inputs_do_not_depend_on_threads(monkeypatch):
    first = inputs.lm_like(8, 16, 9000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    again = inputs.lm_like(8, 16, 9000)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# One case


@pytest.mark.parametrize("task", measure.TASKS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_truth_agrees_with_stable_eager_in_fp64(task, softcap, monkeypatch):
    """Compare all entries and tokens, on more tokens than one chunk of the truth."""
    monkeypatch.setattr(measure, "SAMPLE", 400)
    mine = case("stable-eager", task=task, softcap=softcap, dtype="float64")
    problem = measure.make_problem(mine)
    true = measure.truth(mine, problem)["entropy"]
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # no fp32 copy in the provider
    loss = measure.call(PROVIDERS["stable-eager"], mine, problem)
    assert max(measure.errors(true, loss, problem).values()) < 1e-12


def test_truth_of_cross_entropy():
    mine = case(dtype="float64")
    problem = measure.make_problem(mine)
    true = measure.truth(mine, problem)["cross-entropy"]
    logits = problem.hidden @ problem.weight.t() / 0.5
    loss = torch.nn.functional.cross_entropy(logits, problem.targets)
    loss.backward()
    assert max(measure.errors(true, loss, problem).values()) < 1e-12


def test_a_wrong_provider_shows_its_error(monkeypatch):
    """Measure the official formula, whose 1e-12 matters here, without the temperature."""
    mine = case(dtype="bfloat16")
    true = measure.truth(mine, measure.make_problem(mine))
    right = measure.measure(mine, true)
    assert "wrong" not in right and right["time_ms"] > 0
    wrong = PROVIDERS["ours"]._replace(loss=lambda p: official_loss(p._replace(temperature=1.0)))
    monkeypatch.setitem(PROVIDERS, "ours", wrong)
    found = measure.measure(mine, true)
    assert found["error"]["hidden"] > measure.WRONG["bfloat16"]
    assert "above" in found["wrong"] and "time_ms" not in found and "peak_mib" not in found
    assert "WRONG" in suite.line_of(mine, found)


def test_nothing_is_set_in_a_fresh_process(monkeypatch):
    """Only the other process tells malloc to keep freed memory."""
    options, environment, mine = [], dict(os.environ), case()
    monkeypatch.setattr(measure, "mallopt", lambda *option: options.append(option))
    found = measure.fresh_times(mine)
    assert found["rounds"] == measure.ROUNDS and found["time_ms"] > 0 and found["floor_ms"] > 0
    assert options == [] and dict(os.environ) == environment
    measure.measure(mine, measure.truth(mine, measure.make_problem(mine)))
    assert options


@needs_extension
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("provider", "task", "units"),
    [
        ("floor", "loss", 6),
        ("stable-eager", "loss", 6),
        ("ours", "loss", 6),
        ("ours", "frozen", 4),
        ("ours", "stats", 6),
        ("ours", "forward", 2),
    ],
)
def test_work_is_counted_inside_our_ops(provider, task, units, dtype):
    mine = case(provider, dtype=dtype, task=task)
    problem = measure.make_problem(mine)
    flops = measure.gemm_flops(lambda: measure.call(PROVIDERS[provider], mine, problem))
    assert flops == units * 24 * 32 * 400


def test_peak_is_that_of_the_run():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the kernel does not let a process reset its peak of resident memory")
    measured = measure.peak_bytes("cpu", lambda: torch.ones(64 << 20, dtype=torch.uint8).amax())
    assert 60 << 20 < measured < 90 << 20


# The suite


def test_a_run_and_its_report(tmp_path, capfd):
    """Run each case in its own processes, then write the table and plots."""
    path = tmp_path / "device.json"
    providers = ["ours", "cce"]
    assert bench(*TINY, "--provider", *providers, "--results", path) == 0
    out = capfd.readouterr().out
    assert "needs a CUDA GPU" in out or torch.cuda.is_available()
    rows = json.loads(path.read_text())["cases"]
    assert len(rows) == len(providers) and json.loads(path.read_text())["schema"] == store.SCHEMA
    ours = rows["32x400 N=24 D=32 V=400 bfloat16 loss lm-0.5 ours"]
    assert ours["gemm_units"] == 6 and ours["rounds"] == measure.ROUNDS
    assert tables.worst_error(ours) < 0.01 and ours["versions"]["torch"] == version("torch")
    low, high = ours["ratio_quartiles"]
    assert 0 < low <= ours["ratio"] <= high
    fresh = {name for name in ours if name.startswith("fresh_")}
    if torch.cuda.is_available():
        assert not fresh
    else:
        # Error, work and memory are measured in one process alone.
        assert fresh == {f"fresh_{name}" for name in measure.in_turns("cpu", int, int)}
        low, high = ours["fresh_ratio_quartiles"]
        assert 0 < low <= ours["fresh_ratio"] <= high and ours["fresh_rounds"] == measure.ROUNDS
        assert f"fresh {ours['fresh_ratio']:.2f} ({low:.2f}-{high:.2f})" in out

    assert bench("--report", "--results", path) == 0
    page = (tmp_path / "device.md").read_text()
    assert "**ours, exact**" in page and "Cut Cross-Entropy: needs a CUDA GPU" in page
    if not torch.cuda.is_available():
        assert f"| {tables.fresh_cell(ours)} |" in page
    for theme in report.THEMES:
        plot = tmp_path / f"device-time-{theme}.svg"
        assert "ours, exact" in plot.read_text() and plot.stat().st_size < 60_000
    first = (tmp_path / "device-time-light.svg").read_bytes()
    assert bench("--report", "--results", path) == 0
    assert (tmp_path / "device-time-light.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("changes", "first", "processes"),
    [
        ({}, {"ratio": 1.2}, ["run", "fresh"]),
        ({}, {"skipped": "out of memory"}, ["run"]),
        ({}, {"wrong": "error above 0.15"}, ["run"]),
        ({"device": "cuda"}, {"ratio": 1.2}, ["run"]),
        ({"shape": "scaling"}, {"ratio": 1.2}, ["run"]),
    ],
)
def test_only_a_time_on_a_cpu_is_measured_again(changes, first, processes, monkeypatch, tmp_path):
    ran, answers = [], {"run": dict(first), "fresh": {"ratio": 1.5}}
    monkeypatch.setattr(suite, "run_process", lambda kind, *_: ran.append(kind) or answers[kind])
    row = suite.measured_row(case(**changes), tmp_path / "truth.pt")
    assert ran == processes
    assert row == first | ({"fresh_ratio": 1.5} if "fresh" in ran else {})


def told_row(provider, **fields):
    """Make a row as the suite stores one that was measured."""
    timed = dict(time_ms=10.0, ratio=1.2, ratio_quartiles=[1.1, 1.3], gemm_units=6.0)
    return case(provider, dtype="bfloat16")._asdict() | timed | {"error": {"loss": 0.01}} | fields


def test_results_with_and_without_a_fresh_process():
    """Results of a GPU, and older ones, have no such column; with some of both, cells are empty."""
    fresh = dict(fresh_time_ms=14.0, fresh_ratio=1.6, fresh_ratio_quartiles=[1.5, 1.7])
    plain, both = told_row("ours"), told_row("trl", **fresh)
    wrong = both | {"provider": "liger", "wrong": "error above 0.15"}
    for rows in ([plain], [plain, both, wrong]):
        lines = [line for line in report.table(rows) if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1
        assert ("in a fresh process" in lines[0]) == (both in rows)
    assert "1.20 (1.10-1.30) |  |" in lines[2]
    assert "1.20 (1.10-1.30) | 14 ms, 1.60 (1.50-1.70) |" in lines[3]
    assert "fresh skipped: failed" in suite.line_of(
        case(), plain | {"fresh_skipped": "failed: no memory"}
    )


def test_too_little_memory_skips_and_names_the_shape(tmp_path, capfd):
    path = tmp_path / "device.json"
    run = ["--provider", "stable-eager", "--results", path]
    assert bench("--shape", "8x2000000", "--tokens", "10000000", *run) == 0
    assert re.search(r"8x2000000.*\n.*skipped: needs about \d+ GiB", capfd.readouterr().out)
    assert "skipped" in next(iter(json.loads(path.read_text())["cases"].values()))


def test_a_skip_never_replaces_a_measurement(tmp_path):
    path = tmp_path / "device.json"
    for row in ({"skipped": "missing"}, {"time_ms": 1}, {"skipped": "missing"}):
        store.merge(path, "cpu", "cases", {"a": row})
    assert store.load(path)["cases"]["a"]["time_ms"] == 1


def test_missing_and_broken_peers_are_named(monkeypatch):
    absent = PROVIDERS["trl"]._replace(package="not_there")
    monkeypatch.setitem(PROVIDERS, "trl", absent)
    assert suite.reason_not_to(case("trl")) == "not_there is not installed"
    assert suite.reason_not_to(case("liger", softcap=30.0)) == "has no softcap"
    assert "per token" in suite.reason_not_to(case("official-eager", task="stats"))


def test_a_case_that_fails_is_named(tmp_path):
    row = suite.run_process("run", case(), tmp_path / "no-truth.pt")
    assert row["skipped"].startswith("failed: FileNotFoundError")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--provider", "our"], "did you mean 'ours'"),
        (["--shape", "qwen2.5-1.5"], "did you mean 'qwen2.5-1.5b'"),
        (["--shape", "0x10"], "--shape: '0x10' is unknown"),
        (["--task", "los"], "did you mean 'loss'"),
        (["--dtype", "bf16"], "did you mean 'bfloat16'"),
        (["--input", "lm-0.6"], "did you mean 'lm-0.5'"),
        (["--input", "real-1", "--shape", "llama3-8b"], "exists for --shape smollm2-135m only"),
        (["--device", "gpu"], "--device: 'gpu' is unknown"),
        (["--tokens", "0"], "--tokens: 0 is not positive"),
        (["--scaling", "--tokens", "8"], "--scaling"),
        (["--report", "--results", "not-there.json"], "No such file"),
    ],
)
def test_bad_input_gets_one_line(arguments, said, capfd):
    assert said in refused(capfd, *arguments)


def test_device_that_is_not_there(capfd):
    if torch.cuda.is_available():
        pytest.skip("a CUDA GPU is there")
    assert "sees no CUDA GPU" in refused(capfd, "--device", "cuda")


@pytest.mark.parametrize("content", ['{"device": "x", "results": {}}', '{"schema": 99}', "[]", "{"])
def test_results_of_another_version(content, tmp_path, capfd):
    path = tmp_path / "old.json"
    path.write_text(content)
    for command in (TINY, ["--report"]):
        assert "move it away" in refused(capfd, *command, "--results", path)
    assert path.read_text() == content


def test_report_of_nothing(tmp_path, capfd):
    (tmp_path / "empty.json").write_text(json.dumps({"schema": store.SCHEMA, "device": "x"}))
    assert "run one first" in refused(capfd, "--report", "--results", tmp_path / "empty.json")


HELD = """\
import signal, sys
from pathlib import Path
# The first provider is done.
if "benchmarks.measure" in sys.orig_argv and Path("device.json").exists():
    Path("held").touch()
    signal.pause()
"""


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    """Interrupt the suite while it measures the second provider, which would never end."""
    (tmp_path / "sitecustomize.py").write_text(HELD)  # Python imports it when it starts
    run = [sys.executable, "-m", "benchmarks", *TINY, "--results", "device.json"]
    process = subprocess.Popen(
        [*run, "--provider", "floor", "ours"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with outlived(process):
        wait_for((tmp_path / "held").exists, lambda: process.poll() is None)
        os.killpg(process.pid, signal.SIGINT)  # A terminal signals the children too.
        _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 130 and "finished cases are kept" in err and "Traceback" not in err
    (row,) = json.loads((tmp_path / "device.json").read_text())["cases"].values()
    assert "time_ms" in row


def test_the_old_command_names_the_new_one(capfd):
    assert main(["bench", "--report"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "python -m benchmarks" in err


def test_readme_is_what_the_results_say():
    readme = report.README.read_text("utf-8")
    start, end = readme.index(report.BEGIN) + len(report.BEGIN), readme.index(report.END)
    files = sorted(store.RESULTS.glob("*.json"))
    assert readme[start:end].strip() == report.block(files)
    for image in re.findall(r'(?:srcset|src)="(.*?)"', readme):
        assert (ROOT / image).is_file()
