"""Grading: final answers, equal and different ones, hostile text, workers that die."""

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


def cases(text):
    """Split "a :: b | c :: d" into [("a", "b"), ("c", "d")], and leave out comment lines."""
    lines = [line for line in text.strip().split("\n") if not line.startswith("#")]
    return [tuple(case.split(" :: ")) for line in lines for case in line.split(" | ")]


FOUND = cases(r"""
so \boxed{42}. :: 42 | \boxed{\frac{1}{2}} :: \frac{1}{2} | \boxed{\{1, 2\}} :: \{1, 2\}
\boxed{\text{a {nested} one}} 7 :: \text{a {nested} one} | \boxed{1} or rather \boxed{ 2 } at 3 :: 2
first \boxed{5}, then \boxed{6 and it was cut :: 6 | it is 3.50, I think :: 3.50
costs $1,234.50. :: 1,234.50 | x = -7 :: -7 | x = -.5 :: -.5 | x = - 5 :: -5
The difference is −5. :: -5 | 8 - 5 :: 5 | a half is .5 :: .5 | 5-3 :: 3 | 10 to 20 :: 20
the pages 10-20 :: 20 | the answer is...5 :: 5 | 31+52=83 :: 83 | about 1.5e-6 m :: 1.5e-6
""")
FOUND += [(r"\boxed{}", ""), ("A: 12 + 7 = 19\n", "19"), ("no number", None), ("", None)]


@pytest.mark.parametrize("text, answer", FOUND)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


# Content of a box :: a known answer that equals it
ALIKE = cases(r"""
\frac{1}{2} :: 0.5 | \frac12 :: 1/2 | \dfrac{2}{4} :: \frac{1}{2} | \frac{1}{2} :: \frac{1} {2}
-\frac{1}{2} :: \frac{-1}{2} | \frac{-3}{-4} :: \frac34 | 1\frac{4}{5} :: \frac95 | 1 1/2 :: 1.5
-1 1/2 :: -\frac32 | 137.5 :: 137 \frac{1}{2} | -1/3 :: -1./3 | .75 :: \frac{3}{4}
\frac{\sqrt{3}}{3} :: \frac{1}{\sqrt{3}} | \sqrt{117} :: 3\sqrt{13} | 3^{1/2} :: \sqrt{3}
\sqrt[3]{8} :: 2 | 2\pi :: \pi\cdot 2 | 2^{10} :: 1024
2^{100} :: 1267650600228229401496703205376 | 5! :: 120 | \binom{5}{2} :: 10
# intervals and inequalities
\left(3,4\right] :: (3, 4] | x \in [-2,7] :: [-2,7] | [-2,7] :: x \in [-2,7]
-2 \le x \le 7 :: x \in [-2,7] | -2 < x < 7 :: (-2,7) | x \leq 0 :: (-\infty, 0]
(3,\infty)\cup(-\infty,2) :: (-\infty, 2) \cup (3, \infty)
# sets, pairs
\{1, 2, 3\} :: \{3, 2, 1\} | 1, 2, 3 :: \{3, 1, 2\} | 1,-2 :: -2, 1
x = 3 \text{ or } x = 5 :: 5, 3 | 3 and 5 :: 5, 3 | 1 \pm \sqrt{19} :: 1+\sqrt{19}, 1-\sqrt{19}
\left( 3, \frac{\pi}{2} \right) :: (3, \pi/2) | (1.5, -13) :: \left( \frac{3}{2}, -13 \right)
(6, 31, -1) :: (6,31,-1)
# units, percent, degrees, powers of ten
5\text{ cm} :: 5 | 5 cm :: 5 | \text{12 cm} :: 12 | 15 :: 15\mbox{ cm}^2 | 3x\text{ cm}^{2} :: 3x
10\,\text{cm} :: 10 | 10\ \mathrm{cm} :: 10~\text{cm} | 60 :: 60\;\text{km/h}
36\pi\,\text{cm}^3 :: 36\pi | \frac12\,\text{cm} :: 0.5 | 3\sqrt2\,\text{units} :: 3\sqrt{2}
10\% :: 10.0 | 4.2\% :: 4.2 | -50\% :: -50 | -50\% :: -0.5 | 10.0 :: 10\% | 0.1 :: 10\%
18.9 :: \$18.90 | 36\text{ dollars} :: \$36 | 50\% :: 50 | 50\% :: 0.5 | 50 :: 50\%
90 :: 90^\circ | 90\text{ degrees} :: 90^\circ | 3\times10^{8} \text{ m/s} :: 3e8
3.89 \times 10^{-10} \mathrm{~m} :: 3.89e-10 | 45\cdot 10^{32} :: 4.5e+33
4.5\times 10^{33}\text{ erg} :: 4.5e+33 | 0.0000278 :: 2.78\times 10^{-5}
\frac{3.61}{10^{10}} :: 3.61e-10
# words, choices
\text{blue} :: blue | Blue :: \text{blue} | Evelyn :: \text{Evelyn}
\mathrm{ellipse}. :: \text{ellipse} | \text{right triangle} :: right triangle
$\text{even}$ :: even | \text{A and B} :: B, A | \infty :: infinity | NaN :: NaN | B :: \text{(B)}
(B) :: B | \textbf{(B)} :: \text{(B)} | B. :: B
# signs, separators
-7 :: -7.0 | +2 :: 2 | $7$ :: 7 | 1,000 :: 1000 | 10{,}080 :: 10,\!080 | 1\,000\,000 :: 1000000
1 000 :: 1,000 | \$32,348 :: \$32,\!348
# expressions, equations
x + 1 :: x+1 | x^2+2x+1 :: (x+1)^2 | (x-1)(x+1) :: x^2-1 | \frac{x^2-1}{x-1} :: x+1 | p-q :: -q+p
a \cdot b \cdot c :: abc | y = 3 + 2x :: y = 2x + 3 | 2x+3 :: y = 2x + 3
10x - 14y + 2 = 0 :: 5x-7y+1=0 | x=5 :: 5 | 5 :: x=5 | -5i+6 :: 6-5i | 3 + 4\mathrm{i} :: 3+4i
2\sin x\cos x :: \sin(2x) | \log_2 8 :: 3 | I(0) e^{-t/(RC)} :: I(0) e^{-\frac{t}{R C}}
52_8 :: 52_{8}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} :: \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix} -0.5 \\ 2/4 \end{pmatrix} :: \begin{pmatrix} -1/2 \\ 1/2 \end{pmatrix}
""")
DIFFERENT = cases(r"""
\frac{1}{2} :: 2 | 0.3333 :: \frac13 | -\frac12 :: \frac12 | \frac{14}{3} :: \frac{13}{3}
3\sqrt{13} :: 13\sqrt{3} | \sqrt{51} :: 7.14 | 2\pi :: 6.28
2^{100} :: 1267650600228229401496703205377 | (3,4) :: (3,4] | [3,4] :: (3,4)
(-\infty,2) :: (-\infty, 2) \cup (3, \infty) | -2 < x < 7 :: x \in [-2,7] | x \ge 0 :: (-\infty,0]
(4,3) :: (3,4) | (3,-4) :: (3,4) | (\frac{\pi}{2}, 3) :: (3, \frac{\pi}{2}) | 1,2 :: 1,2,3
3 :: 3, 5 | 3,5 :: 3 | 1+\sqrt{19} :: 1 \pm \sqrt{19} | 6\text{ cm} :: 5 | 11\,\text{cm} :: 10
\text{blue}\ \text{car} :: blue | −5 :: 5 | 5\% :: 50 | 3.90 \times 10^{-10} \text{ m} :: 3.89e-10
10\% :: 1 | 10\% :: 1000 | 1000 :: 10\% | -50\% :: 50 | 4.2\% :: 42 | 0.1\% :: 10 | 10\% :: 10.1
0.0000005\text{ m} :: 3.89e-10 | 4.5e32 :: 4.5e33 | 1e-8 :: 0 | 1e3 :: 1001 | 60^\circ :: 90^\circ
\text{neve} :: even | \text{not even} :: even | west :: \text{east} | blue :: 5 | 5 :: blue
19 :: nineteen | sNaN :: 1 | C :: \text{(E)} | -7 :: 7 | 7 :: -7 | 1,234 :: 1,243
12,345 :: 12.345 | 1,2 :: 12 | x^2-2x+1 :: (x+1)^2 | x-y :: y-x | v t :: v
\frac{1}{m} t :: \frac{1}{m} | x+1 :: y+1 | y=2x-3 :: y=2x+3 | 6+5i :: 6-5i | 3 + 4\mathrm{i} :: 7
2 sin x :: 2
\begin{pmatrix} 1 & 2 \\ 4 & 3 \end{pmatrix} :: \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix} 1 & 2 \end{pmatrix} :: \begin{pmatrix} 1 \\ 2 \end{pmatrix} | \frac{1}{0} :: 1
\infty :: -\infty | ? :: 1
""")
DIFFERENT += [("", "0"), ("", "")]
# Whole completion :: a known answer that it gives
RIGHT = cases(r"""
19 :: 19 | = 19.0 :: 19 | 0.50 :: .5 | costs 42, or so :: 42 | it is 2/4 :: 1/2
the answer is 1/2 :: \frac{1}{2} | Blue. :: blue | x^2 :: x^2 | costs $1,234.50. :: 1234.5
The answer is 50%. :: 50 | so $x = \frac{1}{2}$. :: 0.5 | it is \frac{3}{4} :: 0.75
The answer is $(3,4)$. :: (3, 4) | so $2$ or $3$ :: 3, 2 | \boxed{2}, no: \boxed{3} :: 3
\boxed{\boxed{7}} :: 7 | It is \boxed{x^n+1}. :: 1+x^n | It is \boxed{\varnothing}. :: \emptyset
\boxed {7} :: 7 | \fbox{42} :: 42 | so \boxed 5. :: 5 | It is \boxed{\frac{1}{10^9}}. :: 10^{-9}
It is \boxed{\frac{\pi}{10^9}}. :: \pi 10^{-9} | It is \boxed{B. 42}. :: B
It is \boxed{\textbf{(B) } 42}. :: B
it is 4.2%. :: 4.2 | so $x = 4.2\%$. :: 4.2 | The answer is -50%. :: -50
So the final answer is \text{Evelyn}. :: \text{Evelyn} | The answer is Evelyn. :: \text{Evelyn}
So the final answer is \left( 3, \frac{\pi}{2} \right). :: (3, \pi/2) | The answer is p - q. :: p-q
The answer is 3, 5. :: 5, 3 | The answer is 12 m/s. :: 12 | The answer is 36 dollars. :: 36
The final answer is $4.5e33$. I hope it is correct. :: 4.5e33 | The answer is: 4.5e33. :: 4.5e33
Therefore the answer is $4.5e33$. :: 4.5e33 | so $L = 4.5e33$. :: 4.5e33
so we have $C \leqslant 506$ as desired. :: 506 | so we have $C \ge 506$. :: 506
so we have \(f(x) \le -1/2\). :: -0.5 | so $x \le 506$. :: (-\infty, 506]
""")
WRONG = cases(r"""
19 :: -19 | 190 :: 19 | the answer is 1/2 :: 2 | 3 + 4 :: 7 | so (3,4) :: 34 | 1/0 :: 1
no number :: 0 | The answer is 50%. :: 5 | so $x = \frac{1}{2}$. :: 2 | \boxed{2} 3 :: 3
\boxed{2}, no: \boxed{3} :: 2 | \boxed{2} and \boxed{3} :: 2, 3
\boxed{5}, then \boxed{6 and it was cut :: 5 | \boxed{6 and it was cut :: 6
\boxed{\frac{1}{2 :: 2 | It is \boxed{r^2}. :: R^2 | It is \boxed{\frac{V}{R}}. :: \frac{v}{R}
It is \boxed{\frac{1}{10^9}}. :: \frac{1}{10^8}
It is \boxed{\frac{\pi}{10^9}}. :: \frac{2\pi}{10^9} | It is \boxed{C: 42}. :: B
It is \boxed{b}. :: B
it is 4.2%. :: 42 | The answer is -50%. :: 50 | The answer is 50%. :: 5000
So the final answer is \text{Angela}. :: Evelyn | So the final answer is not Evelyn. :: Evelyn
So the final answer is \text{not Evelyn}. :: Evelyn | The answer is Evelyn or Angela. :: Evelyn
The answer is 3, 5. :: 3 | The answer is q - p. :: p-q
Therefore the answer is $4.5e33$. :: 4.5e32 | Therefore the answer is $4.5e33$. :: 4.5
so we have $C \leqslant 506$ as desired. :: 505 | so we have $C < 506$. :: 506
so we have $1 \le x \le 506$. :: 506 | so we have $x \le 506 - y$. :: 506
so we have $506 \ge C$. :: 5 | so we have $x \leftarrow 506$. :: 505
so we have $x \ne 506$. :: 506 | so $y = 12$ for all integers $n \ge 5$. :: 5
so $y = 12$ if $n \ge 5$. :: 5 | \boxed{12}, as $n \ge 5$. :: 5
""")
TEXTS = [  # with line breaks, very long, or without an answer
    ("", "", False),
    ("9" * 5000, "1", False),
    ("9" * 5000, "9" * 5000, True),
    ("$x$ is\n" + "long " * 1000 + "\nso $y = 5$", "5", True),
    (r"\boxed{7}", None, False),
]
KNOWN_DISAGREEMENTS = [  # our verdict, where a mathematician's is the opposite
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
    asked = [(boxed(found), answer, True) for found, answer in ALIKE]
    asked += [(boxed(found), answer, False) for found, answer in DIFFERENT]
    asked += [(*case, True) for case in RIGHT] + [(*case, False) for case in WRONG]
    asked += TEXTS + KNOWN_DISAGREEMENTS
    done = []
    verdicts = grader.grade([case[:2] for case in asked], done.append)
    assert [case for case, right in zip(asked, verdicts, strict=True) if case[2] is not right] == []
    assert sum(done) == len(asked)


def test_nothing_starts_for_numbers_and_words():
    before = multiprocessing.active_children()
    with Grader() as grader:
        texts = ["so 12", boxed("12.0"), boxed("1,200"), boxed("red"), "", boxed("1e5")]
        texts.append("7" * 10**6)
        assert grader.grade([(text, "12") for text in texts]) == [True, True, *[False] * 5]
        assert grader.grade([(boxed("red"), "blue"), (boxed(r"\frac12"), None)]) == [False, False]
        assert grader.agreement([texts]) == [(0, 2 / 7)]
        assert multiprocessing.active_children() == before


def test_reference_answers(grader, evaluation):
    """Each reference answer equals itself, also by math-verify, and no other."""
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
    """Return so many different pairs that are right, but need math-verify."""
    return [(boxed(f"x+{i}"), f"{i}+x") for i in range(count)]


def heavy(count):
    """Return so many pairs that run into the time limit."""
    return [(boxed(f"10^{{10^{{{10 + i}}}}}"), "5") for i in range(count)]


BOMBS = ["10^{10^{10}}", "9!!!!", "(1+x)^{1000000}", r"\operatorname{zeros}(100000,100000)"]
BOMBS += [r"1\times 10^{999999999}", "(" * 400 + "1" + ")" * 400]


def peaks():
    """Yield each worker's peak memory in bytes."""
    for worker in multiprocessing.active_children():
        status = Path(f"/proc/{worker.pid}/status").read_text()
        yield 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize(
    "by, bombs",
    [slow("math-verify", BOMBS), slow("qwen25", BOMBS)],
    ids=["math-verify", "qwen25"],
)
def test_hostile_text(by, bombs, tmp_path, capfd):
    """No code runs, nothing is printed, memory stays bounded; the worker goes on comparing."""
    mark = tmp_path / "mark"
    code = f"__import__('os').system('touch {mark}')"
    places = ["%s", r"\text{%s}", "f(%s)", "x_{%s}", r"\frac{1}{%s}", r"\operatorname{%s}(1)"]
    places += [r"\begin{matrix}%s\end{matrix}", r"\mathtt{%s}", r"\max(%s, 1)", "1+(%s)+1"]
    long = [
        "{" * 100_000 + "1" + "}" * 100_000,
        "x+" * 500_000 + "x",
        "1," * 500_000,
        r"\(a " * 250_000,
    ]
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
        assert grader.grade(easy(1), by=by) == [True]
        before = max(peaks())  # of workers that have just started
        assert grader.grade(pairs, by=by) == [False, True] * len(texts)
        groups = [[boxed("2/x"), text] for text in (texts[0], *texts[-len(bombs) :: 5])]
        assert grader.agreement(groups) == [(0, 0.5)] * len(groups)
        assert max(peaks()) < grading.WORKER_BYTES + before
    assert not mark.exists() and capfd.readouterr() == ("", "")


def kill(workers):
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)


def worked_s(pid):
    """Return the CPU seconds of a process."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def kill_at_work(workers):
    """Kill the workers once each of them computes."""
    start = {worker.pid: worked_s(worker.pid) for worker in workers}
    wait_for(lambda: all(worked_s(pid) > since + 0.1 for pid, since in start.items()))
    kill(workers)


def test_workers_that_die_or_hang(monkeypatch):
    """A pair is wrong if its worker dies, for whatever reason; the others are unaffected."""
    monkeypatch.setattr(grading, "_Context", lambda: CHILDREN)  # starts faster
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
            patch.setattr(grading, "KILL_S", 2)  # less than math-verify's own limit
            assert grader.grade(heavy(2)) == [False] * 2
        wait_for(lambda: set(second) - set(workers()))  # One of them may have had both pairs.
        assert all(grader.grade(easy(4)))
        kill(third := workers())
        assert all(grader.grade(easy(4)))
        assert not set(third) & set(workers())
    assert not workers()


@pytest.mark.slow
@pytest.mark.parametrize("at", ["start", "work"])
def test_ctrl_c(at, tmp_path):
    """A terminal's Ctrl-C reaches all processes: the workers ignore it and end with the script,
    which has no `if __name__ == "__main__"`.
    """
    script = tmp_path / "script.py"
    tell = "lambda count: print('working', flush=True)"
    script.write_text(
        "from em_kernels.training.data.grading import Grader\n"
        "print('start', flush=True)\n"
        "with Grader() as grader:\n"
        f"    grader.grade({easy(1) + 20 * heavy(20)!r}, {tell})\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, script], **pipes, start_new_session=True)
    with outlived(process):
        assert process.stdout.readline() == "start\n"
        if at == "work":
            assert process.stdout.readline() == "working\n"
        else:  # The third is a worker, after multiprocessing's tracker; it is still importing.
            wait_for(lambda: len(group_of(process.pid)) > 2, lambda: process.poll() is None)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=HANG_S)
    assert process.returncode == -signal.SIGINT and stdout == ""
    assert stderr.count("Traceback") == 1 and stderr.endswith("\nKeyboardInterrupt\n")
    wait_for(lambda: not group_of(process.pid))  # The tracker ends a moment later.
