"""Processes of torch.multiprocessing for a test; what hangs tells where, and is ended."""

import faulthandler
import os
import signal
import time

import torch.multiprocessing as mp


def spawn(worker, *arguments, nprocs, timeout_s=120):
    """worker(rank, *arguments) in each, to its end."""
    context = mp.spawn(watched, (worker, *arguments), nprocs=nprocs, join=False)
    deadline = time.monotonic() + timeout_s
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                hung = [rank for rank, job in enumerate(context.processes) if job.is_alive()]
                for rank in hung:
                    os.kill(context.processes[rank].pid, signal.SIGABRT)
                    context.processes[rank].join(timeout=10)
                raise AssertionError(f"ranks {hung} hang; stderr has their threads' stacks")
    finally:
        for process in context.processes:
            process.kill()


def watched(rank, worker, *arguments):
    faulthandler.enable()
    worker(rank, *arguments)
