"""Reports of other tools on the kernels: compute-sanitizer, PyTorch's profiler, Nsight Compute."""

import csv
import os
import re
import shutil
import subprocess
import sys
from statistics import median

import torch
from torch.profiler import ProfilerActivity

from benchmarks.measure import timed_ms
from benchmarks.tuning import DRY, FIELDS, GPU, WAYS, Sizes, head_problem, row_problem, step
from em_kernels import fused_entropy_loss, fused_token_stats
from em_kernels.kernels import kernels_for

COUNTERS = {  # Nsight Compute's names, and ours
    "gpu__time_duration.sum": "time_ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}


def small_case(device: str) -> None:
    """Run each way through the head once, at sizes that no block divides."""
    torch.manual_seed(0)
    n, d, v = 65, 40, 4099
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_()
        weight = torch.randn(v, d, device=device).to(dtype).requires_grad_()
        bias = torch.randn(v, device=device).to(dtype).requires_grad_()
        targets = torch.arange(n, device=device)
        chunk_bytes = 30 * 12 * 4112  # several chunks, the last one partial
        for more in ({}, {"grad_tolerance": 2**-6}, {"softcap": 20.0, "bias": bias}):
            given = {"temperature": 0.2, "chunk_bytes": chunk_bytes, **more}
            fused_entropy_loss(hidden, weight, **given).backward()
        stats = fused_token_stats(hidden, weight, targets, bias=bias, chunk_bytes=chunk_bytes)
        (stats.entropy - stats.logprob).sum().backward()
        for x in (hidden, weight, bias):
            assert x.grad.isfinite().all()


def python(call: str) -> list[str]:
    """Return a command that calls a function of this module in a process of its own."""
    return [sys.executable, "-c", f"from benchmarks import gpu_tools; gpu_tools.{call}"]


def tool(name: str) -> str | None:
    """Find a program of the CUDA toolkit, whose folder need not be on the PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def sanitize(sizes: Sizes, kind: str) -> dict:
    """Run compute-sanitizer's memcheck (accesses out of bounds) or racecheck on small_case."""
    command, sanitizer = python(f"small_case({sizes.device!r})"), tool("compute-sanitizer")
    if sizes == DRY:
        subprocess.run(command, check=True)
        return {"left_out": 1}
    if sanitizer is None:
        return {"skipped": "compute-sanitizer is not installed"}
    flags = ["--error-exitcode", "9", "--report-api-errors", "no"]
    separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # An allocation for each tensor.
    ran = subprocess.run(
        [sanitizer, "--tool", kind, *flags, *command],
        capture_output=True,
        text=True,
        env=os.environ | separate,
    )
    told = ran.stdout + ran.stderr
    print(told[-3000:], flush=True)
    summary = (re.findall(r"[A-Z]+ SUMMARY.*", told) or [f"exit {ran.returncode}"])[-1]
    return {"failed": int(ran.returncode != 0), "summary": summary}


def profile(sizes: Sizes) -> dict:
    """Measure where the time of a step goes, by the name of the device's kernels."""
    problem, found = head_problem(sizes), {}
    activity = ProfilerActivity.CPU if sizes == DRY else ProfilerActivity.CUDA
    clock = "self_cpu_time_total" if sizes == DRY else "self_device_time_total"
    for way, loss_with in WAYS.items():
        run = step(problem, loss_with(None))
        run()
        wall_ms = median(timed_ms(sizes.device, run) for _ in range(5))
        with torch.profiler.profile(activities=[activity]) as profiler:
            run()
            if sizes == GPU:
                torch.cuda.synchronize()
        events = profiler.key_averages()
        rows = sorted(((getattr(e, clock) / 1e3, e.count, e.key) for e in events), reverse=True)
        busy_ms = sum(ms for ms, _, _ in rows)
        found[way] = {
            "wall_ms": round(wall_ms, 3),
            "kernels_ms": round(busy_ms, 3),
            "top": [[key[:80], round(ms, 3), n] for ms, n, key in rows[:14] if ms > 0],
        }
        print(f"  {way}: {wall_ms:.2f} ms, of which kernels {busy_ms:.2f}", flush=True)
        for key, ms, n in found[way]["top"]:
            print(f"    {ms:9.3f} ms  {n:5} x  {key}", flush=True)
    return found


def launch_rows(device: str, rows: int, columns: int) -> None:
    """Launch each row kernel once, on a chunk, for a profiler to watch."""
    problem = row_problem(rows, columns, device)
    kernels = kernels_for(problem.terms.y)
    for name in FIELDS:
        problem.launch(kernels, name)


def counters(sizes: Sizes) -> dict:
    """Read Nsight Compute's counters of each row kernel; the card's clocks stay as they are."""
    command, ncu = (
        python(f"launch_rows{(sizes.device, sizes.rows, sizes.head.vocab_size)}"),
        tool("ncu"),
    )
    if sizes == DRY:
        subprocess.run(command, check=True)
        return {"left_out": len(FIELDS)}
    if ncu is None:
        return {"skipped": "ncu is not installed"}
    asked = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    asked += ["--kernel-name", "regex:row_statistics|row_gradient|column_mass"]
    asked += ["--metrics", ",".join(COUNTERS)]
    ran = subprocess.run([ncu, *asked, *command], capture_output=True, text=True)
    return counted(ran.stdout) or {"skipped": f"failed: ncu: {(ran.stdout + ran.stderr)[-300:]}"}


def counted(text: str) -> dict[str, dict[str, str]]:
    """Parse Nsight Compute's CSV into counters by kernel; the line after the head has units."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = [row for row in csv.DictReader(lines[first:]) if row["ID"].isdigit()]
    return {
        row["Kernel Name"]: {name: row[key] for key, name in COUNTERS.items() if key in row}
        for row in rows
    }
