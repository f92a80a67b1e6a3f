"""Processes for a test: waiting for what they do, ending those that hang, finding those left."""

import faulthandler
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch.multiprocessing as mp

HANG_S = 300  # ends what hangs, and nothing else: one busy CPU makes everything ten times slower


def wait_for(condition, alive=lambda: True):
    """Poll until the condition is true, and return it; whoever is to make it true must be alive."""
    end = time.monotonic() + HANG_S
    while not (found := condition()):
        assert alive(), "the process that is waited for has ended"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found


@contextmanager
def outlived(process):
    """A process, of subprocess or multiprocessing, that does not outlive the test if that fails."""
    try:
        yield process
    finally:
        process.kill()
        (process.wait if hasattr(process, "wait") else process.join)()


def running(pid):
    """Whether a process runs; one that has ended may stay listed for as long as nobody reaps it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def group_of(leader):
    """The running processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == leader and running(path.name):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def spawn(worker, *arguments, nprocs, timeout_s=HANG_S):
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
