"""The rules of qwen25; both graders on known answers of published sets, written in many ways."""

import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from training.evaluations import FOLDER
from training.lives import CHILDREN
from training.test_grading import boxed, cases

from em_kernels.training.data import grading
from em_kernels.training.data.grading import GRADERS, Grader
from em_kernels.training.data.problems import read_problems

RIGHT = cases(r"""
so \boxed{42} :: 42 | \boxed{1} or \boxed{2} at 3 :: 2 | \boxed 5$ :: 5 | \boxed{B. 42} :: B
\boxed{6 and it was cut :: 6 and it was cut | \boxed{\text{a new one}} 7 :: a new one
The answer is 5. :: 5 | the answer is: $\frac{1}{2}$. :: 0.5 | no answer but 1,234 :: 1234
The final answer is $2$. I hope it is correct. Not \boxed{3}. :: 2
3.1415 :: 3.1416 | \boxed{100} :: 1 | \boxed{0.5} :: 50 | \boxed{50\%} :: 0.5 | \boxed{50\%} :: 5000
\boxed{28801} :: 28800 | \boxed{1e5} :: 100,000 | \boxed{10{,}080} :: 10,\!080
\boxed{3.1416} :: \pi | \boxed{4.5\times10^{33}} :: 4.5e33 | \boxed{12\text{ cm}} :: 12
\boxed{x=5} :: 5 | \boxed{5} :: k = 5 | \boxed{EAST} :: \text{east} | \boxed{90^\circ} :: 90
\boxed{(1,0.5)} :: \left(1,\frac{1}{2}\right) | \boxed{[3,4)} :: (3,4] | \boxed{7y+1=5x} :: 5x-7y=1
\boxed{x^2-1} :: (x-1)(x+1) | \boxed{2\sin x\cos x} :: \sin(2x) | \boxed{\{2,1\}} :: \{1,2\}
\boxed{(1,3]\cup[5,6)} :: (1,3]\cup[5,6)
\boxed{\begin{pmatrix} 0.33333 \\ 2 \end{pmatrix}} :: \begin{bmatrix}1/3\\2\end{bmatrix}
""")
WRONG = cases(r"""
\boxed{5} :: -5 | \boxed{5} :: 6 | \boxed{1001} :: 1 | \boxed{3.14} :: \pi | \boxed{1,2} :: 12
\boxed{2} 3 :: 3 | The answer is 5, as 2 + 3 = 5. :: 5 | it is \frac{1}{2} :: \frac{1}{2}
no number :: 0 | \boxed{} :: 0 | \boxed{.} :: 0 | \boxed{NaN} :: 1 | \boxed{\frac{1}{0}} :: 1
\boxed{2,1} :: 1,2 | \boxed{1,2} :: 1,2,3 | \boxed{\{1,2\}} :: (1,2) | \boxed{1=x+y} :: 1
\boxed{\text{west}} :: east | \boxed{C} :: B | \boxed{b} and A :: A | \boxed{x+1} :: x-1
\boxed{\frac{12}{3}} :: \frac{1}{23} | \boxed{(1,3]\cup[5,6)} :: (1,3]\cup[5,7)
\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}} :: \begin{pmatrix} 1 & 2 \end{pmatrix}
""")
TEXTS = [("The answer is\n$x=5$\n", "5", True), (boxed("5"), None, False)]
TEXTS += [("9" * 5000, "9" * 5000, True), ("9" * 5000, "1", False)]
GOLD = json.loads(Path(__file__).with_name("gold_answers.json").read_text("utf-8"))
ANSWERS = [answer for part in GOLD.values() for answer in part["answers"]]


def test_qwen25(monkeypatch):
    monkeypatch.setattr(grading, "_Context", lambda: CHILDREN)  # starts faster
    asked = [(*case, True) for case in RIGHT] + [(*case, False) for case in WRONG] + TEXTS
    with Grader() as grader:
        verdicts = grader.grade([case[:2] for case in asked], by="qwen25")
    assert [case for case, right in zip(asked, verdicts, strict=True) if case[2] is not right] == []


def decimal(value):
    """Write a number with three decimals more than it needs, if it has an end."""
    places = next((n for n in range(10) if 10**n % value.denominator == 0), None)
    return None if places is None else f"{float(value):.{places + 3}f}"


def number(answer):
    """Return the value of an answer that is one plain number or a fraction, else None."""
    fraction = re.fullmatch(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", answer)
    text = "{}{}/{}".format(*fraction.groups()) if fraction else answer.replace(r",\!", "")
    return Fraction(text) if re.fullmatch(r"-?\d+(?:\.\d+)?(?:/\d+)?", text) else None


def forms(i):
    """Yield the name and the text of each form of an answer."""
    gold, value = ANSWERS[i], number(ANSWERS[i])
    yield "box", rf"It is \boxed{{{gold}}}."
    yield "answer is", f"So the final answer is {gold}."
    yield "answer is $", f"Therefore the answer is ${gold}$."
    yield "I hope", f"Final Answer: The final answer is ${gold}$. I hope it is correct."
    yield "more words", f"The answer is ${gold}$ in all cases."
    if re.fullmatch(r"[\w.-]+", gold):
        yield "text", rf"It is \boxed{{\text{{{gold}}}}}."
    other = ANSWERS[i - 1]
    if other != gold and len(other + gold) < 40:  # Longer ones may take seconds.
        yield "another", rf"It is \boxed{{{other}}}."
    if value is None:
        return
    if (written := decimal(value)) is not None:
        yield "decimal", rf"It is \boxed{{{written}}}."
        yield "decimal $", f"so $x = {written}$."
        yield "percent", rf"It is \boxed{{{written}\%}}."
        yield "percent $", rf"The answer is ${written}\%$."
    sign, top = "-" if value < 0 else "", abs(value.numerator)
    yield "fraction", rf"It is \boxed{{{sign}\frac{{{3 * top}}}{{{3 * value.denominator}}}}}."
    if top >= 1000 and value.denominator == 1:
        yield "thousands", f"The answer is {value.numerator:,}."
        grouped = f"{value.numerator:,}".replace(",", "{,}")
        yield "thousands {,}", rf"It is \boxed{{{grouped}}}."
    near = value + 1
    yield "off by one", rf"It is \boxed{{{near}}}."
    yield "off by one $", f"The answer is ${near}$."
    if value:
        yield "sign", rf"It is \boxed{{{-value}}}."
        yield "sign $", f"The answer is ${-value}$."
        yield "percent, sign", rf"It is \boxed{{{float(-value)}\%}}."


PINNED = {  # form: pairs, right by math-verify, right by qwen25
    "box": (812, 812, 812),
    "answer is": (812, 812, 812),
    "answer is $": (812, 812, 812),
    "I hope": (812, 812, 812),
    "more words": (812, 808, 11),
    "fraction": (536, 536, 536),
    "text": (552, 552, 552),
    "decimal": (515, 515, 515),
    "decimal $": (515, 515, 515),
    "percent": (515, 515, 515),
    "percent $": (515, 515, 515),
    "thousands": (37, 37, 37),
    "thousands {,}": (37, 37, 37),
    # Wrong answers; both take 5 for x=5, and qwen25 takes 28801 for 28800 and 200 for 2.
    "another": (738, 1, 2),
    "off by one": (536, 0, 11),
    "off by one $": (536, 0, 11),
    "sign": (528, 0, 0),
    "sign $": (528, 0, 0),
    "percent, sign": (528, 0, 0),
}


def test_the_file_has_the_published_answers():
    for name, part in GOLD.items():
        if (path := FOLDER / f"{name}.jsonl").exists():
            assert [p.answer for p in read_problems(str(path), count=None)] == part["answers"]


@pytest.mark.slow
def test_graders_on_rewritten_answers():
    asked = [(*case, answer) for i, answer in enumerate(ANSWERS) for case in forms(i)]
    with Grader() as grader:
        verdicts = [grader.grade([case[1:] for case in asked], by=by) for by in GRADERS]
    counts = {form: np.zeros(1 + len(GRADERS), int) for form, *_ in asked}
    for (form, *_), *found in zip(asked, *verdicts, strict=True):
        counts[form] += (1, *found)
    assert {form: tuple(counts[form]) for form in counts} == PINNED
