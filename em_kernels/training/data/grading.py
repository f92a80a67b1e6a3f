"""Grading of completions, which are untrusted: they are parsed in workers with limits."""

import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import combinations
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, get_args

from pebble import ProcessPool

from ..interrupts import StopRequest
from . import math_verify_grading, qwen25_grading
from .math_verify_grading import SHORT, STEP_S, Answer, final_answer, firsts, read, same

GraderName: TypeAlias = Literal["math-verify", "qwen25"]
GRADERS: tuple[GraderName, ...] = get_args(GraderName)
_RULES = dict(zip(GRADERS, (math_verify_grading, qwen25_grading), strict=True))
KILL_S = 5 * STEP_S  # limit of a worker for one pair
WORKERS = 2  # processes that compare answers
WORKER_BYTES = 200 << 20  # what each takes, and its limit beyond that of its imports


class Grader(AbstractContextManager["Grader"]):
    """Compares completions with answers and with each other; workers start when first needed."""

    _pool: ProcessPool | None = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, whatever they are doing."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def grade(
        self,
        pairs: Sequence[tuple[str, str | None]],
        on_done: Callable[[int], object] = lambda count: None,
        by: GraderName = "math-verify",
    ) -> list[bool]:
        """Grade (completion, answer) pairs; on_done is called with the number just graded.

        Without an answer, or where a worker dies or takes too long, a completion is wrong.
        """
        right, hard = [False] * len(pairs), dict[tuple, list[int]]()
        for i, pair in enumerate(pairs):
            found = _RULES[by].question(*pair)
            if isinstance(found, bool):
                right[i] = found
                on_done(1)
            else:
                hard.setdefault(found, []).append(i)
        for question, equal in self._ask(_RULES[by].equal, list(hard)):
            for i in hard[question]:
                right[i] = bool(equal)
            on_done(len(hard[question]))
        return right

    def agreement(self, groups: Sequence[Sequence[str]]) -> list[tuple[int, float]]:
        """Return per prompt the index of the first completion with the commonest answer, and its
        share. Completions without box and number are one answer, unless they are short.
        """

        def answer_of(text: str) -> Answer:
            answer = final_answer(text)
            return read(text if answer is None and len(text) <= SHORT else answer)

        answers = [tuple(map(answer_of, group)) for group in groups]
        first = {group: firsts(group, in_worker=False) for group in answers}
        hard = [g for g in first if any(same(a, b) is None for a, b in combinations(set(g), 2))]
        for (group,), found in self._ask(firsts, [(group,) for group in hard]):
            first[group] = found or first[group]
        results = []
        for group in answers:
            ((index, count),) = Counter(first[group]).most_common(1) or [(0, 0)]
            results.append((index, count / max(len(group), 1)))
        return results

    def _ask(self, function: Callable, questions: Sequence[tuple]) -> Iterator[tuple[tuple, Any]]:
        """Yield (arguments, result) as workers call a function; None if the worker died of it."""
        pending = dict.fromkeys(questions)
        for _ in range(3):  # A worker that dies between two questions breaks its pool.
            if not pending:
                return
            if self._pool is None or not self._pool.active:
                self.close()
                workers = min(WORKERS, os.cpu_count() or 1)
                self._pool = ProcessPool(workers, initializer=_limit, context=_Context())
                with StopRequest(patient=True) as stop:  # An interrupted start leaves a worker.
                    is_active = self._pool.active  # Reading it starts the workers.
                if stop.requested:
                    signal.raise_signal(stop.requested)
                if not is_active:
                    continue
            with suppress(RuntimeError, TimeoutError):  # The pool breaks, or has lost a question.
                schedule = partial(self._pool.schedule, function, timeout=KILL_S)
                asked: dict[Future, Any] = {schedule(args=q): q for q in pending}
                for future in as_completed(asked, KILL_S * (len(pending) + 10)):
                    error = future.exception()
                    if not isinstance(error, BrokenProcessPool):
                        del pending[asked[future]]
                        yield asked[future], None if error else future.result()
            if pending:
                self.close()
        if pending:
            raise RuntimeError("the worker processes that compare answers do not start")


class _Worker(SpawnProcess):
    """A process that ignores Ctrl-C from its start, and does not run the user's main module."""

    @staticmethod
    def _Popen(process: Any) -> Any:
        main = sys.modules["__main__"]
        resource_tracker.ensure_running()  # In Python 3.11 its start unblocks SIGINT.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process)  # type: ignore[attr-defined]
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    Process = _Worker


def _limit() -> None:
    """Silence a new worker, and limit its memory beyond what its imports take."""
    import math_verify  # noqa: F401

    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that it also acts within long C code
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # no /proc, or a lower limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bound = pages * resource.getpagesize() + WORKER_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
