"""Processes for tests: wait for events, end those that hang, find those left over."""

import faulthandler
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch.multiprocessing as mp

from em_kernels.ops import choice_costs

HANG_S = 300  # only ends what hangs: a busy CPU makes everything ten times slower


def wait_for(condition, alive=lambda: True):
    """Poll until condition() is true, and return it; fail if `alive()` is not, or after HANG_S."""
    end = time.monotonic() + HANG_S
    while not (found := condition()):
        assert alive(), "the process that is waited for has ended"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found


@contextmanager
def outlived(process):
    """Kill a subprocess or multiprocessing process when the test leaves the block."""
    try:
        yield process
    finally:
        process.kill()
        (process.wait if hasattr(process, "wait") else process.join)()


def running(pid):
    """Return True if a process runs; one that has ended stays listed until it is reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def group_of(leader):
    """Return the running processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == leader and running(path.name):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def spawn(worker, *arguments, nprocs, timeout_s=HANG_S):
    """Run worker(rank, *arguments) in nprocs processes and wait for all of them."""
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


def use_tolerances(patch=setattr):
    """Use a gradient tolerance whatever the sizes; those of tests could not pay."""
    patch(choice_costs, "why_exact", lambda head, needs: "")


def watched(rank, worker, *arguments):
    faulthandler.enable()
    use_tolerances()
    worker(rank, *arguments)
