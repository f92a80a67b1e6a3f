"""Signals, progress bars, the line printed per update, and memory in use."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised where the weights are those of a finished update."""


class StopRequest:
    """Turns a first Ctrl-C or SIGTERM into Interrupted at the next check; a second acts at once,
    unless patient: a launcher passes on what the terminal has sent already.
    """

    def __init__(self, patient: bool = False) -> None:
        self.requested, self.patient = False, patient

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self.patient:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> "StopRequest":
        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        if self.requested:
            raise Interrupted("interrupted")


@contextmanager
def doing(what: str) -> Iterator[None]:
    """An exception that leaves it, and that nothing has foreseen, says what was being done: cli.py
    tells it. Of several the innermost counts.
    """
    try:
        yield
    except Exception as error:
        if not hasattr(error, "doing"):
            error.doing = what  # type: ignore[attr-defined]
        raise


def progress_on(console: Console) -> Progress:
    """A bar while something runs; where nobody watches, the lines of results are enough."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def line_of(row: dict[str, Any], steps: int) -> str:
    """A row of metrics for people."""
    accuracy = "" if row["accuracy"] is None else f"  accuracy {row['accuracy']:.2f}"
    seconds = row["sampling_s"] + row["training_s"]
    return (
        f"update {row['update']:>2}/{steps}  loss = entropy {row['entropy']:.4f} nats{accuracy}"
        f"  length {row['mean_length']:.1f}  ended {row['ended']:.0%}"
        f"  {row['tokens_per_s']:.0f} tokens/s  peak {row['peak_memory_gib']:.2f} GiB"
        f"  {seconds:.1f} s"
    )


def peak_memory_gib(device: torch.device) -> float:
    """The device allocator's peak, or on a CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
