"""Where progress and tables go."""

import os
from contextlib import suppress

from rich.console import Console


class Terminal(Console):
    """A Console that nobody may read any more (a pipe to head, say): the work goes on, unseen."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with suppress(OSError, ValueError):  # what is left in the file would fail at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
