import pytest

from em_kernels.training.grading import final_answer, is_correct

FOUND = [
    (r"so \boxed{42}.", "42"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{1} or rather \boxed{ 2 } at 3", "2"),
    (r"\boxed{\text{a {nested} one}} 7", r"\text{a {nested} one}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"first \boxed{5}, then \boxed{6 and it was cut", "6"),
    (r"\boxed{}", ""),
    ("A: 12 + 7 = 19\n", "19"),
    ("it is 3.50, I think", "3.50"),
    ("costs $1,234.50.", "1,234.50"),
    ("x = -7", "-7"),
    ("x = -.5", "-.5"),
    ("a half is .5", ".5"),
    ("5-3", "3"),
    ("10 to 20", "20"),
    ("the pages 10-20", "20"),
    ("the answer is...5", "5"),
    ("31+52=83", "83"),
    ("no number", None),
    ("", None),
]


@pytest.mark.parametrize("text, answer", FOUND)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


RIGHT = [
    ("19", "19"),
    ("= 19.0", "19"),
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("0.50", ".5"),
    (r"\boxed{NaN}", "NaN"),
    ("-3", "-3.00"),
    (r"\boxed{$7$}", "7"),
    (r"\boxed{7}", "$7$"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1} {2}"),
    (r"\boxed{x + 1}", "x+1"),
    (r"\boxed{blue}", "blue"),
    ("costs 42, or so", "42"),
    (r"\boxed{12.8}", "12.8"),
    ("it is 1/2", "0.5"),
    ("it is 2/4", "1/2"),
]
WRONG = [
    ("19", "-19"),
    ("190", "19"),
    ("3 + 4", "7"),
    ("no number", "0"),
    ("", ""),
    (r"\boxed{}", "0"),
    (r"\boxed{blue}", "Red"),
    (r"\boxed{2} 3", "3"),
    (r"\boxed{1e3}", "1001"),
    (r"\boxed{sNaN}", "1"),
    ("19", "nineteen"),
    (r"\boxed{1,2}", "12"),
    ("so (3,4)", "34"),
    ("the answer is 1/2", "2"),
    ("1/0", "1"),
    ("9" * 5000, "1"),
]


@pytest.mark.parametrize("text, answer", RIGHT)
def test_right(text, answer):
    assert is_correct(text, answer)


@pytest.mark.parametrize("text, answer", WRONG)
def test_wrong(text, answer):
    assert not is_correct(text, answer)
