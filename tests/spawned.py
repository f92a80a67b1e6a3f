"""Processes of torch.multiprocessing for a test; what hangs is ended."""

import time

import torch.multiprocessing as mp


def spawn(worker, *arguments, nprocs, timeout_s=120):
    """worker(rank, *arguments) in each, to its end."""
    context = mp.spawn(worker, arguments, nprocs=nprocs, join=False)
    deadline = time.monotonic() + timeout_s
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        for process in context.processes:
            process.kill()
