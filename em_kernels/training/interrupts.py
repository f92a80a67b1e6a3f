"""Stopping at a safe point on Ctrl-C or SIGTERM, and saying what failed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised while the weights are those of a finished update."""


class StopRequest:
    """A context that defers the first Ctrl-C or SIGTERM to the next check(); a second acts at once.

    A patient one defers all: one Ctrl-C arrives twice, from the terminal and from the launcher.
    """

    def __init__(self, patient: bool = False) -> None:
        self.requested, self.patient = 0, patient

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self.patient:
            raise KeyboardInterrupt
        self.requested = number

    def __enter__(self) -> "StopRequest":
        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set by Python

    def check(self) -> None:
        if self.requested:
            raise Interrupted("interrupted")


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Label unexpected exceptions for cli.py with what was being done; the innermost counts."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "doing"):
            error.doing = what  # type: ignore[attr-defined]
        raise
