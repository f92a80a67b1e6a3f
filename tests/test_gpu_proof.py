"""Dry runs of make gpu: its parts, their limits, what is kept, what is printed."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from spawned import HANG_S, outlived, running, wait_for
from training.lives import CHILDREN

from benchmarks import gpu_proof, gpu_tools, report, store, suite, tuning
from em_kernels.kernels import portable
from em_kernels.kernels.configs import DEFAULT, TUNED, RowConfig, config_for

ROOT = Path(__file__).parents[1]


def proof(*arguments):
    """Make a dry run as make gpu starts it."""
    command = [sys.executable, "-m", "benchmarks.gpu_proof", "--dry-run", *arguments]
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=alone, cwd=ROOT
    )


def forked(arguments, log, change):
    """Make a dry run, with forked parts, in a child that has imported torch and has no threads."""
    os.chdir(Path(log).parent)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    fork = multiprocessing.get_context("fork")
    gpu_proof.multiprocessing = SimpleNamespace(get_context=lambda kind: fork)
    change(fork)
    sys.exit(gpu_proof.main(["--dry-run", *arguments]))


def as_it_is(fork):
    pass


def dry(home, *arguments, change=as_it_is):
    """Make a dry run; return its exit code and output."""
    log = home / "log"
    child = CHILDREN.Process(target=forked, args=([*map(str, arguments)], str(log), change))
    child.start()
    with outlived(child):
        child.join(HANG_S)
        assert child.exitcode is not None, "it hangs"
    told = (home / "log.stdout").read_text()
    return child.exitcode, told + (home / "log.stderr").read_text()


def endless(fork):
    """Make the part tune-chunks endless, with a short time limit."""
    part = gpu_proof.PARTS["tune-chunks"]
    endless = part._replace(seconds=0.1, run=lambda run: signal.pause())
    gpu_proof.PARTS["tune-chunks"] = endless


def test_parts_are_kept_and_cut_short(tmp_path):
    """Run one part; then a second that takes too long; then without time for it; then in full."""
    path = tmp_path / "proof.json"
    names = ["--part", "environment", "tune-chunks", "--results", path]
    code, told = dry(tmp_path, *names[:2], *names[3:])
    assert code == 0, told
    assert "environment: copy_gb_per_s" in told and "written to" in told
    kept = store.load(path)["proof"]["environment"]
    assert kept["copy_gb_per_s"] > 0 and kept["versions"]["torch"] == version("torch")
    assert all(rate > 0 for rate in kept["head_tflops"].values())

    code, told = dry(tmp_path, *names, change=endless)
    assert code == 1, told
    assert "environment: is in" in told and "tune-chunks: skipped: stopped after 0.1 s" in told
    assert "runs what is left: tune-chunks" in told
    assert store.load(path)["proof"]["environment"] == kept

    code, told = dry(tmp_path, *names, "--minutes", "0")
    assert code == 1 and "tune-chunks: not begun, as 0 minutes are over" in told

    code, told = dry(tmp_path, *names)
    assert code == 0, told
    found = store.load(path)["proof"]
    assert found["environment"] == kept and "environment: is in" in told
    assert found["tune-chunks"]["ways"].keys() == tuning.WAYS.keys()
    assert found["tune-chunks"]["commit"] in told


def out_of_time(fork):
    """Make the time limit of a part expire at once."""

    class Process(fork.Process):
        def join(self, timeout=None):
            super().join(timeout and 0)

    fork.Process = Process


def out_of_time_at_work(fork):
    """Make the time limit of a part expire once its first child process, made endless, runs."""
    Path("sitecustomize.py").write_text(  # Python imports it when it starts
        "import os, pathlib, signal, sys\n"
        "if 'benchmarks.measure' in sys.orig_argv:\n"
        "    pathlib.Path('.pid').write_text(str(os.getpid()))\n"
        "    pathlib.Path('.pid').rename('pid')\n"
        "    signal.pause()\n"
    )
    sys.path.insert(0, os.getcwd())

    class Process(fork.Process):
        def join(self, timeout=None):
            if timeout:
                wait_for(Path("pid").exists, self.is_alive)
            super().join(timeout and 0)

    fork.Process = Process


@pytest.mark.parametrize("change", [out_of_time, out_of_time_at_work])
def test_a_part_over_its_limit_is_stopped_with_all_it_started(change, tmp_path):
    path = tmp_path / "proof.json"
    code, told = dry(tmp_path, "--part", "suite", "--results", path, change=change)
    assert code == 1 and "suite: skipped: stopped after 210 s" in told, told
    assert store.load(path)["proof"]["suite"]["skipped"].startswith("stopped after")
    if change is out_of_time_at_work:
        pid = int((tmp_path / "pid").read_text())
        wait_for(lambda: not running(pid))


@pytest.mark.slow
def test_every_part_and_its_page(tmp_path):
    path = tmp_path / "proof.json"
    ran = proof("--results", path)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr
    found = store.load(path)["proof"]
    assert found.keys() == gpu_proof.PARTS.keys()
    assert not [name for name, row in found.items() if not store.is_measured(row)]
    if not torch.cuda.is_available():
        assert found["rows"]["left_out"] > 600 and found["functions"]["left_out"] > 300
    assert not found["tune-rows"]["wrong"]
    source, row = found["tune-rows"]["commit"].split("\n")
    assert source.startswith("# ") and torch.__version__ in source
    capability, _, row = row.partition(": ")
    assert capability == "(0, 0)" and eval(f"[{row}]", {"RowConfig": RowConfig})[0] in offered()
    assert found["suite"] == found["suite"] | {"cases": 2, "measured": 2, "failed": 0}
    report.write(path)
    page = path.with_suffix(".md").read_text()
    for title in ("Ceilings", "Tests on the device", "Settings of the row kernels", "Chunks"):
        assert f"### {title}" in page
    for way in tuning.WAYS:
        assert f"**{way}**" in page


def offered():
    return {RowConfig(*values) for values in tuning.product(*tuning.FEW.values())} | {DEFAULT}


def test_a_page_of_whatever_was_done(tmp_path):
    """A page shows what was done: nothing of a part that could not run, the counts of tests."""
    path = tmp_path / "proof.json"
    store.merge(path, "cpu", "proof", {"environment": {"skipped": "stopped after 1 s"}})
    assert "stopped" not in report.page([path], [])
    store.merge(path, "cpu", "proof", {"rows": {"passed": 7, "failed": 0, "left_out": 2}})
    assert "| Triton rows and sparse gradient | 7 | 0 | 2 |" in report.page([path], [])


def test_settings_are_put_back():
    other = DEFAULT._replace(BLOCK_N=2)
    assert TUNED.get((0, 0)) is None
    with pytest.raises(KeyError), tuning.settings((0, 0), other):
        assert config_for((0, 0)) == other
        raise KeyError
    assert config_for((0, 0)) == DEFAULT


def test_a_wrong_setting_is_found():
    """Compare values: one column dropped, one NaN, and none wrong."""
    problem = tuning.row_problem(3, 700, "cpu")
    for name in tuning.FIELDS:
        true = [x.clone() for x in problem.launch(portable, name)]
        assert tuning.difference(problem.launch(portable, name), true) is None
        for value in (0.0, torch.nan):
            off = [x.clone() for x in true]
            off[0].view(-1)[off[0].abs().argmax()] = value
            assert "off by" in tuning.difference(tuple(off), true)


def test_the_smallest_chunk_that_is_as_fast():
    ways = {"exact": {"1": {"ratio": 1.5}, "2": {"ratio": 1.21}, "4": {"ratio": 1.2}}}
    assert tuning.best_chunks(ways) == {"exact": "2"}


def test_the_suite_is_asked_for_what_exists():
    """Shapes, tasks, inputs and providers exist; no GPU is here to measure them on."""
    for one in gpu_proof.SUITE:
        options = suite.parse([*one.split(), "--device", "cpu"])
        cases = list(suite.cases_of(options))
        assert cases and all(case.dtype == "bfloat16" for case in cases)


def test_every_file_of_gpu_tests_is_part_of_it():
    parts = {name for names in gpu_proof.TESTS.values() for name in names}
    assert all((ROOT / "tests" / name).exists() for name in parts)
    assert {f"gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")} <= parts


@pytest.mark.slow
def test_every_gpu_test_is_part_of_it():
    """Collect the GPU tests, those of the rows fixture too."""
    tests = ROOT / "tests"
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-q"]
    asked += ["-m", "gpu or simulated", tests]
    listed = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT).stdout
    found = set(re.findall(r"^tests/(\S+\.py)", listed, re.M))
    assert found == {name for names in gpu_proof.TESTS.values() for name in names}


def test_junit_reports_are_counted():
    text = """<testsuites><testsuite>
      <testcase classname="a" name="one"/>
      <testcase classname="a" name="two"><failure message="E 1 != 2&#10;more"/></testcase>
      <testcase classname="a" name="three"><skipped message="needs two GPUs"/></testcase>
      <testcase classname="a" name="four"><error message="boom"/></testcase>
      <testcase classname="" name="b"><skipped message="collection skipped"
        >('/b.py', 9, "Skipped: could not import 'x': No module named 'tyro'")</skipped></testcase>
    </testsuite></testsuites>"""
    found = gpu_proof.count(list(ElementTree.fromstring(text).iter("testcase")))
    assert (found["passed"], found["failed"], found["left_out"]) == (1, 2, 2)
    assert found["failures"] == {"a::two": "E 1 != 2\nmore", "a::four": "boom"}
    absent = "could not import 'x': No module named 'tyro'"
    assert found["left_out_because"] == {"needs two GPUs": 1, absent: 1}


@pytest.mark.slow
def test_a_failed_part_is_kept_until_it_is_done_again(tmp_path):
    """A failed part keeps its failures if a later run is cut short, and runs after the others."""
    path = tmp_path / "proof.json"
    for row in ({"skipped": "no"}, {"failed": 1, "failures": {"a": "b"}}, {"skipped": "stopped"}):
        store.merge(path, "cpu", "proof", {"environment": row})
    assert store.load(path)["proof"]["environment"]["failures"] == {"a": "b"}
    ran = proof("--part", "environment", "profile", "--results", path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.index("profile ...") < ran.stdout.index("environment ...")
    assert "failed" not in store.load(path)["proof"]["environment"]


def test_small_case_runs_here():
    gpu_tools.small_case("cpu")


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA GPU is there")
    assert gpu_proof.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "sees no CUDA GPU" in err


def test_readme_claims_no_gpu_until_one_is_in_the_results():
    devices = [json.loads(p.read_text()).get("proof") for p in store.RESULTS.glob("*.json")]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert bool(re.search("No GPU has run this code yet", readme)) == (not any(devices))
