"""Test, tune and measure the library on a CUDA GPU; make gpu runs it.

It needs torch, triton and transformers, and for the tests pytest and
hypothesis, but no network; the checkout need not be installed. Each part runs in
a process of its own with a time limit, and adds to one results file. The run
stops after nine minutes; the same command then runs parts that are missing or
failed.
"""

import argparse
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import ceilings, gpu_tools, store, suite, tuning
from benchmarks.tuning import DRY, GPU, Sizes

ROOT = Path(__file__).parents[1]
TESTS = {
    "rows": ("gpu/test_rows_gpu.py", "gpu/test_sparse_gpu.py", "test_finished_rows.py"),
    "functions": (
        "gpu/test_functional_gpu.py",
        *("test_functional.py", "test_gradients.py", "test_hard_inputs.py", "test_kept.py"),
        *("test_return_stats.py", "test_several_targets.py", "test_support.py", "test_top_k.py"),
        *("test_peers.py", "test_precision.py", "test_sink.py", "test_sparse.py"),
        *("test_divergence.py", "test_divergence_hard.py", "test_token_loss.py"),
    ),
    "trainer": (
        "gpu/test_attention_gpu.py",
        "gpu/test_optimizer_gpu.py",
        "gpu/test_trainer_gpu.py",
    ),
    "ranks": ("gpu/test_ranks_gpu.py",),
}
WORKERS = 6  # of pytest-xdist, if installed: compiling kernels takes most of the time
SHAPE = "qwen3-8b"  # at N = 8192, where others have published times
SUITE = (  # arguments of python -m benchmarks, what matters most first
    f"--shape {SHAPE}",
    f"--shape {SHAPE} --task stats --provider ours compile trl liger verl",
    "--shape llama3-8b gemma2-2b --provider ours ours-sparse compile cce quack liger trl verl",
    f"--shape {SHAPE} --input uniform-1 --provider ours ours-sparse",
    f"--shape {SHAPE} --task frozen --provider ours ours-sparse",
)


class Run(NamedTuple):
    """Arguments of a part."""

    sizes: Sizes
    path: Path  # results file
    again: bool


def run_tests(run: Run, name: str) -> dict:
    """Run the GPU tests of TESTS[name], which skip themselves without a GPU; return the counts.

    If some fail, pytest's report is kept beside the results.
    """
    import pytest

    os.chdir(ROOT)
    report = run.path.with_name(f"{run.path.stem}-{name}.xml")
    flags = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    if len(TESTS[name]) > 1 and find_spec("xdist"):
        flags += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    code = pytest.main([*(str(ROOT / "tests" / file) for file in TESTS[name]), *flags])
    found = count(list(ElementTree.parse(report).getroot().iter("testcase")))
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:  # A file can skip itself.
        return {"skipped": "; ".join(found["left_out_because"]) or "failed: there is no GPU test"}
    if found["failed"] == 0:
        report.unlink()
    return found | {"failed": found["failed"] or int(code != 0)}


def count(cases: list[ElementTree.Element]) -> dict:
    """Count passed, failed and skipped tests of a JUnit report, with failures and skip reasons."""
    failures, skips = dict[str, str](), dict[str, int]()
    for case in cases:
        for kind in ("failure", "error", "skipped"):
            if (told := case.find(kind)) is None:
                continue
            why = (told.get("message") or "")[:1000]
            if kind != "skipped":
                failures[f"{case.get('classname')}::{case.get('name')}"] = why
                continue
            if why == "collection skipped":  # A whole file's reason is in the text.
                found = re.search(r"Skipped: (.*).\)$", told.text or "")
                why = found[1] if found else why
            skips[why] = skips.get(why, 0) + 1
    left_out = sum(skips.values())
    passed = len(cases) - len(failures) - left_out
    told = {"failures": failures, "left_out_because": skips}
    return {"passed": passed, "failed": len(failures), "left_out": left_out, **told}


def tune_rows(run: Run) -> dict:
    """Time every setting of the Triton kernels; a dry run uses Triton's interpreter."""
    if run.sizes == GPU:
        from em_kernels.kernels import triton as kernels
    else:
        sys.path.append(str(ROOT / "tests"))
        import interpreted

        from em_kernels.kernels.configs import config_for

        kernels = interpreted.load()
        kernels.config_for = config_for
    found = tuning.sweep_rows(kernels, run.sizes)
    return found | {"commit": tuning.table_row(found, run.sizes.device)}


def tune_chunks(run: Run) -> dict:
    """Find the smallest chunk_bytes that is as fast as any."""
    ways = tuning.sweep_chunks(run.sizes)
    best = (f"{way} {size}" for way, size in tuning.best_chunks(ways).items())
    return {"ways": ways, "commit": f"chunk_bytes that are enough: {', '.join(best)}"}


def bench_suite(run: Run) -> dict:
    """Measure the suite's cases that the results do not have yet."""
    asked = SUITE if run.sizes == GPU else ("--shape 32x400 --tokens 24 --provider floor ours",)
    device = ["--device", run.sizes.device]
    cases = [c for one in asked for c in suite.cases_of(suite.parse([*one.split(), *device]))]
    known = store.load(run.path).get("cases", {}) if run.path.exists() and not run.again else {}
    left = [c for c in cases if "ratio" not in known.get(f"{c.problem} {c.provider}", {})]
    measured = len(cases) - len(left) + suite.run(left, run.path)
    known = store.load(run.path)["cases"]
    ours = [known[f"{c.problem} {c.provider}"] for c in cases if c.provider.startswith("ours")]
    failed = sum("wrong" in row or row.get("skipped", "").startswith("failed") for row in ours)
    return {"cases": len(cases), "measured": measured, "failed": failed}


def bench_ratios(run: Run) -> dict:
    """Run make bench in bf16."""
    import pytest

    os.chdir(ROOT)
    chosen = "bfloat16 or test_rows" if run.sizes == GPU else "test_rows"
    flags = ["-rs", "--benchmark-disable-gc", "-p", "no:cacheprovider", f"--results={run.path}"]
    code = pytest.main([str(Path(__file__).with_name("bench_entropy.py")), "-k", chosen, *flags])
    return {"failed": int(code != 0)}


class Part(NamedTuple):
    """A part of the proof; its time limit includes start and compilation."""

    seconds: float
    run: Callable[[Run], dict]
    text: str


PARTS = {
    "environment": Part(
        45,
        lambda run: ceilings.environment(run.sizes),
        "device, versions, and speed limits: a copy, bf16 GEMMs",
    ),
    "rows": Part(
        120,
        partial(run_tests, name="rows"),
        "tests of the Triton kernels and the sparse gradient, against fp64",
    ),
    "functions": Part(
        120,
        partial(run_tests, name="functions"),
        "the library's own tests on the GPU, with hard inputs",
    ),
    "trainer": Part(
        90,
        partial(run_tests, name="trainer"),
        "tests of optimizer and trainer; need pip install '.[train]'",
    ),
    "ranks": Part(90, partial(run_tests, name="ranks"), "tests of several processes over NCCL"),
    "memcheck": Part(
        60,
        lambda run: gpu_tools.sanitize(run.sizes, "memcheck"),
        "compute-sanitizer on a small case, if installed",
    ),
    "tune-rows": Part(
        90,
        tune_rows,
        "every setting of kernels/configs.py; prints the row to commit",
    ),
    "tune-chunks": Part(60, tune_chunks, "time and memory by chunk_bytes"),
    "profile": Part(
        45,
        lambda run: gpu_tools.profile(run.sizes),
        "where a step's time goes, by kernel",
    ),
    "suite": Part(
        210,
        bench_suite,
        "python -m benchmarks at published shapes, with installed libraries",
    ),
    "ratios": Part(90, bench_ratios, "make bench in bf16"),
    "counters": Part(
        45,
        lambda run: gpu_tools.counters(run.sizes),
        "Nsight Compute's counters of each row kernel, if installed",
    ),
    "racecheck": Part(
        60,
        lambda run: gpu_tools.sanitize(run.sizes, "racecheck"),
        "compute-sanitizer again, for races in shared memory",
    ),
}
LISTED = "\n".join(f"  {name:<13}{part.text}" for name, part in PARTS.items())
FAILED = 3  # exit code of a part's process if something in it failed


def line_of(name: str, row: dict) -> str:
    if "skipped" in row:
        return f"{name}: skipped: {row['skipped']}"
    plain = {key: value for key, value in row.items() if isinstance(value, int | float)}
    return f"{name}: {', '.join(f'{key} {value}' for key, value in plain.items())}"


def has_failed(row: dict) -> bool:
    return bool(row.get("failed")) or row.get("skipped", "").startswith(("failed", "stopped"))


def work(name: str, run: Run) -> None:
    """Run a part in this process, in a process group of its own; store and print its result."""
    os.setsid()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for processes that it starts
    start = time.perf_counter()
    try:
        row = PARTS[name].run(run)
    except ModuleNotFoundError as error:
        row = {"skipped": f"{error.name} is not installed"}
    except Exception as error:
        traceback.print_exc()
        row = {"skipped": f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    row["seconds"] = round(time.perf_counter() - start, 1)
    store.merge(run.path, run.sizes.device, "proof", {name: row})
    print(line_of(name, row), flush=True)
    sys.exit(FAILED if has_failed(row) else 0)


def in_own_process(name: str, run: Run, seconds: float) -> bool:
    """Run a part in a process; return whether it succeeded. A dry run forks: quicker, but CUDA
    forbids it.
    """
    context = multiprocessing.get_context("spawn" if run.sizes == GPU else "forkserver")
    if run.sizes == DRY:
        context.set_forkserver_preload(["benchmarks.gpu_proof", "pytest"])
    process = context.Process(target=work, args=(name, run))
    process.start()
    try:
        process.join(seconds)
    finally:
        in_time = process.exitcode is not None
        if not in_time:
            with suppress(ProcessLookupError):  # It has no group of its own yet.
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
    if in_time and process.exitcode in (0, FAILED):
        return process.exitcode == 0
    why = f"failed: exit {process.exitcode}" if in_time else f"stopped after {seconds:.3g} s"
    store.merge(run.path, run.sizes.device, "proof", {name: {"skipped": why}})
    print(f"{name}: skipped: {why}", flush=True)
    return False


def main(arguments: list[str]) -> int:
    """Run the parts; return 0 when done, 1 if some are left, 2 for an error the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_proof",
        description=__doc__,
        epilog=f"parts, in this order:\n{LISTED}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, metavar="NAME", help="run only these")
    parser.add_argument(
        "--again", action="store_true", help="also run parts that the results file has"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="limit of the whole run (default: %(default)g)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run every part at a small size on the CPU, without a GPU",
    )
    parser.add_argument(
        "--results", type=Path, help="file to add to (default: results/<device>.json)"
    )
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_proof: error: torch sees no CUDA GPU; --dry-run needs none", file=sys.stderr)
        return 2
    default = Path("runs/gpu-proof.json") if options.dry_run else store.path_of("cuda")
    path = (options.results or default).resolve()
    run = Run(DRY if options.dry_run else GPU, path, options.again)
    began, unfinished = time.perf_counter(), []
    try:
        stored = store.load(path).get("proof", {}) if path.exists() else {}
        done = [] if options.again else [n for n, row in stored.items() if store.is_measured(row)]
        # Parts that failed before come after those not tried.
        for name in sorted(options.part or PARTS, key=lambda n: has_failed(stored.get(n, {}))):
            if name in done:
                print(f"{name}: is in {path}; --again runs it again")
                continue
            left = 60 * options.minutes - (time.perf_counter() - began)
            if left <= 0:
                print(f"{name}: not begun, as {options.minutes:g} minutes are over")
                unfinished.append(name)
                continue
            print(f"{name} ...", flush=True)
            if not in_own_process(name, run, min(PARTS[name].seconds, left)):
                unfinished.append(name)
        rows = store.load(path)["proof"].values()
    except store.BenchError as error:
        print(f"gpu_proof: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_proof: interrupted; the parts that were done are kept", file=sys.stderr)
        return 130
    print(*(row["commit"] for row in rows if "commit" in row), sep="\n")
    print(f"written to {path}")
    if unfinished:
        print(f"the same command runs what is left: {', '.join(unfinished)}")
    return int(bool(unfinished))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
