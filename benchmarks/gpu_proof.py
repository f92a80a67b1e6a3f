"""Proof of what the library claims for GPUs: make gpu, on a CUDA GPU.

Needs torch, triton and transformers, for the tests pytest and hypothesis; nothing of this checkout
need be installed, and no network. Each part runs in a process of its own with a time limit and
writes into one results file; what is in it is not run again, so a run cut short goes on where it
stopped, as it does after nine minutes.
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
    "rows": ("gpu/test_rows_gpu.py", "gpu/test_sparse_gpu.py"),
    "functions": (
        "gpu/test_functional_gpu.py",
        *("test_functional.py", "test_gradients.py", "test_hard_inputs.py", "test_peers.py"),
        *("test_precision.py", "test_sink.py", "test_sparse.py", "test_token_loss.py"),
    ),
    "trainer": ("gpu/test_optimizer_gpu.py", "gpu/test_trainer_gpu.py"),
    "ranks": ("gpu/test_ranks_gpu.py",),
}
WORKERS = 6  # of pytest-xdist, where it is there: most of the time goes into compiling kernels
SHAPE = "qwen3-8b"  # N = 8192 of it: others have published times
SUITE = (  # of python -m benchmarks, what matters most first
    f"--shape {SHAPE}",
    f"--shape {SHAPE} --task stats --provider ours compile trl liger verl",
    "--shape llama3-8b gemma2-2b --provider ours ours-sparse compile cce quack liger trl verl",
    f"--shape {SHAPE} --input uniform-1 --provider ours ours-sparse",
    f"--shape {SHAPE} --task frozen --provider ours ours-sparse",
)


class Run(NamedTuple):
    """Arguments of a part."""

    sizes: Sizes
    path: Path  # of the results
    again: bool


def run_tests(run: Run, name: str) -> dict:
    """The GPU tests of some files; in a dry run they are collected and skip themselves. All that
    they said is kept beside the results.
    """
    import pytest

    os.chdir(ROOT)
    told = run.path.with_name(f"{run.path.stem}-{name}.xml")
    flags = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={told}"]
    if len(TESTS[name]) > 1 and find_spec("xdist"):
        flags += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    code = pytest.main([*(str(ROOT / "tests" / file) for file in TESTS[name]), *flags])
    found = count(list(ElementTree.parse(told).getroot().iter("testcase")))
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:  # whole files can leave themselves out
        return {"skipped": "; ".join(found["left_out_because"]) or "failed: there is no GPU test"}
    if found["failed"] == 0:
        told.unlink()
    return found | {"failed": found["failed"] or int(code != 0)}


def count(cases: list[ElementTree.Element]) -> dict:
    """Passed, failed and skipped tests of a JUnit report, and what those said."""
    failures, skips = dict[str, str](), dict[str, int]()
    for case in cases:
        for kind in ("failure", "error", "skipped"):
            if (told := case.find(kind)) is None:
                continue
            why = (told.get("message") or "")[:1000]
            if kind != "skipped":
                failures[f"{case.get('classname')}::{case.get('name')}"] = why
                continue
            if why == "collection skipped":  # a whole file's; its reason is in the text
                found = re.search(r"Skipped: (.*).\)$", told.text or "")
                why = found[1] if found else why
            skips[why] = skips.get(why, 0) + 1
    left_out = sum(skips.values())
    passed = len(cases) - len(failures) - left_out
    told = {"failures": failures, "left_out_because": skips}
    return {"passed": passed, "failed": len(failures), "left_out": left_out, **told}


def tune_rows(run: Run) -> dict:
    """Every setting of the Triton rows, in a dry run by the interpreter."""
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
    ways = tuning.sweep_chunks(run.sizes)
    best = (f"{way} {size}" for way, size in tuning.best_chunks(ways).items())
    return {"ways": ways, "commit": f"chunk_bytes that are enough: {', '.join(best)}"}


def bench_suite(run: Run) -> dict:
    """The cases that are not there yet."""
    asked = SUITE if run.sizes == GPU else ("--shape 32x400 --tokens 24 --provider floor ours",)
    device = ["--device", run.sizes.device]
    cases = [c for one in asked for c in suite.cases_of(suite.parse([*one.split(), *device]))]
    there = store.load(run.path).get("cases", {}) if run.path.exists() and not run.again else {}
    left = [c for c in cases if "ratio" not in there.get(f"{c.problem} {c.provider}", {})]
    measured = len(cases) - len(left) + suite.run(left, run.path)
    there = store.load(run.path)["cases"]
    ours = [there[f"{c.problem} {c.provider}"] for c in cases if c.provider.startswith("ours")]
    failed = sum("wrong" in row or row.get("skipped", "").startswith("failed") for row in ours)
    return {"cases": len(cases), "measured": measured, "failed": failed}


def bench_ratios(run: Run) -> dict:
    """make bench in bf16: ours over what it is to be measured by."""
    import pytest

    os.chdir(ROOT)
    chosen = "bfloat16 or test_rows" if run.sizes == GPU else "test_rows"
    flags = ["-rs", "--benchmark-disable-gc", "-p", "no:cacheprovider", f"--results={run.path}"]
    code = pytest.main([str(Path(__file__).with_name("bench_entropy.py")), "-k", chosen, *flags])
    return {"failed": int(code != 0)}


class Part(NamedTuple):
    """Its time limit includes start and compilation."""

    seconds: float
    run: Callable[[Run], dict]
    text: str


PARTS = {
    "environment": Part(
        45,
        lambda run: ceilings.environment(run.sizes),
        "device, versions, and its ceilings: a copy, bf16 GEMMs",
    ),
    "rows": Part(
        120,
        partial(run_tests, name="rows"),
        "tests of the Triton rows and of the sparse gradient, against fp64",
    ),
    "functions": Part(
        120,
        partial(run_tests, name="functions"),
        "the library's own tests, hard inputs among them, on the GPU",
    ),
    "trainer": Part(
        90,
        partial(run_tests, name="trainer"),
        "tests of optimizer and trainer, which need pip install '.[train]'",
    ),
    "ranks": Part(90, partial(run_tests, name="ranks"), "tests of several processes, over NCCL"),
    "memcheck": Part(
        60,
        lambda run: gpu_tools.sanitize(run.sizes, "memcheck"),
        "compute-sanitizer over a small case, where it is there",
    ),
    "tune-rows": Part(
        90,
        tune_rows,
        "every setting of em_kernels/kernels/configs.py; prints the row to commit",
    ),
    "tune-chunks": Part(60, tune_chunks, "chunk_bytes: time and memory"),
    "profile": Part(
        45,
        lambda run: gpu_tools.profile(run.sizes),
        "where the time of a step goes, by kernel",
    ),
    "suite": Part(
        210,
        bench_suite,
        "python -m benchmarks at the shapes others publish, with those that are installed",
    ),
    "ratios": Part(90, bench_ratios, "make bench, in bf16"),
    "counters": Part(
        45,
        lambda run: gpu_tools.counters(run.sizes),
        "Nsight Compute's of each row kernel, where it is there",
    ),
    "racecheck": Part(
        60,
        lambda run: gpu_tools.sanitize(run.sizes, "racecheck"),
        "compute-sanitizer again: races in shared memory",
    ),
}
LISTED = "\n".join(f"  {name:<19}{part.text}" for name, part in PARTS.items())
FAILED = 3  # exit code of a part whose tests, values or cases failed


def line_of(name: str, row: dict) -> str:
    if "skipped" in row:
        return f"{name}: skipped: {row['skipped']}"
    plain = {key: value for key, value in row.items() if isinstance(value, int | float)}
    return f"{name}: {', '.join(f'{key} {value}' for key, value in plain.items())}"


def is_unwell(row: dict) -> bool:
    return bool(row.get("failed")) or row.get("skipped", "").startswith(("failed", "stopped"))


def work(name: str, run: Run) -> None:
    """In a process, and process group, of the part's own: store and print what it found."""
    os.setsid()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of processes that it starts
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
    sys.exit(FAILED if is_unwell(row) else 0)


def in_own_process(name: str, run: Run, seconds: float) -> bool:
    """Run a part in a process; true if it succeeded. A dry run forks: quick, but not with CUDA."""
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
            with suppress(ProcessLookupError):  # not yet a group of its own
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
    """0 done, 1 a part failed or time was over, 2 the user can mend it."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"parts, in this order:\n{LISTED}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, metavar="NAME", help="only these")
    parser.add_argument("--again", action="store_true", help="also what was done before")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (9)")
    parser.add_argument("--dry-run", action="store_true", help="every part, small, on the CPU")
    parser.add_argument("--results", type=Path, help="file, instead of results/<device>.json")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_proof: error: torch sees no CUDA GPU; --dry-run needs none", file=sys.stderr)
        return 2
    usual = Path("runs/gpu-proof.json") if options.dry_run else store.path_of("cuda")
    path = (options.results or usual).resolve()
    run = Run(DRY if options.dry_run else GPU, path, options.again)
    began, unwell = time.perf_counter(), []
    try:
        stored = store.load(path).get("proof", {}) if path.exists() else {}
        done = [] if options.again else [n for n, row in stored.items() if store.is_measured(row)]
        # what failed before comes after what was not tried
        for name in sorted(
            options.part or PARTS, key=lambda n: bool(stored.get(n, {}).get("failed"))
        ):
            if name in done:
                print(f"{name}: is in {path}; --again runs it again")
                continue
            left = 60 * options.minutes - (time.perf_counter() - began)
            if left <= 0:
                print(f"{name}: not begun, {options.minutes:g} minutes are over")
                unwell.append(name)
                continue
            print(f"{name} ...", flush=True)
            if not in_own_process(name, run, min(PARTS[name].seconds, left)):
                unwell.append(name)
        rows = store.load(path)["proof"].values()
    except store.BenchError as error:
        print(f"gpu_proof: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_proof: interrupted; the parts that were done are kept", file=sys.stderr)
        return 130
    print(*(row["commit"] for row in rows if "commit" in row), sep="\n")
    print(f"written to {path}")
    if unwell:
        print(f"the same command takes up what is left: {', '.join(unwell)}")
    return int(bool(unwell))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
