"""Is a completion's final answer the known one? Numbers by value, words by their letters, other
mathematics by math-verify. Completions are untrusted, so that runs in worker processes, within
bounds of time and memory.
"""

import os
import re
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from math import floor, log10
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pebble import ProcessPool

STEP_S = 3  # of math-verify: to parse an answer, to compare two
KILL_S = 5 * STEP_S  # a pair takes three steps
WORKER_BYTES = 2**30  # beyond what a worker holds before its first answer
LONGEST = 2000  # characters; those of MATH-500 and Minerva have at most 210
SHORT = 100  # characters
MINUS = "\N{MINUS SIGN}"

_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+(?=\S))")
_UNBRACED = re.compile(r"[^\s$]*")
# an option of a multiple choice, and its text
_OPTION = re.compile(
    r"\\boxed\{(?:\\(?:text\w*|math\w+|mbox)\s*\{)?\s*(?:\(([A-J])\)|([A-J])[.:)])"
)
_EXPONENT = r"[eE][+-]?\d{1,3}(?!\d)"
_DIGITS = rf"(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+|{_EXPONENT})?"
_NUMBER = re.compile(rf"(?:(?<!\w)-)?(?:{_DIGITS}|(?<![\w.])\.\d+)")
_TEXT = r"\\(?:text\w*|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}"
_UNIT = r"\\(?:text|mathrm|mbox)\s*\{(?![eij]\})[^{}]*\}(?:\^\{?\d\}?)?$"
_CLEANED = {  # before math-verify, which has other ideas of these
    MINUS: "-",
    r"^(?:\\?\$|\\\(|\\\[|\s)+|(?:\\?\$|\\\)|\\\]|(?<=[^.])\.|\s)+$": "",
    r"\\displaystyle\b\s*": "",
    r"\\varnothing(?![a-zA-Z])|\N{EMPTY SET}": r"\\emptyset",
    rf"^{_TEXT}$": r"\1",
    r"(?<=[a-zA-Z\d})\]])(?<![a-zA-Z]{3}\})(?:\s|~|\\[,;:! ])*" + _UNIT: "",  # not of words
    r"^\+|^[A-Za-z]\s*\\in\b": "",  # x \in [0, 1] as the set
    r"(?<=\d)(?:\\[,!; ]|\{,\}|~|\s)+(?=\d{3}(?![\d/]))": "",  # 1\,000
    r"(?<=\d)\.(?=/)": "",  # 1./3
    r"^(-?\d+)\s+(\d+)/(\d+)$": r"\1\\frac{\2}{\3}",  # 1 1/2
    r"^(-?[\d.,]+)\s*(?:\\times|\\cdot|[×*])\s*10\s*\^\s*\{?([+-]?\d{1,3})\}?$": r"\1e\2",
}


def final_answer(text: str) -> str | None:
    r"""The content of the last \boxed{}, or else the last number."""
    if (content := boxed(text)) is not None:
        return content
    text = re.sub(r"(?<==)\s*-\s*(?=[\d.])", "-", text.replace(MINUS, "-"))  # x = - 5
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _said(text: str) -> str | None:
    """The final answer, or of a short text without one all of it."""
    found = final_answer(text)
    return text if found is None and len(text) <= SHORT else found


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{}, \fbox{} or, without braces, \boxed 5; None where there is
    none, or it was cut off.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
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
    key: Fraction | str  # equal keys, equal answers; "" for none
    latex: str  # for math-verify; "" if too long


def _read(answer: str | None) -> _Answer:
    """Parse the content of a box, or a known answer."""
    answer = answer or ""
    if len(answer) > LONGEST:
        return _Answer("".join(answer.split()), "")
    for pattern, replacement in _CLEANED.items():
        answer = re.sub(pattern, replacement, answer)
    with suppress(ValueError, ZeroDivisionError):  # thousands of digits, 1.5/2, 1/0
        if _NUMBER.fullmatch(answer):
            latex = re.sub("[eE](.+)", r"\\times10^{\1}", answer)  # no multiple of Euler's e
            return _Answer(Fraction(answer.replace(",", "")), rf"\boxed{{{latex}}}")
    key = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(_TEXT, r"\1", answer))
    key = re.sub(r"^\(?([A-Za-z])\)?$", r"\1", key).replace("infinity", r"\infty")
    return _Answer(key.casefold() if _is_word(key) else key, rf"\boxed{{{answer}}}")


def _is_word(key: Fraction | str) -> bool:
    """Rather than a product of variables: even is not neve."""
    return isinstance(key, str) and len(key) > 2 and key.isalpha()


def _answer_of(text: str) -> _Answer:
    r"""A completion's last \boxed{}; without one its last number, or what math-verify finds."""
    if _BOX.search(text):
        return _read(boxed(text))
    if not re.search(r"[$\\%]", text):
        return _read(final_answer(text))
    end = text[-LONGEST:]
    if len(text) > LONGEST:
        end = end.partition("\n")[2] or end  # a line's start, as $ opens and closes within one
    return _Answer(end, end)


def _same(known: _Answer, found: _Answer) -> bool | None:
    """True or False where equality is certain without math-verify; else None."""
    keys = known.key, found.key
    if "" in keys or known.key == found.key:
        return "" not in keys
    if _is_letter(known.key):  # math-verify makes no difference between a and A
        option = _OPTION.match(found.latex)
        if option or _is_letter(found.key):
            return option is not None and known.key in option.groups()
    certain = all(isinstance(key, Fraction) or _is_word(key) for key in keys)
    return False if certain or not (known.latex and found.latex) else None


def _is_letter(key: Fraction | str) -> bool:
    return isinstance(key, str) and len(key) == 1 and key.isalpha()


class Grader:
    """Compares completions with answers, and with each other.

    A context manager, or to be closed. Its workers start with the first answer that is neither a
    number nor a word.
    """

    _pool: ProcessPool | None = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, whatever they are at."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def grade(
        self,
        pairs: Sequence[tuple[str, str | None]],
        on_done: Callable[[int], None] | None = None,
    ) -> list[bool]:
        """Grade completions against the answers beside them; wrong where the answer is None.

        A completion that takes a worker too long, too much memory, or down is wrong too.

        Args:
            on_done: called with the number just graded.
        """
        done = on_done or (lambda count: None)
        right = [False] * len(pairs)
        hard: dict[tuple[_Answer, ...], list[int]] = {}
        for i, (text, answer) in enumerate(pairs):
            known, found = _read(answer), _answer_of(text)
            same = True if known.key == _read(text).key != "" else _same(known, found)
            if same is None:
                hard.setdefault((known, found), []).append(i)
            else:
                right[i] = same
                done(1)
        for pair, first in self._ask(list(hard)):
            for i in hard[pair]:
                right[i] = first == [0, 0]
            done(len(hard[pair]))
        return right

    def agreement(self, groups: Sequence[Sequence[str]]) -> list[tuple[int, float]]:
        """Majority vote per prompt: index of the first completion with the most frequent final
        answer, and the share that has it. Completions without an answer count as one answer; a
        short text without box and number, such as "Friday", is its own answer.
        """
        answers = [tuple(_read(_said(text)) for text in group) for group in groups]
        firsts = {group: _firsts(group, asked=False) for group in answers}
        hard = [g for g in firsts if any(_same(a, b) is None for a, b in combinations(set(g), 2))]
        firsts |= {group: first for group, first in self._ask(hard) if first}
        results = []
        for group in answers:
            counts = Counter(firsts[group])
            first, count = max(counts.items(), key=lambda item: item[1], default=(0, 0))
            results.append((first, count / max(len(group), 1)))
        return results

    def _ask(
        self, questions: Sequence[tuple[_Answer, ...]]
    ) -> Iterator[tuple[tuple[_Answer, ...], list[int] | None]]:
        """_firsts of each question as they come; None where it took its worker down."""
        left = dict.fromkeys(questions)
        for _ in range(3):  # a worker that dies between questions takes its pool along
            if not left:
                return
            if self._pool is None or not self._pool.active:
                self.close()
                workers = min(2, os.cpu_count() or 1)  # 0.2 GB each
                self._pool = ProcessPool(workers, initializer=_limit, context=_Context())
                with _ctrl_c_later():  # or a worker is left behind that the pool does not know of
                    if not self._pool.active:  # which starts them
                        continue
            with suppress(RuntimeError, TimeoutError):  # it breaks now, or has lost a question
                asked: dict[Future, tuple[_Answer, ...]] = {
                    self._pool.schedule(_firsts, (question,), timeout=KILL_S): question
                    for question in left
                }
                for future in as_completed(asked, KILL_S * (len(left) + 10)):
                    error = future.exception()
                    if not isinstance(error, BrokenProcessPool):
                        del left[asked[future]]
                        yield asked[future], None if error else future.result()
            if left:
                self.close()
        if left:
            raise RuntimeError("the workers that compare answers do not start")


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Ctrl-C acts when this is over, whichever thread it arrives in."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = list[int]()
    before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


class _Worker(SpawnProcess):
    """Leaves Ctrl-C to this process from its first moment, and does not import the user's main
    module, which may do more than define.
    """

    @staticmethod
    def _Popen(process: Any) -> Any:
        main = sys.modules["__main__"]
        resource_tracker.ensure_running()  # started later, it would unblock SIGINT (Python 3.11)
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
    """Start a worker: no output, and a memory bound beyond what its imports take."""
    import math_verify  # noqa: F401

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # also within one long step of C
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # there is no /proc; a lower limit is there
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bound = pages * resource.getpagesize() + WORKER_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def _firsts(answers: Sequence[_Answer], asked: bool = True) -> list[int]:
    """Map each answer to the first equal one, as far as time allows; only a worker may ask
    math-verify.
    """
    end = time.monotonic() + KILL_S - 2 * STEP_S
    first: dict[Fraction | str, int] = {}

    def same(j: int, i: int) -> bool:
        known = _same(answers[j], answers[i])
        if known is None and asked and time.monotonic() < end:
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
    letters = re.sub(r"\\[a-zA-Z]+", "", latex)[1:-1]  # c is a unit in 3 c, not in a c
    units = re.fullmatch(r"[^a-zA-Z+]*\d[^a-zA-Z+]*[a-zA-Z][a-zA-Z .]*", letters) is not None
    config = replace(config, normalization_config=replace(config.normalization_config, units=units))
    return parse(latex, [config], extraction_mode="first_match", parsing_timeout=STEP_S)


def _cases(side: list[Any]) -> dict[str, set[str]]:
    """How each symbol is written: math-verify makes them all small."""
    names = {str(x) for term in side for x in getattr(term, "free_symbols", ())}
    written = re.sub(r"\\[a-zA-Z]+", "", "".join(term for term in side if isinstance(term, str)))
    return {name: {c for c in written if c.lower() == name} for name in names if len(name) == 1}


def _is_number(term: Any, kinds: tuple[type, ...] = (object,)) -> bool:
    """Made of such parts alone, and no tower of powers, which would take for ever to compute."""
    from sympy import Expr, Pow, postorder_traversal

    if not isinstance(term, Expr) or not term.is_number:
        return False
    return all(  # from the inside out
        isinstance(x, kinds) and (not isinstance(x, Pow) or abs(x.exp.evalf()) < LONGEST)
        for x in postorder_traversal(term)
    )


def _verified(known: str, found: str) -> bool:
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
        if rational and "%" not in known + found:  # 50 % may be 50 or a half
            return bool(exact[0] == exact[1])
        sizes = [abs(x) for term in terms for x in term.atoms(Float) if x]
        numbers = [x.evalf() for x in terms if _is_number(x)]
        sizes += [abs(x) for x in numbers if isinstance(x, Float) and 0 < abs(x) < 1]
        return verify(
            *both,
            float_rounding=max([6, *(3 - floor(log10(x)) for x in sizes)]),  # four digits, or six
            allow_set_relation_comp=True,
            timeout_seconds=STEP_S,
        )
    return False
