"""Memory of a GPU: how its allocator is set up, its cap while a run lasts, running out of it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow() -> None:
    """Ask torch for segments that grow, unless the user has set up its allocator.

    Segments of fixed size cannot join: memory that is free in several of them holds no large
    tensor. Without effect once torch has allocated memory on a GPU.
    """
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


@contextmanager
def limited_memory(device: torch.device, limit: int) -> Iterator[None]:
    """Within this context torch allocates at most so many bytes on a GPU, and counts a new peak.

    Beyond the limit it raises an error, which is better than taking the desktop's memory, or than
    slow paging to host memory under WSL.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    share = limit / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an error of a GPU's allocator or of the CPU's."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def halve_until_it_fits(
    work: Callable[[int], T], size: int, smallest: int, on_retry: Callable[[int], object]
) -> T:
    """Return work(size); where a GPU runs out of memory, try again with half, to `smallest`."""
    while True:
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if size <= smallest:
                raise
        # Only after the except clause is the error gone, and with it the tensors that it held.
        torch.cuda.empty_cache()
        size //= 2
        on_retry(size)
