r"""Grading by the rules of Qwen2.5-Math's evaluation, which gave the paper's figures.

The answer is in the last \boxed{}, else after "answer is", else the last number. Two answers are
equal as texts, as numbers within 1e-4 of each other or of 100 times each other, part by part, or as
expressions, which math-verify's parser reads.
"""

import cmath
import math
import re
from contextlib import suppress
from typing import Any

from .math_verify_grading import LONGEST, MINUS, STEP_S, TEXT, UNIT, parsed, powers_of_ten

TOLERANCE = 1e-4  # relative

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d*)\.?\d*(?:e[+-]?\d{1,3})?")
_NORMAL = {  # what is replaced in an answer before it is compared
    MINUS: "-",
    r"\{,\}": ",",
    r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\?\$|(?<!\\)\\[,;:! ()\[\]]": "",
    r"\\?%|\^\{?\\circ\}?|°": "",
    r"[dt]frac": "frac",
    r"^[\s:]+|[\s./]+$": "",
    r"(?<=\S)(?:\s|~)*" + UNIT: "",
    TEXT: r"\1",
    r"^[a-zA-Z]\w?\s*=(?!.*=)|^[a-zA-Z]\s*\\(?:in|to)(?![a-z])": "",
    r"^\s+|\s+$|\n\s*": "",
}


def question(text: str, answer: str | None) -> bool | tuple[str, str]:
    """Compare a completion with an answer: return True or False where that is certain, else the
    arguments of `equal`.
    """
    known, found = normalised(answer or ""), normalised(answer_of(text))
    verdict = _same(known, found)
    return (known, found) if verdict is None else verdict


def answer_of(text: str) -> str:
    r"""Return what the rules take for a completion's answer; a last \boxed{} may be cut off."""
    hoped, found, _ = text.partition("final answer is $")[2].partition("$. I hope")
    if found:  # how Minerva's worked examples end
        return hoped
    _, found, rest = text.rpartition("boxed")
    if found:
        return _braced(rest)
    for words in ("he answer is", "final answer is"):
        _, found, rest = text.rpartition(words)
        if found:
            return rest
    numbers = re.findall(r"-?\d*\.?\d+", text.replace(",", ""))
    return numbers[-1] if numbers else ""


def _braced(text: str) -> str:
    """Return the content of the braces that a text begins with, else the text up to a $."""
    if not text.lstrip().startswith("{"):
        return text.partition("$")[0]
    text = text.lstrip()[1:]
    depth = 1
    for i, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return text[:i]
    return text


def normalised(answer: str) -> str:
    """Return an answer without units, percent and dollar signs, and other marks of layout."""
    if len(answer) <= LONGEST:
        for pattern, replacement in _NORMAL.items():
            answer = re.sub(pattern, replacement, answer)
    return answer


def _same(known: str, found: str) -> bool | None:
    """Return True or False if equality is certain without a parser, else None."""
    texts = ["".join(answer.split()).casefold() for answer in (known, found)]
    if "" in texts or texts[0] == texts[1]:
        return "" not in texts
    if max(map(len, texts)) > LONGEST:
        return False
    if re.fullmatch("[A-E]", known):  # multiple choice
        return re.findall(r"\b[A-E]\b", found.upper())[-1:] == [known]
    if all(map(_NUMBER.fullmatch, texts)):
        with suppress(ValueError):  # a point alone
            mine, other = (float(text.replace(",", "")) for text in texts)
            scaled = (mine / 100, mine, 100 * mine)
            return any(math.isclose(x, other, rel_tol=TOLERANCE) for x in scaled)
    return False if all(len(text) > 2 and text.isalpha() for text in texts) else None


def equal(known: str, found: str) -> bool:
    """Return True if two normalised answers are equal; in a worker only."""
    if (verdict := _same(known, found)) is not None:
        return verdict
    parts = _parts(known), _parts(found)
    if len(parts[0]) == len(parts[1]) > 1:
        return all(map(equal, *parts))
    with suppress(BaseException):
        from math_verify.utils import timeout

        return timeout(STEP_S)(_equal_expressions)(*map(_expression, (known, found)))
    return False


def _parts(answer: str) -> list[str]:
    """Split an answer at its commas, also within brackets that enclose all of it."""
    if re.fullmatch(r"[(\[].*[)\]]", answer) and len(parts := _split(answer[1:-1])) > 1:
        return parts
    return _split(answer)


def _split(text: str) -> list[str]:
    """Split a text at the commas that are in no brackets; in none if brackets do not match."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return [text]
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _expression(answer: str) -> Any:
    """Parse a normalised answer; StopIteration if it cannot be."""
    return next(x for x in parsed(rf"\boxed{{{powers_of_ten(answer)}}}") if not isinstance(x, str))


def _equal_expressions(known: Any, found: Any) -> bool:
    from sympy import Eq, Expr, MatrixBase, simplify

    if known == found:
        return True
    if isinstance(known, Eq) and isinstance(found, Eq):
        sides = known.lhs - known.rhs, found.lhs - found.rhs
        return bool(simplify(sides[0] - sides[1]) == 0 or simplify(sides[0] + sides[1]) == 0)
    if isinstance(known, MatrixBase) and isinstance(found, MatrixBase):
        return known.shape == found.shape and all(map(_equal_expressions, known, found))
    if not (isinstance(known, Expr) and isinstance(found, Expr)):
        return False
    if known.is_number and found.is_number:
        return cmath.isclose(complex(known), complex(found), rel_tol=TOLERANCE)
    return bool(simplify(known - found) == 0)
