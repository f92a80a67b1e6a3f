"""The `ratio` fixture of make bench, its table, and its part of results/<device>.json."""

import statistics
import time
from pathlib import Path

import pytest
import torch

import em_kernels
from benchmarks import store
from benchmarks.measure import keep_freed_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 5


if DEVICE == "cpu":
    keep_freed_memory()


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="file to add to (default: results/<device>.json)")


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.fixture
def ratio(benchmark):
    """A function that times another and its baseline in turns, so that outside load slows both."""

    def measure(function, baseline, **facts):
        baseline_ms, function_ms = [], []

        def timed(run, times):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times.append(1e3 * (time.perf_counter() - start))

        timed(function, [])  # The first call compiles and allocates.
        benchmark.pedantic(
            lambda: timed(function, function_ms),
            setup=lambda: timed(baseline, baseline_ms),
            rounds=ROUNDS,
        )
        ratios = [a / b for a, b in zip(function_ms, baseline_ms, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        benchmark.extra_info.update(
            facts,
            ratio=round(statistics.median(ratios), 3),
            ratio_quartiles=[round(quartiles[0], 3), round(quartiles[2], 3)],
            time_ms=round(statistics.median(function_ms), 1),
            baseline_ms=round(statistics.median(baseline_ms), 1),
        )

    return measure


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [b.extra_info | {"name": b.name} for b in session.benchmarks] if session else []
    rows = [row for row in rows if "ratio" in row]
    if not rows:
        return
    write = terminalreporter.write_line
    name = store.device_name(DEVICE)
    write(f"\n{name}; torch {torch.__version__}; medians of {ROUNDS} rounds in turns")
    head = ("what", "over", "ms", "over, ms", "ratio", "quartiles", "limit", "goal")
    lines = [head] + [
        (
            row["what"],
            row["over"],
            f"{row['time_ms']:.0f}",
            f"{row['baseline_ms']:.0f}",
            f"{row['ratio']:.2f}",
            "{:.2f}-{:.2f}".format(*row["ratio_quartiles"]),
            row.get("must", ""),
            row.get("aim", ""),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        write("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    facts = {"em_kernels": em_kernels.__version__, "torch": torch.__version__, "rounds": ROUNDS}
    path = config.getoption("--results") or store.path_of(DEVICE)
    store.merge(path, DEVICE, "ratios", {row.pop("name"): row | facts for row in rows})
    write(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
