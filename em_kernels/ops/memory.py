"""Memory that a chunk of logits may take, and its allocation."""

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from ..kernels.cpu import is_built
from .free_memory import free_host_bytes

# Few, large chunks: fp32 dweight is read and written once per chunk or batch of chunks.
MAX_CHUNK_BYTES = 1 << 30
# The longer side of a GPU's GEMM tile. Calculated, not measured: dhidden at D = 4096 in tiles of
# 128 x 256 on 132 multiprocessors fills 0.97 of its waves with 1024 or 2048 rows, 0.55 with 1171.
TILE = 256


def free_bytes(device: torch.device) -> int:
    """Return the memory that a new tensor on this device could take now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        return free_host_bytes()
    except OSError:  # neither Linux nor psutil
        return 8 * MAX_CHUNK_BYTES


def logits_budget(
    chunk_bytes: int | None, device: torch.device, default_bytes: int = MAX_CHUNK_BYTES
) -> int:
    """Return the bytes that logits may take: `chunk_bytes`, or a default.

    The default is the smallest of `default_bytes`, 1 GiB and an eighth of the free memory, rounded
    down to a power of two so that other programs' memory seldom changes the order of sums.
    """
    if chunk_bytes is not None:
        return chunk_bytes
    limit = max(1, min(default_bytes, MAX_CHUNK_BYTES, free_bytes(device) // 8))
    return 1 << (limit.bit_length() - 1)


def chunk_length(
    total: int,
    bytes_each: int,
    chunk_bytes: int | None,
    device: torch.device,
    default_bytes: int = MAX_CHUNK_BYTES,
    at_least_a_tile: bool = True,
) -> int:
    """Return how many of `total` rows (or columns) of logits to take at a time.

    They fit into logits_budget(); chunks are as even as possible, and on a GPU multiples of TILE
    where that many fit. There the default is TILE at least, unless the caller does not want that or
    a quarter of the free memory does not hold it.
    """
    if chunk_bytes is not None and chunk_bytes < bytes_each:
        raise ValueError(
            f"chunk_bytes: {chunk_bytes} is less than one row (or column) of logits takes; "
            f"give at least {bytes_each}"
        )
    budget = logits_budget(chunk_bytes, device, default_bytes)
    fitting = max(1, budget // max(1, bytes_each))
    if at_least_a_tile and chunk_bytes is None and device.type == "cuda" and fitting < TILE:
        fitting = TILE if TILE * bytes_each <= free_bytes(device) // 4 else fitting
    step = TILE if device.type == "cuda" and TILE <= fitting < total else 1
    chunks = max(1, -(-total // (fitting // step * step)))
    return max(1, -(-total // (chunks * step)) * step)


def large_empty(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return torch.empty on like's device; on a CPU in pages of 2 MiB.

    Measured (Xeon, 2026-11): 300,000 page faults of 4 KiB were half of a bf16 loss's time. Returned
    gradients, which are written once and stay, are faster in pages of 4 KiB (LOG.md).
    """
    x = like.new_empty(shape, dtype=dtype)
    if x.is_cpu and is_built():
        torch.ops.em_kernels.advise_huge_pages(x)
    return x


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU that take memory only where they are written to.

    They are fresh pages, which the system clears when they are first used: whoever reads or writes
    all of them pays for that. Small pages, as it clears whole ones. The storage cannot be resized.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0 or not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return torch.zeros(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
