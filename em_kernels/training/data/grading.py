"""Grading of completions, which are untrusted: math-verify runs in workers with limits."""

import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, partial
from itertools import combinations
from math import floor, log10
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pebble import ProcessPool

from ..interrupts import StopRequest

STEP_S = 3  # math-verify's limit to parse an answer, and to compare two
KILL_S = 5 * STEP_S  # limit of a worker, which takes three steps for a pair
WORKER_BYTES = 2**30  # memory limit beyond what a worker holds before its first answer
LONGEST = 2000  # characters of an answer; MATH-500's and Minerva's have at most 210
SHORT = 100  # characters of a completion that may be an answer as a whole
MINUS = "\N{MINUS SIGN}"

_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+(?=\S))")
_UNBRACED = re.compile(r"[^\s$]*")
# A multiple-choice option, with or without its text.
_OPTION = re.compile(
    r"\\boxed\{(?:\\(?:text\w*|math\w+|mbox)\s*\{)?\s*(?:\(([A-J])\)|([A-J])[.:)])"
)
_EXPONENT = r"[eE][+-]?\d{1,3}(?!\d)"
_DIGITS = rf"(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+|{_EXPONENT})?"
_NUMBER = re.compile(rf"(?:(?<!\w)-)?(?:{_DIGITS}|(?<![\w.])\.\d+)")
_TEXT = r"\\(?:text\w*|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}"
_UNIT = r"\\(?:text|mathrm|mbox)\s*\{(?![eij]\})[^{}]*\}(?:\^\{?\d\}?)?$"
_CLEANED = {  # Replaced before math-verify, which would misread these.
    MINUS: "-",
    r"^(?:\\?\$|\\\(|\\\[|\s)+|(?:\\?\$|\\\)|\\\]|(?<=[^.])\.|\s)+$": "",
    r"\\displaystyle\b\s*": "",
    r"\\varnothing(?![a-zA-Z])|\N{EMPTY SET}": r"\\emptyset",
    rf"^{_TEXT}$": r"\1",
    r"(?<=[a-zA-Z\d})\]])(?<![a-zA-Z]{3}\})(?:\s|~|\\[,;:! ])*" + _UNIT: "",  # not after words
    r"^\+|^[A-Za-z]\s*\\in\b": "",  # x \in [0, 1] is the set [0, 1]
    r"(?<=\d)(?:\\[,!; ]|\{,\}|~|\s)+(?=\d{3}(?![\d/]))": "",  # 1\,000
    r"(?<=\d)\.(?=/)": "",  # 1./3
    r"^(-?\d+)\s+(\d+)/(\d+)$": r"\1\\frac{\2}{\3}",  # 1 1/2
    r"^(-?[\d.,]+)\s*(?:\\times|\\cdot|[×*])\s*10\s*\^\s*\{?([+-]?\d{1,3})\}?$": r"\1e\2",
}


def final_answer(text: str) -> str | None:
    r"""Return the content of the last \boxed{}, or else the last number."""
    if (content := boxed(text)) is not None:
        return content
    text = re.sub(r"(?<==)\s*-\s*(?=[\d.])", "-", text.replace(MINUS, "-"))  # x = - 5
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def boxed(text: str) -> str | None:
    r"""Return the content of the last \boxed{}, \fbox{} or \boxed 5; None if it is cut off."""
    if not (boxes := list(_BOX.finditer(text))):
        return None
    depth, begin = 1, boxes[-1].end()
    if not boxes[-1][0].endswith("{"):
        return _UNBRACED.match(text, begin)[0].rstrip(".,;:") or None  # type: ignore[index]
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i].strip()
    return None


class _Answer(NamedTuple):
    key: Fraction | str  # Answers with equal keys are equal; "" is no answer.
    latex: str  # what math-verify parses; "" if it is too long


def _read(answer: str | None) -> _Answer:
    """Parse the content of a box, or a known answer."""
    answer = answer or ""
    if len(answer) > LONGEST:
        return _Answer("".join(answer.split()), "")
    for pattern, replacement in _CLEANED.items():
        answer = re.sub(pattern, replacement, answer)
    with suppress(ValueError, ZeroDivisionError):  # thousands of digits, 1.5/2, 1/0
        if _NUMBER.fullmatch(answer):
            latex = re.sub("[eE](.+)", r"\\times10^{\1}", answer)  # Not Euler's number.
            return _Answer(Fraction(answer.replace(",", "")), rf"\boxed{{{latex}}}")
    key = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(_TEXT, r"\1", answer))
    key = re.sub(r"^\(?([A-Za-z])\)?$", r"\1", key).replace("infinity", r"\infty")
    return _Answer(key.casefold() if _letters(key) > 2 else key, rf"\boxed{{{answer}}}")


def _letters(key: Fraction | str) -> int:
    """Count a key's letters; 0 if it has other characters. Over two are a word, not variables."""
    return len(key) if isinstance(key, str) and key.isalpha() else 0


def _answer_of(text: str) -> _Answer:
    r"""Read a completion's last \boxed{}, else its last number, or what math-verify finds in it."""
    if _BOX.search(text):
        return _read(boxed(text))
    if not re.search(r"[$\\%]", text):
        return _read(final_answer(text))
    end = text[-LONGEST:]
    if len(text) > LONGEST:
        end = end.partition("\n")[2] or end  # Whole lines, as $...$ is within a line.
    return _Answer(end, end)


def _same(known: _Answer, found: _Answer) -> bool | None:
    """Return True or False if equality is certain without math-verify, else None."""
    keys = known.key, found.key
    if "" in keys or known.key == found.key:
        return "" not in keys
    if _letters(known.key) == 1:  # math-verify takes a and A for the same.
        option = _OPTION.match(found.latex)
        if option or _letters(found.key) == 1:
            return option is not None and known.key in option.groups()
    certain = all(isinstance(key, Fraction) or _letters(key) > 2 for key in keys)
    return False if certain or not (known.latex and found.latex) else None


WORKERS, WORKER_BYTES = 2, 200 << 20  # processes that compare answers, and what each takes


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
    ) -> list[bool]:
        """Grade (completion, answer) pairs; on_done is called with the number just graded.

        Without an answer, or where a worker dies or takes too long, a completion is wrong.
        """
        right = [False] * len(pairs)
        hard: dict[tuple[_Answer, ...], list[int]] = {}
        for i, (text, answer) in enumerate(pairs):
            known, found = _read(answer), _answer_of(text)
            # A completion that is the known answer alone needs no box.
            same = True if known.key == _read(text).key != "" else _same(known, found)
            if same is None:
                hard.setdefault((known, found), []).append(i)
            else:
                right[i] = same
                on_done(1)
        for pair, first in self._ask(list(hard)):
            for i in hard[pair]:
                right[i] = first == [0, 0]  # the second equals the first
            on_done(len(hard[pair]))
        return right

    def agreement(self, groups: Sequence[Sequence[str]]) -> list[tuple[int, float]]:
        """Return per prompt the index of the first completion with the commonest answer, and its
        share. Completions without box and number are one answer, unless they are short.
        """

        def answer_of(text: str) -> _Answer:
            answer = final_answer(text)
            return _read(text if answer is None and len(text) <= SHORT else answer)

        answers = [tuple(map(answer_of, group)) for group in groups]
        firsts = {group: _firsts(group, in_worker=False) for group in answers}
        hard = [g for g in firsts if any(_same(a, b) is None for a, b in combinations(set(g), 2))]
        firsts |= {group: first for group, first in self._ask(hard) if first}
        results = []
        for group in answers:
            ((first, count),) = Counter(firsts[group]).most_common(1) or [(0, 0)]
            results.append((first, count / max(len(group), 1)))
        return results

    def _ask(
        self, questions: Sequence[tuple[_Answer, ...]]
    ) -> Iterator[tuple[tuple[_Answer, ...], list[int] | None]]:
        """Yield (question, its _firsts) as workers answer; None if the worker died of it."""
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
                schedule = partial(self._pool.schedule, _firsts, timeout=KILL_S)
                asked: dict[Future, Any] = {schedule(args=(q,)): q for q in pending}
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


def _firsts(answers: Sequence[_Answer], in_worker: bool = True) -> list[int]:
    """Return for each answer the index of the first equal one; only workers call math-verify."""
    end = time.monotonic() + KILL_S - 2 * STEP_S
    first: dict[Fraction | str, int] = {}

    def same(j: int, i: int) -> bool:
        known = _same(answers[j], answers[i])
        if known is None and in_worker and time.monotonic() < end:
            return _verified(answers[j].latex, answers[i].latex)
        return bool(known)

    for i, answer in enumerate(answers):
        if answer.key not in first:
            heads = dict.fromkeys(first.values())
            first[answer.key] = next((j for j in heads if same(j, i)), i)
    return [first[answer.key] for answer in answers]


@lru_cache(maxsize=32)
def _parsed(latex: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    config = LatexExtractionConfig(boxed_match_priority=0)
    if not latex.startswith("\\boxed{"):
        return parse(latex, [config, ExprExtractionConfig()], parsing_timeout=STEP_S)
    letters = re.sub(r"\\[a-zA-Z]+", "", latex)[1:-1]  # c is a unit in 3 c, not in a c.
    units = re.fullmatch(r"[^a-zA-Z+]*\d[^a-zA-Z+]*[a-zA-Z][a-zA-Z .]*", letters) is not None
    config = replace(config, normalization_config=replace(config.normalization_config, units=units))
    return parse(latex, [config], extraction_mode="first_match", parsing_timeout=STEP_S)


def _cases(side: list[Any]) -> dict[str, set[str]]:
    """Return the cases in which each one-letter symbol is written; math-verify lowers them."""
    names = {str(x) for term in side for x in getattr(term, "free_symbols", ())}
    written = re.sub(r"\\[a-zA-Z]+", "", "".join(term for term in side if isinstance(term, str)))
    return {name: {c for c in written if c.lower() == name} for name in names if len(name) == 1}


def _is_number(term: Any, kinds: tuple[type, ...] = (object,)) -> bool:
    """Return True for a number made of these kinds, and without powers that take for ever."""
    from sympy import Expr, Pow, postorder_traversal

    if not isinstance(term, Expr) or not term.is_number:
        return False
    return all(
        isinstance(x, kinds) and (not isinstance(x, Pow) or abs(x.exp.evalf()) < LONGEST)
        for x in postorder_traversal(term)
    )


def _verified(known: str, found: str) -> bool:
    """Compare two answers by math-verify; False if it fails."""
    from math_verify import verify
    from sympy import Add, Float, Mul, Number, Pow

    with suppress(BaseException):
        both = _parsed(known), _parsed(found)
        mine, other = (_cases(side) for side in both)
        if any(mine[name].isdisjoint(other[name]) for name in mine.keys() & other.keys()):
            return False
        terms = [term for side in both for term in side if hasattr(term, "atoms")]
        exact = [term.doit() for term in terms if _is_number(term, (Add, Mul, Number, Pow))]
        rational = len(terms) == len(exact) == 2 and all(x.is_Rational for x in exact)
        if rational and "%" not in known + found:  # 50 % may be 50 or 0.5.
            return bool(exact[0] == exact[1])
        sizes = [abs(x) for term in terms for x in term.atoms(Float) if x]
        numbers = [x.evalf() for x in terms if _is_number(x)]
        sizes += [abs(x) for x in numbers if isinstance(x, Float) and 0 < abs(x) < 1]
        digits = max([6, *(3 - floor(log10(x)) for x in sizes)])  # 4 digits or 6 decimals
        return verify(*both, digits, allow_set_relation_comp=True, timeout_seconds=STEP_S)
    return False
