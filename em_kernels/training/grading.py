"""Is a completion's final answer the known one? Numbers by value, anything else by its text."""

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)")


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


def _value(text: str) -> Decimal | None:
    try:
        value = Decimal(text.strip().strip("$").replace(",", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None
