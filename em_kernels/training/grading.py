"""Is a completion's final answer the known one? Numbers by value, anything else by its text."""

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?"
_NUMBER = re.compile(rf"(?:(?<!\w)-)?(?:{_DIGITS}|(?<![\w.])\.\d+)")


def final_answer(text: str) -> str | None:
    r"""The content of the last \boxed{}, or else the last number."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for i in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[begin:i].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def is_correct(text: str, answer: str) -> bool:
    """Whether the final answer of text equals answer."""
    found = final_answer(text)
    if found is None:
        return False
    left, right = _value(found), _value(answer)
    if left is not None and right is not None:
        return left == right
    return "".join(found.split()) == "".join(answer.split())


def _value(text: str) -> Fraction | None:
    number = text.strip().strip("$")
    if not _NUMBER.fullmatch(number):
        return None
    try:
        return Fraction(number.replace(",", ""))
    except (ValueError, ZeroDivisionError):  # thousands of digits, 1/0, 1.5/2
        return None
