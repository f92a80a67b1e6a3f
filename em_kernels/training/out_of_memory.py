"""Running out of memory: how it is recognised, and a second try with half the batch."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


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
