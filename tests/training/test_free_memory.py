"""Free memory of a machine, with and without control groups; a run's disk."""

import ctypes
import subprocess
import sys

import pytest
import torch
from training.tiny import run, save_tiny, settings
from transformers import AutoConfig

from em_kernels.ops.free_memory import free_host_bytes
from em_kernels.training.planning.planner import Planner
from em_kernels.training.runs import checkpoint


def cgroup(folder, limit, used, cache, version):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    stat = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{stat} {cache}\n")


@pytest.fixture
def machine(tmp_path):
    """Make /proc and /sys/fs/cgroup of a machine with 1000 KiB available."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    (proc / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:    1000 kB\n")
    return proc, cgroups


def test_free_memory_without_limits(machine):
    proc, cgroups = machine
    assert free_host_bytes(*machine) == 1000 << 10
    (proc / "self/cgroup").write_text("0::/user/session\n")
    cgroup(cgroups / "user", "max", 10, 0, version=2)
    assert free_host_bytes(*machine) == 1000 << 10
    assert free_host_bytes() > 0


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_counts(machine, version):
    proc, cgroups = machine
    line, root = ("0::", cgroups) if version == 2 else ("4:cpu,memory:", cgroups / "memory")
    other = "" if version == 2 else "9:name=systemd:/\n0::/\n"
    (proc / "self/cgroup").write_text(f"{line}/a/b\n{other}")
    cgroup(root / "a/b", 1 << 60, 100_000, 0, version)
    assert free_host_bytes(*machine) == 1000 << 10
    cgroup(root / "a", 500_000, 300_000, 40_000, version)
    assert free_host_bytes(*machine) == 240_000  # the file cache can be reclaimed
    cgroup(root / "a/b", 400_000, 390_000, 0, version)
    assert free_host_bytes(*machine) == 10_000
    cgroup(root / "a/b", 400_000, 500_000, 0, version)
    assert free_host_bytes(*machine) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_inside_a_container_the_path_is_the_hosts(machine, version):
    proc, cgroups = machine
    line, root = ("0::", cgroups) if version == 2 else ("4:memory:", cgroups / "memory")
    (proc / "self/cgroup").write_text(f"{line}/docker/0123/not/here\n")
    cgroup(root, 300_000, 100_000, 0, version)
    assert free_host_bytes(*machine) == 200_000


def test_disk_holds_the_next_state_beside_the_last(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model", hidden_size=256, intermediate_size=512)
    changes = {"save_optimizer": True, "save_at": (1, 2, 3), "steps": 3}
    config = settings(folder, tmp_path / "run", **changes)
    seen, sync = [], checkpoint.sync

    def measured(path):
        sync(path)
        seen.append(sum(p.stat().st_size for p in config.output.rglob("*") if p.is_file()))

    monkeypatch.setattr(checkpoint, "sync", measured)
    run(config)
    model_config = AutoConfig.from_pretrained(folder)
    planned = Planner(config, model_config, 10, torch.device("cpu")).resolve()
    assert max(seen) == pytest.approx(sum(planned.disk.values()), rel=0.02)


FREED = """
import torch
from em_kernels.ops.free_memory import return_freed_memory
def resident():
    rollup = open("/proc/self/smaps_rollup").read()  # exact, unlike statm on many cores
    return int(rollup.split("Rss:")[1].split()[0]) << 10
del (x := [torch.ones(6 << 20)])[:]  # raises glibc's own threshold to 24 MiB
blocks = [torch.ones(1 << 19) for _ in range(100)]  # 2 MiB each
before = resident()
del blocks[::2]
return_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's allocator alone")
def test_freed_blocks_go_back_to_the_system():
    """Free every other block: they are holes in glibc's heap, which would stay."""
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, check=True)
    assert int(run.stdout) > 0.9 * 50 * (2 << 20)
