"""Free host memory, within a container's limit; peaks; return of freed memory."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


def free_host_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that Linux calls available, or fewer if a cgroup of this process has fewer.

    Raises: OSError where the machine does not tell (not Linux, and no psutil).
    """
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
    except (OSError, StopIteration):
        try:
            import psutil
        except ModuleNotFoundError:
            raise OSError("free memory is unknown; pip install psutil") from None
        free = psutil.virtual_memory().available
    return min([free, *_free_in_cgroups(proc, cgroups)])


def _free_in_cgroups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Yield each limited cgroup's free bytes: its limit less use, page cache not counted as use."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:  # cgroup version 1: "4:memory:/a/b", version 2: "0::/a/b"
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = cgroups / "memory" if kinds else cgroups
        names = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
        cache = "total_inactive_file" if kinds else "inactive_file"
        group = root / path.strip("/")
        for folder in (group, *group.parents):  # in a container the path may be one of the host's
            try:
                limit, used = ((folder / f"memory.{name}").read_text().strip() for name in names)
                stat = dict(s.split() for s in (folder / "memory.stat").read_text().splitlines())
                if limit != "max":
                    yield max(0, int(limit) - int(used) + int(stat.get(cache, 0)))
            except (OSError, ValueError):
                pass  # this cgroup has no limit of its own
            if folder == root:
                break


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak, in GiB, of a GPU's allocator, or on a CPU of the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def return_freed_memory() -> None:
    """Make glibc return its heap's free pages to the system; does nothing without glibc.

    By itself it keeps freed blocks of less than 32 MiB, and reuses them badly: a training step of
    Qwen2.5-0.5B then holds 0.9 GiB more than is ever in use.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
