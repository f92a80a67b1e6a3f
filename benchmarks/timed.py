"""transformers' Trainers whose steps are timed."""

import time

from transformers import Trainer


def timed(kind: type[Trainer]) -> type[Trainer]:
    """With times: of each training step, wall and CPU seconds."""

    class Timed(kind):
        def training_step(self, *arguments):
            start = time.perf_counter(), time.process_time()
            loss = super().training_step(*arguments)
            self.times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            return loss

    Timed.times = []
    return Timed
