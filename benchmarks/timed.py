"""Timing of the steps of a transformers Trainer."""

import time

from transformers import Trainer


def timed(kind: type[Trainer]) -> type[Trainer]:
    """Subclass a Trainer; its `times` gets the wall and CPU seconds of each training step."""

    class Timed(kind):
        def training_step(self, *arguments):
            start = time.perf_counter(), time.process_time()
            loss = super().training_step(*arguments)
            self.times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            return loss

    Timed.times = []
    return Timed
