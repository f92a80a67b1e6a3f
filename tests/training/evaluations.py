r"""Small evaluation files in the schemas of MATH-500, Minerva and AMC, made here; and the published
ones if they are in shared/data beside the checkout.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[3] / "shared" / "data"
MATH = [  # problem, answer
    ("Write three eighths of two thirds as a fraction.", r"\frac{1}{4}"),
    (r"For which $x$ is $(x-1)(x-6) \le 0$? Use interval notation.", "[1,6]"),
    (r"What is the domain of $\ln(4-x)$?", r"(-\infty,4)"),
    ("Simplify $\\sqrt{75}$.", r"5\sqrt{3}"),
    ("Expand $(t+3)(t-2)$.", "t^2+t-6"),
    ("Name the shape with four equal sides and four right angles.", r"\text{square}"),
    ("Give the point $(1,1)$ in polar coordinates.", r"\left( \sqrt{2}, \frac{\pi}{4} \right)"),
    ("A ladder leans so that its foot makes an angle of twice 35 degrees. Which?", r"70^\circ"),
    ("Find all real $y$ with $y^2 = y + 12$.", "-3,4"),
    ("Multiply $2+i$ by $3-i$.", "7+i"),
    ("How many seconds are three hours?", r"10{,}800"),
    (
        r"Double $\begin{pmatrix} 1 \\ -4 \end{pmatrix}$.",
        r"\begin{pmatrix} 2 \\ -8 \end{pmatrix}",
    ),
    ("Of 40 pupils 14 walk. Which percentage is that?", r"35\%"),
    ("Is the product of two odd numbers even or odd?", r"\text{odd}"),
]
MINERVA = [  # problem, solution
    ("A star is 4 pc away. How many metres?", r"One has $1.2 \times 10^{17}$, \boxed{1.2e17} m."),
    ("Light crosses 6 mm of water ($n = 4/3$). How long does it take, in ps?", r"\boxed{27}"),
    ("A spring of stiffness $k$ is drawn out by $a$. Its energy?", r"It is $\boxed{k a^2 / 2}$."),
    (
        "A capacitor $C$ empties through $R$ from $V_0$. Give the voltage at $t$.",
        r"From $\boxed{V_0}$ on it decays: \[ V = \boxed{V_{0} e^{-t / (R C)}} \]",
    ),
    ("Find the mean molecular speed in km/s.", r"\boxed{0.48} $\mathrm{~km} / \mathrm{s}$"),
    ("What charge is on 3 electrons, in C?", r"$-\boxed{4.8e-19}$, or rather \boxed{-4.8e-19}"),
    (
        "By what share does a rod of $\\alpha = 12e-6$/K grow in 50 K?",
        r"$\alpha\Delta T = \boxed{6e-4}$",
    ),
    ("What is the slope of $y = 7 - x/3$?", r"It is $\boxed{-\frac{1}{3}}$."),
    ("Solve $y'' + 9y = 0$, $y(0) = 0$, $y'(0) = 3$.", r"So $y = \boxed{\sin(3 t)}$."),
    ("How many nodes has the fifth mode of a string, ends included?", r"\boxed{6}"),
    ("Where does $s^2 + 2s + 10$ vanish?", r"At \boxed{-1+3i,-1-3i}."),
    ("A line has equation $2x + y = 8$. Solve for $y$.", r"\boxed{y = 8 - 2 x}"),
    ("How many grams of salt are in 0.5 l of a 0.2 M solution?", r"\boxed{5.84} g"),
]
AMC = [  # problem, answer
    ("A train and a tram leave together, at 60 and 24 km/h. How far apart after 15 min?", 9.0),
    ("How many two-digit numbers have digits that differ by 7?", 5.0),
    ("The sum of four consecutive odd numbers is 2024. What is the least of them?", 503.0),
    ("What is the units digit of $7^{2022}$ times 3?", 7.0),
    ("Three dice are thrown; $m/n$ is the chance of no six, reduced. What is $m+n$?", 341.0),
    ("How many more edges than faces has a cube?", 6.0),
    ("How many ways are there to seat 5 people round a table?", 24.0),
    ("What is the greatest prime that divides $3^6 - 1$?", 13.0),
    ("The lengths of a box are 2, 3 and 6. How long is its diagonal?", 7.0),
    ("How many positive divisors has 2310?", 32.0),
    ("A sequence starts 1, 4 and each term is the sum of the two before. What is the ninth?", 97.0),
    ("A price falls by a fifth, then rises by a half. By how many per cent has it risen?", 20.0),
]


def made():
    """Return rows by name, each like the published file's."""
    math = [{"problem": problem, "answer": answer} for problem, answer in MATH]
    for i, row in enumerate(math):
        row["solution"] = rf"One finds \boxed{{0}} first, and then $\boxed{{{row['answer']}}}$."
        row |= {"subject": "Algebra", "level": 1 + i % 5, "unique_id": f"made/{i}.json"}
    minerva = [
        {"problem": problem, "solution": solution, "type": "Made", "idx": i}
        for i, (problem, solution) in enumerate(MINERVA)
    ]
    amc = [
        {"id": i, "problem": problem, "answer": answer, "url": "", "question": problem}
        for i, (problem, answer) in enumerate(AMC)
    ]
    return {"math500": math, "minerva_math": minerva, "amc23": amc}


PUBLISHED = {"math500": 500, "minerva_math": 272, "amc23": 40}  # rows
NAMES = [f"{name}, made" for name in PUBLISHED]
NAMES += [name for name in PUBLISHED if (FOLDER / f"{name}.jsonl").exists()]


def evaluation_file(name, folder):
    """Return the path of a file, and the number of its rows."""
    if name in PUBLISHED:
        return FOLDER / f"{name}.jsonl", PUBLISHED[name]
    rows = made()[name.removesuffix(", made")]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path, len(rows)
