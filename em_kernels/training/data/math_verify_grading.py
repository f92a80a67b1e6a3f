"""Grading by math-verify: how answers are found and read, and what makes two of them equal."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from math import floor, log10
from typing import Any, NamedTuple

STEP_S = 3  # limit to parse an answer, and to compare two
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
TEXT = r"\\(?:text\w*|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}"
UNIT = r"\\(?:text|mathrm|mbox)\s*\{(?![eij]\})[^{}]*\}(?:\^\{?\d\}?)?$"
_CLEANED = {  # Replaced before math-verify, which would misread these.
    MINUS: "-",
    r"^(?:\\?\$|\\\(|\\\[|\s)+|(?:\\?\$|\\\)|\\\]|(?<=[^.])\.|\s)+$": "",
    r"\\displaystyle\b\s*": "",
    r"\\varnothing(?![a-zA-Z])|\N{EMPTY SET}": r"\\emptyset",
    rf"^{TEXT}$": r"\1",
    r"(?<=[a-zA-Z\d})\]])(?<![a-zA-Z]{3}\})(?:\s|~|\\[,;:! ])*" + UNIT: "",  # not after words
    r"^\+|^[A-Za-z]\s*\\in\b": "",  # x \in [0, 1] is the set [0, 1]
    r"(?<=\d)(?:\\[,!; ]|\{,\}|~|\s)+(?=\d{3}(?![\d/]))": "",  # 1\,000
    r"(?<=\d)\.(?=/)": "",  # 1./3
    r"^(-?\d+)\s+(\d+)/(\d+)$": r"\1\\frac{\2}{\3}",  # 1 1/2
    r"^(-?[\d.,]+)\s*(?:\\times|\\cdot|[×*])\s*10\s*\^\s*\{?([+-]?\d{1,3})\}?$": r"\1e\2",
}
_COMMAND = rf"{TEXT}|\\[a-zA-Z]+(?:\{{[a-zA-Z ]*\}})?"
_RELATION = r"\\[lg]e(?:q(?:slant)?)?(?![a-zA-Z])|[≤≥]"
_BOUND = re.compile(
    rf"\s*[a-zA-Z|\\](?:(?!{_RELATION})[^<>=])*(?:{_RELATION})\s*({_NUMBER.pattern})\s*"
)
_CONDITION = re.compile(r"\b(?:for|if|when|whenever|where|with|since|because|any|all|each|every)\b")


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


class Answer(NamedTuple):
    key: Fraction | str  # Answers with equal keys are equal; "" is no answer.
    latex: str  # what math-verify parses; "" if it is too long


def read(answer: str | None) -> Answer:
    """Parse the content of a box, or a known answer."""
    answer = answer or ""
    if len(answer) > LONGEST:
        return Answer("".join(answer.split()), "")
    for pattern, replacement in _CLEANED.items():
        answer = re.sub(pattern, replacement, answer)
    with suppress(ValueError, ZeroDivisionError):  # thousands of digits, 1.5/2, 1/0
        if _NUMBER.fullmatch(answer):
            return Answer(Fraction(answer.replace(",", "")), rf"\boxed{{{powers_of_ten(answer)}}}")
    key = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(TEXT, r"\1", answer))
    key = re.sub(r"^\(?([A-Za-z])\)?$", r"\1", key).replace("infinity", r"\infty")
    return Answer(key.casefold() if _letters(key) > 2 else key, rf"\boxed{{{answer}}}")


def powers_of_ten(text: str) -> str:
    """Write 4.5e33 as LaTeX, in which its e would be Euler's number."""
    return re.sub(r"(?<=[\d.])[eE]([+-]?\d{1,3})(?!\d)", r"\\times10^{\1}", text)


def _letters(key: Fraction | str) -> int:
    """Count a key's letters; 0 if it has other characters. Over two are a word, not variables."""
    return len(key) if isinstance(key, str) and key.isalpha() else 0


def answers_of(text: str) -> list[Answer]:
    r"""Read a completion's last \boxed{}. Without one, read its last number, or what math-verify
    finds in it, and what its last words state.
    """
    if _BOX.search(text):
        return [read(boxed(text))]
    end = text[-LONGEST:]
    if len(text) > LONGEST:
        end = end.partition("\n")[2] or end  # Whole lines, as $...$ is within a line.
    stated = [read(answer) for answer in _stated(end)]
    if not re.search(r"[$\\%]", text):
        return [read(final_answer(text)), *stated]
    end = powers_of_ten(end)
    return [Answer(end, end), *stated]


def _stated(end: str) -> Iterator[str]:
    """Yield what follows a last "answer is" that ends the text, unless it is a sentence; and n of
    a last "$C \\le n$" that is not a condition.
    """
    end = end.rstrip().removesuffix("I hope it is correct.").rstrip(" .\n")
    _, found, answer = end.rpartition("answer is")
    answer = answer.lstrip(": ")
    words = re.search(r"[a-zA-Z]{3}|\n", re.sub(_COMMAND, "", answer))
    if found and not (words and re.search(r"\s", answer)):
        yield answer
        return
    before, maths, after = ["", "", "", *re.split(r"\$|\\[()\[\]]", end)][-3:]
    condition = _CONDITION.search(re.split(r"[.;\n]", before)[-1])
    if (bound := _BOUND.fullmatch(maths)) and not condition and not re.search(r"[\d\\]", after):
        yield bound[1]


def same(known: Answer, found: Answer) -> bool | None:
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


def question(text: str, answer: str | None) -> bool | tuple[Answer, ...]:
    """Compare a completion with an answer: return True or False where that is certain, else the
    arguments of `equal`.
    """
    known = read(answer)
    if known.key == read(text).key != "":  # A completion that is the answer alone needs no box.
        return True
    found = {a: same(known, a) for a in answers_of(text)}
    if True in found.values():
        return True
    return (known, *(a for a in found if found[a] is None)) if None in found.values() else False


def equal(known: Answer, *found: Answer) -> bool:
    """Return True if math-verify finds any answer equal to the known one; in a worker only."""
    return any(_verified(known.latex, answer.latex) for answer in found)


def firsts(answers: Sequence[Answer], in_worker: bool = True) -> list[int]:
    """Return for each answer the index of the first equal one; only workers call math-verify."""
    end = time.monotonic() + 3 * STEP_S
    first: dict[Fraction | str, int] = {}

    def alike(j: int, i: int) -> bool:
        known = same(answers[j], answers[i])
        if known is None and in_worker and time.monotonic() < end:
            return _verified(answers[j].latex, answers[i].latex)
        return bool(known)

    for i, answer in enumerate(answers):
        if answer.key not in first:
            heads = dict.fromkeys(first.values())
            first[answer.key] = next((j for j in heads if alike(j, i)), i)
    return [first[answer.key] for answer in answers]


@lru_cache(maxsize=32)
def parsed(latex: str) -> list[Any]:
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
    from sympy import Add, Float, Integer, Mul, Number, Pow, Rational, UnevaluatedExpr

    with suppress(BaseException):
        both = parsed(known), parsed(found)
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
        options = {"allow_set_relation_comp": True, "timeout_seconds": STEP_S}
        if verify(*both, digits, **options):
            return True
        # 50 % is 0.5 to math-verify; here it may be 50 as well.
        sign = UnevaluatedExpr(Rational(1, 100))
        terms = [[x for x in side if hasattr(x, "xreplace")] for side in both]
        signed = [any(x.has(sign) for x in side) for side in terms]
        plain = [[x.xreplace({sign: Integer(1)}) for x in side] for side in terms]
        return signed[0] != signed[1] and verify(*plain, digits, **options)
    return False
