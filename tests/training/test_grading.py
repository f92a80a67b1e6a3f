import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from spawned import HANG_S, group_of, outlived, wait_for
from training.lives import CHILDREN, slow

from em_kernels.training.data import grading
from em_kernels.training.data.grading import Grader, final_answer


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader
    assert not multiprocessing.active_children()


def boxed(answer):
    return rf"It is \boxed{{{answer}}}."


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
    ("x = - 5", "-5"),
    ("The difference is \N{MINUS SIGN}5.", "-5"),
    ("8 - 5", "5"),
    ("a half is .5", ".5"),
    ("5-3", "3"),
    ("10 to 20", "20"),
    ("the pages 10-20", "20"),
    ("the answer is...5", "5"),
    ("31+52=83", "83"),
    ("about 1.5e-6 m", "1.5e-6"),
    ("no number", None),
    ("", None),
]


@pytest.mark.parametrize("text, answer", FOUND)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


ALIKE = [  # in a box, the answer
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", "1/2"),
    (r"\dfrac{2}{4}", r"\frac{1}{2}"),
    (r"\frac{1}{2}", r"\frac{1} {2}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{-3}{-4}", r"\frac34"),
    (r"1\frac{4}{5}", r"\frac95"),
    ("1 1/2", "1.5"),
    ("-1 1/2", r"-\frac32"),
    ("137.5", r"137 \frac{1}{2}"),
    ("-1/3", "-1./3"),
    (".75", r"\frac{3}{4}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\sqrt{117}", r"3\sqrt{13}"),
    ("3^{1/2}", r"\sqrt{3}"),
    (r"\sqrt[3]{8}", "2"),
    (r"2\pi", r"\pi\cdot 2"),
    ("2^{10}", "1024"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    # intervals and inequalities
    (r"\left(3,4\right]", "(3, 4]"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"-2 \le x \le 7", r"x \in [-2,7]"),
    ("-2 < x < 7", "(-2,7)"),
    (r"x \leq 0", r"(-\infty, 0]"),
    (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"),
    # sets, pairs
    (r"\{1, 2, 3\}", r"\{3, 2, 1\}"),
    ("1, 2, 3", r"\{3, 1, 2\}"),
    ("1,-2", "-2, 1"),
    (r"x = 3 \text{ or } x = 5", "5, 3"),
    ("3 and 5", "5, 3"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("(1.5, -13)", r"\left( \frac{3}{2}, -13 \right)"),
    ("(6, 31, -1)", "(6,31,-1)"),
    # units, percent, degrees, powers of ten
    (r"5\text{ cm}", "5"),
    ("5 cm", "5"),
    (r"\text{12 cm}", "12"),
    ("15", r"15\mbox{ cm}^2"),
    (r"3x\text{ cm}^{2}", "3x"),
    (r"10\,\text{cm}", "10"),
    (r"10\ \mathrm{cm}", r"10~\text{cm}"),
    ("60", r"60\;\text{km/h}"),
    (r"36\pi\,\text{cm}^3", r"36\pi"),
    (r"\frac12\,\text{cm}", "0.5"),
    (r"3\sqrt2\,\text{units}", r"3\sqrt{2}"),
    ("18.9", r"\$18.90"),
    (r"36\text{ dollars}", r"\$36"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    ("50", r"50\%"),
    ("90", r"90^\circ"),
    (r"90\text{ degrees}", r"90^\circ"),
    (r"3\times10^{8} \text{ m/s}", "3e8"),
    (r"3.89 \times 10^{-10} \mathrm{~m}", "3.89e-10"),
    (r"45\cdot 10^{32}", "4.5e+33"),
    (r"4.5\times 10^{33}\text{ erg}", "4.5e+33"),
    ("0.0000278", r"2.78\times 10^{-5}"),
    (r"\frac{3.61}{10^{10}}", "3.61e-10"),
    # words, choices
    (r"\text{blue}", "blue"),
    ("Blue", r"\text{blue}"),
    ("Evelyn", r"\text{Evelyn}"),
    (r"\mathrm{ellipse}.", r"\text{ellipse}"),
    (r"\text{right triangle}", "right triangle"),
    (r"$\text{even}$", "even"),
    (r"\text{A and B}", "B, A"),
    (r"\infty", "infinity"),
    ("NaN", "NaN"),
    ("B", r"\text{(B)}"),
    ("(B)", "B"),
    (r"\textbf{(B)}", r"\text{(B)}"),
    ("B.", "B"),
    # signs, separators
    ("-7", "-7.0"),
    ("+2", "2"),
    ("$7$", "7"),
    ("1,000", "1000"),
    (r"10{,}080", r"10,\!080"),
    (r"1\,000\,000", "1000000"),
    ("1 000", "1,000"),
    (r"\$32,348", r"\$32,\!348"),
    # expressions, equations
    ("x + 1", "x+1"),
    ("x^2+2x+1", "(x+1)^2"),
    ("(x-1)(x+1)", "x^2-1"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    ("p-q", "-q+p"),
    (r"a \cdot b \cdot c", "abc"),
    ("y = 3 + 2x", "y = 2x + 3"),
    ("2x+3", "y = 2x + 3"),
    ("10x - 14y + 2 = 0", "5x-7y+1=0"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("-5i+6", "6-5i"),
    (r"3 + 4\mathrm{i}", "3+4i"),
    (r"2\sin x\cos x", r"\sin(2x)"),
    (r"\log_2 8", "3"),
    (r"I(0) e^{-t/(RC)}", r"I(0) e^{-\frac{t}{R C}}"),
    ("52_8", "52_{8}"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"\begin{pmatrix} -0.5 \\ 2/4 \end{pmatrix}", r"\begin{pmatrix} -1/2 \\ 1/2 \end{pmatrix}"),
]
DIFFERENT = [
    (r"\frac{1}{2}", "2"),
    ("0.3333", r"\frac13"),
    (r"-\frac12", r"\frac12"),
    (r"\frac{14}{3}", r"\frac{13}{3}"),
    (r"3\sqrt{13}", r"13\sqrt{3}"),
    (r"\sqrt{51}", "7.14"),
    (r"2\pi", "6.28"),
    ("2^{100}", "1267650600228229401496703205377"),
    ("(3,4)", "(3,4]"),
    ("[3,4]", "(3,4)"),
    (r"(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"),
    ("-2 < x < 7", r"x \in [-2,7]"),
    (r"x \ge 0", r"(-\infty,0]"),
    ("(4,3)", "(3,4)"),
    ("(3,-4)", "(3,4)"),
    (r"(\frac{\pi}{2}, 3)", r"(3, \frac{\pi}{2})"),
    ("1,2", "1,2,3"),
    ("3", "3, 5"),
    ("3,5", "3"),
    (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"6\text{ cm}", "5"),
    (r"11\,\text{cm}", "10"),
    (r"\text{blue}\ \text{car}", "blue"),
    ("\N{MINUS SIGN}5", "5"),
    (r"5\%", "50"),
    (r"3.90 \times 10^{-10} \text{ m}", "3.89e-10"),
    (r"0.0000005\text{ m}", "3.89e-10"),
    ("4.5e32", "4.5e33"),
    ("1e-8", "0"),
    ("1e3", "1001"),
    (r"60^\circ", r"90^\circ"),
    (r"\text{neve}", "even"),
    (r"\text{not even}", "even"),
    ("west", r"\text{east}"),
    ("blue", "5"),
    ("5", "blue"),
    ("19", "nineteen"),
    ("sNaN", "1"),
    ("C", r"\text{(E)}"),
    ("-7", "7"),
    ("7", "-7"),
    ("1,234", "1,243"),
    ("12,345", "12.345"),
    ("1,2", "12"),
    ("x^2-2x+1", "(x+1)^2"),
    ("x-y", "y-x"),
    ("v t", "v"),
    (r"\frac{1}{m} t", r"\frac{1}{m}"),
    ("x+1", "y+1"),
    ("y=2x-3", "y=2x+3"),
    ("6+5i", "6-5i"),
    (r"3 + 4\mathrm{i}", "7"),
    ("2 sin x", "2"),
    (r"\begin{pmatrix} 1 & 2 \\ 4 & 3 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\frac{1}{0}", "1"),
    (r"\infty", r"-\infty"),
    ("?", "1"),
    ("", "0"),
    ("", ""),
]
TEXTS = [  # whole completions
    ("19", "19", True),
    ("19", "-19", False),
    ("190", "19", False),
    ("= 19.0", "19", True),
    ("0.50", ".5", True),
    ("costs 42, or so", "42", True),
    ("it is 2/4", "1/2", True),
    ("the answer is 1/2", "2", False),
    ("the answer is 1/2", r"\frac{1}{2}", True),
    ("3 + 4", "7", False),
    ("so (3,4)", "34", False),
    ("1/0", "1", False),
    ("no number", "0", False),
    ("", "", False),
    ("9" * 5000, "1", False),
    ("9" * 5000, "9" * 5000, True),
    ("Blue.", "blue", True),
    ("x^2", "x^2", True),
    ("costs $1,234.50.", "1234.5", True),
    ("The answer is 50%.", "50", True),
    ("The answer is 50%.", "5", False),
    (r"so $x = \frac{1}{2}$.", "0.5", True),
    (r"so $x = \frac{1}{2}$.", "2", False),
    (r"it is \frac{3}{4}", "0.75", True),
    ("The answer is $(3,4)$.", "(3, 4)", True),
    ("so $2$ or $3$", "3, 2", True),
    ("$x$ is\n" + "long " * 1000 + "\nso $y = 5$", "5", True),
    (r"\boxed{2} 3", "3", False),
    (r"\boxed{2}, no: \boxed{3}", "3", True),
    (r"\boxed{2}, no: \boxed{3}", "2", False),
    (r"\boxed{2} and \boxed{3}", "2, 3", False),
    (r"\boxed{5}, then \boxed{6 and it was cut", "5", False),
    (r"\boxed{6 and it was cut", "6", False),
    (r"\boxed{\frac{1}{2", "2", False),
    (r"\boxed{\boxed{7}}", "7", True),
    (r"\boxed{7}", None, False),
    (boxed("r^2"), "R^2", False),
    (boxed("x^n+1"), "1+x^n", True),
    (boxed(r"\frac{V}{R}"), r"\frac{v}{R}", False),
    (boxed(r"\varnothing"), r"\emptyset", True),
    (r"\boxed {7}", "7", True),
    (r"\fbox{42}", "42", True),
    (r"so \boxed 5.", "5", True),
    (boxed(r"\frac{1}{10^9}"), r"\frac{1}{10^8}", False),
    (boxed(r"\frac{1}{10^9}"), "10^{-9}", True),
    (boxed(r"\frac{\pi}{10^9}"), r"\frac{2\pi}{10^9}", False),
    (boxed(r"\frac{\pi}{10^9}"), r"\pi 10^{-9}", True),
    (boxed("B. 42"), "B", True),
    (boxed(r"\textbf{(B) } 42"), "B", True),
    (boxed("C: 42"), "B", False),
    (boxed("b"), "B", False),
]
KNOWN_DISAGREEMENTS = [  # what it says, where a mathematician says the opposite
    (boxed("no"), "on", True),  # two letters may be a product
    (boxed("acb"), "abc", False),  # three are a word
    (boxed("0.333333"), r"\frac13", True),  # six digits are enough, not for two plain numbers
    (boxed("52_9"), "52_8", True),  # a number's base is not read
    (boxed(r"5\text{ km}"), r"5\text{ m}", True),  # units are left out
    (boxed("3c"), "3", True),  # even if it may be a variable
    (boxed("36 dollars"), "36", False),  # this one as a product of letters
    (boxed(r"12^{\text{th}}"), "12", False),
    (boxed(r"\frac{\pi}{2}"), r"90^\circ", False),  # degrees are numbers
    (boxed(r"33\frac13\%"), r"\frac13", False),  # a percentage is of one number
    (boxed(r"0.\overline{3}"), r"\frac13", False),
    (boxed("1, 2"), "(1, 2)", True),  # a pair without parentheses
    (boxed("]1,2["), "(1,2)", False),
    ("it is 3 \\times 10^5", "300000", False),  # unboxed and not within $
    ("Answer: blue", "blue", False),  # a word is an answer in a box or alone
]


def test_right_and_wrong(grader):
    cases = [(boxed(found), answer, True) for found, answer in ALIKE]
    cases += [(boxed(found), answer, False) for found, answer in DIFFERENT]
    cases += TEXTS + KNOWN_DISAGREEMENTS
    done = []
    verdicts = grader.grade([case[:2] for case in cases], done.append)
    assert [case for case, right in zip(cases, verdicts, strict=True) if case[2] is not right] == []
    assert sum(done) == len(cases)


def test_nothing_starts_for_numbers_and_words():
    before = multiprocessing.active_children()
    with Grader() as grader:
        texts = [
            "so 12",
            boxed("12.0"),
            boxed("1,200"),
            boxed("red"),
            "",
            boxed("1e5"),
            "7" * 10**6,
        ]
        assert grader.grade([(text, "12") for text in texts]) == [True, True, *[False] * 5]
        assert grader.grade([(boxed("red"), "blue"), (boxed(r"\frac12"), None)]) == [False, False]
        assert grader.agreement([texts]) == [(0, 2 / 7)]
        assert multiprocessing.active_children() == before


def test_reference_answers(grader, evaluation):
    """Each is itself, also to math-verify, and none is another."""
    path, _ = evaluation
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [str(row.get("answer") or final_answer(row["solution"])) for row in rows]
    alike = [(boxed(answer), answer) for answer in answers]
    alike += [(boxed(rf"\! {a}"), a) for a in answers if re.search(r"[=^(]|\\frac|\\sqrt", a)]
    assert [p for p, right in zip(alike, grader.grade(alike), strict=True) if not right] == []
    other = [(boxed(answers[i]), answers[i - 1]) for i in range(0, len(answers), 3)]
    found = [p for p, right in zip(other, grader.grade(other), strict=True) if right]
    assert [(text, answer) for text, answer in found if text != boxed(answer)] == []


def test_agreement(grader):
    groups = [
        [boxed("1"), boxed(r"\frac{1}{2}"), boxed("0.5"), boxed("1"), boxed(r"\frac{2}{4}")],
        ["so 7", boxed("8"), "no answer", "none here either", boxed("8.0")],
        [boxed("2"), boxed("1"), boxed("1"), boxed("2")],
        [boxed("x+1"), boxed("2x"), boxed("1+x")],
        [boxed(r"\text{red}"), boxed("Red"), boxed("der")],
        ["none" * 99, "none" * 99, boxed("")],
        ["none" * 99, boxed("0")],
        [" Friday\n", "Monday", "friday"],
        [],
        [boxed("x+1"), boxed("1+x"), boxed("10^{10^{10}}")],
    ]
    expected = [(1, 3 / 5), (1, 2 / 5), (0, 1 / 2), (0, 2 / 3), (0, 2 / 3), (0, 1.0), (0, 1 / 2)]
    expected += [(0, 2 / 3), (0, 0.0), (0, 2 / 3)]
    assert grader.agreement(groups) == expected


def easy(count):
    """As many different pairs that are right, and not obviously."""
    return [(boxed(f"x+{i}"), f"{i}+x") for i in range(count)]


def heavy(count):
    """As many that take all the time there is."""
    return [(boxed(f"10^{{10^{{{10 + i}}}}}"), "5") for i in range(count)]


BOMBS = ["10^{10^{10}}", "9!!!!", "(1+x)^{1000000}", r"\operatorname{zeros}(100000,100000)"]
BOMBS += [r"1\times 10^{999999999}", "(" * 400 + "1" + ")" * 400]


def peaks():
    """Bytes that each worker has held at most."""
    for worker in multiprocessing.active_children():
        status = Path(f"/proc/{worker.pid}/status").read_text()
        yield 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize("bombs", [BOMBS[2:4], slow(BOMBS)], ids=["for memory", "for all"])
def test_hostile_text(bombs, tmp_path, capfd):
    """Nothing is run, said or filled; a worker that has met one compares as before."""
    mark = tmp_path / "mark"
    code = f"__import__('os').system('touch {mark}')"
    places = ["%s", r"\text{%s}", "f(%s)", "x_{%s}", r"\frac{1}{%s}", r"\operatorname{%s}(1)"]
    places += [r"\begin{matrix}%s\end{matrix}", r"\mathtt{%s}", r"\max(%s, 1)", "1+(%s)+1"]
    long = ["{" * 100_000 + "1" + "}" * 100_000, "x+" * 500_000 + "x", "1," * 500_000]
    odd = ["\0 5", "\ud800\udfff", "\\" * 1999, "1e999999999", *long]
    texts = [form % place % code for place in places for form in (r"\boxed{%s}", "$%s$", "%s")]
    texts += [form % text for text in odd for form in (r"\boxed{%s}", "$%s$", "%s")]
    texts += [r"\boxed{" * 10_000, "$" * 10**6, "1,111" * 200_000, "$x$ is 9^(9^(9^9))"]
    texts += [rf"\boxed{{{bomb}}}" for bomb in bombs]
    pairs = [
        pair
        for text, good in zip(texts, easy(len(texts)), strict=True)
        for pair in ((text, "17"), good)
    ]
    with Grader() as grader:
        assert grader.grade(easy(1)) == [True]
        before = max(peaks())  # of workers that have only begun
        assert grader.grade(pairs) == [False, True] * len(texts)
        groups = [[boxed("2/x"), text] for text in (texts[0], *texts[-len(bombs) :: 5])]
        assert grader.agreement(groups) == [(0, 0.5)] * len(groups)
        assert max(peaks()) < grading.WORKER_BYTES + before
    assert not mark.exists() and capfd.readouterr() == ("", "")


def kill(workers):
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)


def worked_s(pid):
    """Seconds that a process has computed."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def kill_at_work(workers):
    """When each of them computes."""
    start = {worker.pid: worked_s(worker.pid) for worker in workers}
    wait_for(lambda: all(worked_s(pid) > since + 0.1 for pid, since in start.items()))
    kill(workers)


def test_workers_that_die_or_hang(monkeypatch):
    """A pair goes down with its worker, whoever ended that; the others do not. Workers that fork
    from a process which has imported what they need, as four times they start anew.
    """
    monkeypatch.setattr(grading, "_Context", lambda: CHILDREN)
    before = multiprocessing.active_children()

    def workers():
        return [worker for worker in multiprocessing.active_children() if worker not in before]

    with Grader() as grader:
        assert all(grader.grade(easy(4)))
        first = workers()
        pairs = heavy(len(first)) + easy(4)
        (killer := threading.Thread(target=kill_at_work, args=[first])).start()
        assert grader.grade(pairs) == [False] * len(first) + [True] * 4
        killer.join()
        second = workers()
        assert not set(first) & set(second)
        with monkeypatch.context() as patch:
            patch.setattr(grading, "KILL_S", 2)  # before math-verify gives up by itself
            assert grader.grade(heavy(2)) == [False] * 2
        wait_for(lambda: set(second) - set(workers()))  # one of them may have had both
        assert all(grader.grade(easy(4)))
        kill(third := workers())
        assert all(grader.grade(easy(4)))
        assert not set(third) & set(workers())
    assert not workers()


@pytest.mark.parametrize("at", ["start", "work"])
def test_ctrl_c(at, tmp_path):
    """Of a terminal, so to all processes: the workers leave it to a script that has no guard
    against being imported, and end with it.
    """
    script = tmp_path / "script.py"
    tell = "lambda count: print('working', flush=True)"
    script.write_text(
        "from em_kernels.training.data.grading import Grader\n"
        "print('start', flush=True)\n"
        "with Grader() as grader:\n"
        f"    grader.grade({easy(1) + 20 * heavy(20)!r}, {tell})\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with outlived(process):
        assert process.stdout.readline() == "start\n"
        if at == "work":
            assert process.stdout.readline() == "working\n"
        else:  # multiprocessing's own tracker, and a worker that still imports
            wait_for(lambda: len(group_of(process.pid)) > 2, lambda: process.poll() is None)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=HANG_S)
    assert process.returncode == -signal.SIGINT and stdout == ""
    assert stderr.count("Traceback") == 1 and stderr.endswith("\nKeyboardInterrupt\n")
    wait_for(lambda: not group_of(process.pid))  # the tracker ends a moment later
