"""Console for progress and tables, and the line printed for each update."""

import os
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Terminal(Console):
    """A Console that goes on silently when its reader has left (a pipe to head, say)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):  # What is still buffered would fail at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def progress_on(console: Console) -> Progress:
    """Return a transient progress bar; it stays hidden unless the console is a terminal."""
    title, done = TextColumn("{task.description}"), TextColumn("{task.completed}/{task.total}")
    columns = (title, BarColumn(), done, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def update_line(row: dict[str, Any], steps: int) -> str:
    """Format an update's metrics as one line."""
    accuracy = "" if row["accuracy"] is None else f"  accuracy {row['accuracy']:.2f}"
    held_out = f"  held-out {row['held_out']:.2f}" if "held_out" in row else ""
    divergence = f"  KL {row['divergence']:.2g}" if "divergence" in row else ""
    return (
        f"update {row['update']:>2}/{steps}  entropy {row['entropy']:.4f} nats"
        f"{divergence}{accuracy}{held_out}"
        f"  length {row['mean_length']:.1f}  ended {row['ended']:.0%}"
        f"  {row['tokens_per_s']:.0f} tokens/s  peak {row['peak_memory_gib']:.2f} GiB"
        f"  {row['sampling_s'] + row['training_s']:.1f} s"
    )
