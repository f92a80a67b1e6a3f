"""Columns of public datasets beyond the plainest, rows that are left out, and `em-kernels data`."""

import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from training.test_data import SCHEMAS

from em_kernels.cli import main
from em_kernels.training.config import TrainConfig
from em_kernels.training.data.columns import Columns, Problem, UnusableRow, as_answer, problem_of
from em_kernels.training.data.grading import Grader
from em_kernels.training.data.problems import as_problem, problems_of, read_problems, read_rows
from em_kernels.training.evaluation.task import TaskSettings
from em_kernels.training.settings import UserError

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "p"}
REPLY = {"role": "assistant", "content": r"so \boxed{7}"}
RULE = {"style": "rule"}
LETTERED = "p\n(A) red\n(B) green\n(C) blue"
COLOURS = ["red", "green", "blue"]
FORMS = {  # a row; its prompt and answer
    "AIME": ({"ID": 1, "Problem": "p", "Solution": r"\boxed{2}", "Answer": 33}, "p", "33"),
    "capitals": ({"Question": "p", "ANSWER": "3"}, "p", "3"),
    "lower case first": ({"Answer": "1", "answer": "2", "problem": "p"}, "p", "2"),
    "OpenMathInstruct": ({"problem": "p", "expected_answer": "3"}, "p", "3"),
    "query": ({"query": "p", "response": "The answer is: 3"}, "p", None),
    "instruction": ({"instruction": "p", "input": "", "output": "o"}, "p", None),
    "instruction, input": ({"instruction": "p", "input": "q", "output": "o"}, "p\nq", None),
    "ASDiv": ({"body": "p", "question": "q", "answer": "3 (apples)"}, "p\nq", "3"),
    "SVAMP": ({"Body": "p", "Question": "q", "Answer": 145.0}, "p\nq", "145.0"),
    "an interval": ({"question": "q", "answer": "3 (apples)"}, "q", "3 (apples)"),
    "Tulu": ({"messages": [SYSTEM, USER], "ground_truth": "3"}, [SYSTEM, USER], "3"),
    "a transcript": ({"messages": [USER, REPLY]}, "p", "7"),
    "a prompt to continue": ({"prompt": [USER, REPLY]}, [USER, REPLY], None),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "#### 4"}]},
        "p",
        "4",
    ),
    "parts": ({"prompt": [{"type": "text", "text": t} for t in "pq"]}, "pq", None),
    "parts of a message": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "p"}]}]},
        "p",
        None,
    ),
    "Eurus-2": (
        {"prompt": [SYSTEM, USER], "reward_model": {**RULE, "ground_truth": "3"}},
        [SYSTEM, USER],
        "3",
    ),
    "a dict with an answer": (
        {"prompt": "p", "reward_model": {"ground_truth": {"answer": "3", "unit": "m"}}},
        "p",
        "3",
    ),
    "a dict without": (
        {"prompt": "p", "reward_model": {"ground_truth": {"target": 98, "numbers": [2, 3]}}},
        "p",
        None,
    ),
    "a dict as JSON": (
        {"prompt": "p", "reward_model": {"ground_truth": '{"inputs": 3}'}},
        "p",
        None,
    ),
    "a list as JSON": ({"prompt": "p", "reward_model": {"ground_truth": '["8"]'}}, "p", "8"),
    "solution, number": ({"problem": "p", "solution": "128"}, "p", "128"),
    "solution, formula": ({"problem": "p", "solution": "$4$"}, "p", "$4$"),
    "solution, fraction": ({"problem": "p", "solution": r"\frac{1}{2}"}, "p", r"\frac{1}{2}"),
    "solution, integer": ({"problem": "p", "solution": 128}, "p", "128"),
    "solution, words": ({"problem": "p", "solution": "Left to the reader."}, "p", None),
    "solution, word": ({"problem": "p", "solution": "omitted"}, "p", None),
    "answer in a box": ({"problem": "p", "answer": r"So $x = \boxed{5}$."}, "p", "5"),
    "proof": ({"problem": "p", "answer": "proof", "solution": r"\boxed{3}"}, "p", None),
    "notfound": ({"problem": "p", "answer": "notfound", "solution": "3"}, "p", None),
    "MMLU": ({"question": "p", "choices": COLOURS, "answer": 1}, LETTERED, "B"),
    "MMLU-Pro": (
        {"question": "p", "options": COLOURS, "answer": "C", "answer_index": 2},
        LETTERED,
        "C",
    ),
    "ARC": (
        {"question": "p", "choices": {"text": COLOURS, "label": [*"123"]}, "answerKey": "3"},
        LETTERED,
        "C",
    ),
    "AQuA": (
        {"question": "p", "options": ["A)red", "B)green", "C)blue"], "correct": "A"},
        LETTERED,
        "A",
    ),
    "MedQA": (
        {"question": "p", "options": dict(zip("ABC", COLOURS, strict=True)), "answer": "green"},
        LETTERED,
        "B",
    ),
    "AGIEval": ({"query": LETTERED, "choices": ["(A)red", "(B)green"], "gold": [1]}, LETTERED, "B"),
    "numbers to choose": (
        {"question": "p", "choices": [3, 1], "answer": 1},
        "p\n(A) 3\n(B) 1",
        "B",
    ),
    "texts of numbers": (
        {"question": "p", "choices": ["1", "3"], "answer": "1"},
        "p\n(A) 1\n(B) 3",
        "A",
    ),
    "none of the choices": (
        {"question": "p", "choices": COLOURS, "answer": "pink"},
        LETTERED,
        None,
    ),
    "no choices": ({"question": "p", "choices": None, "answer": "3"}, "p", "3"),
    "choices after messages": (
        {"messages": [SYSTEM, USER], "choices": COLOURS, "answer": "a"},
        [SYSTEM, {"role": "user", "content": LETTERED}],
        "A",
    ),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", [*SCHEMAS, *FORMS])
def test_forms(name, suffix, tmp_path):
    row, *expected = {**SCHEMAS, **FORMS}[name]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist([row]), path)
    (found,) = read_rows(path)
    assert problem_of(found) == as_problem(found, path) == Problem(*expected)


@pytest.mark.parametrize(
    "row, said",
    [
        (
            {"question": "q", "choices": "a ) 1 , b ) 2", "answer": "a"},
            "its choices are no list of",
        ),
        ({"question": "q", "choices": [{"x": 1}]}, "its choices are no list of up to 26 texts"),
        ({"prompt": [{"type": "image"}]}, "a message has a part that is not text"),
        ({"messages": [REPLY]}, "a row has no text in any of the columns problem, "),
    ],
)
def test_rows_that_are_not_usable(row, said):
    with pytest.raises(UnusableRow, match=f"^{said}"):
        problem_of(row)


def test_an_answer_is_read_once():
    """An evaluation's own file of problems is read again when it is regraded."""
    for _, _, answer in FORMS.values():
        assert as_answer(answer) == answer


def test_the_letter_is_graded():
    with Grader() as grader:
        texts = [r"\boxed{B}", r"\boxed{(B) green}", r"\boxed{C}", r"\boxed{\text{B}}"]
        assert grader.grade([(text, "B") for text in texts]) == [True, True, False, True]


def test_named_columns():
    row = {"Text": "t", "problem": "p", "label": "so it is #### 4", "answer": 3, "text": "u"}
    assert problem_of(row, Columns("Text", "label")) == Problem("t", "4")
    assert problem_of(row, Columns("TEXT")) == Problem("u", "3")
    assert problem_of(row, Columns(answer="text")) == Problem("p", "u")
    meta = {"query": "q", "response": "Add 1 and 2.\nThe answer is: 3"}
    assert problem_of(meta, Columns(answer="response")) == Problem("q", "3")
    with pytest.raises(UnusableRow, match="^a row has no text in column text$"):
        problem_of({"problem": "p"}, Columns("text"))


@pytest.fixture
def rows(tmp_path):
    """Six rows: without a prompt, without an answer, whole; the last line is no JSON."""
    path = tmp_path / "rows.jsonl"
    found = [{"text": "t"}, {"problem": "p1", "answer": "proof"}]
    found += [{"problem": f"p{i}", "answer": i, "label": -i} for i in (2, 3, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found) + "{\n")
    return path


def test_rows_beyond_the_count_are_not_read(rows, tmp_path):
    found = read_problems(str(rows), count=5)
    assert found[1:] == [Problem("p1"), *(Problem(f"p{i}", str(i)) for i in (2, 3, 4))]
    assert isinstance(found[0], UnusableRow)
    with pytest.raises(UserError, match="^data: cannot read .*: line 6: "):
        read_problems(str(rows), count=6)
    assert problems_of(TrainConfig(prompt_from=rows, prompt_rows=(4, 2))) == [
        Problem("p4", "4"),
        Problem("p2", "2"),
    ]
    table = pa.table({"problem": [f"p{i}" for i in range(3000)], "answer": range(3000)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=1000)
    for count in (1, 1500, 3000, None):
        found = read_rows(tmp_path / "rows.parquet", count=count)
        assert [row["answer"] for row in found] == list(range(count or 3000))


def test_rows_without_an_answer_are_left_out_where_others_have_one(rows):
    task = TaskSettings(data=str(rows), count=5)
    problems, _, told = task.problems()
    assert [problem.prompt for problem in problems] == ["p2", "p3", "p4"]
    assert told.startswith(f"Left out 2 of 5 rows of {rows}: a row has no text in any of the ")
    assert told.endswith("conversations (1), no answer (1)")
    problems, _, told = task.model_copy(update={"count": 2}).problems()
    assert problems == [Problem("p1")] and "Left out 1 of 2 rows" in told


def test_equal_rows_are_one_problem(tmp_path):
    """As in AMC23 with eight copies of each problem; another answer makes another problem."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": " q\n", "answer": "2"}] * 3
    rows.append({"prompt": "p", "answer": "2"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskSettings(data=str(path), template="qwen25-math-cot")
    problems, _, told = task.problems()
    assert [(p.prompt.strip(), p.answer) for p in problems] == [("p", "1"), ("q", "2"), ("p", "2")]
    assert told == f"Left out 4 of 7 rows of {path}: repeats another (4)"
    assert "user\nq<|im_end|>" in task.prompt(problems[1], [])


def test_an_evaluation_is_of_what_is_left(rows, folder, tmp_path, capfd):
    output = tmp_path / "eval"
    asked = ["eval", "--model", str(folder), "--data", str(rows), "--output", str(output)]
    assert main([*asked, "--count", "5", "--max-new-tokens", "2"]) == 0
    stdout, stderr = capfd.readouterr()
    assert " on 3 problems of " in stdout and stderr.startswith("Left out 2 of 5 rows of ")
    assert json.loads((output / "results.json").read_text())["problems"] == 3
    problems = [json.loads(line) for line in (output / "problems.jsonl").open()]
    assert problems == [{"prompt": f"p{i}", "answer": str(i)} for i in (2, 3, 4)]
    assert main(["eval", "--regrade", str(output)]) == 0


def test_settings_of_a_task(rows):
    columns = {"prompt_column": "problem", "answer_column": "LABEL", "system": "Be brief."}
    problems, *_ = TaskSettings(data=str(rows), count=3, **columns).problems()
    assert problems == [Problem([SYSTEM, {"role": "user", "content": "p2"}], "-2")]
    (problem,), *_ = TaskSettings(data="addition", count=1, skip=3, system="Be brief.").problems()
    assert problem.prompt[0] == SYSTEM and problem.prompt[1]["content"].startswith("What is ")


def test_settings_of_a_run(rows, tmp_path):
    given = {"prompt_from": rows, "prompt_rows": (2,), "model": "m"}
    config = TrainConfig(**given, answer="12.699", system="Be brief.", prompt_column="Problem")
    config.check_complete()
    user = {"role": "user", "content": "p2"}
    assert problems_of(config) == [Problem([SYSTEM, user], "12.699")]
    assert problems_of(TrainConfig(**given, answer_column="label")) == [Problem("p2", "-2")]
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": [SYSTEM, user]}) + "\n")
    for system, wanted in (("", "p2"), ("x", [{**SYSTEM, "content": "x"}, user])):
        own = TrainConfig(prompt_from=tmp_path / "own.jsonl", system=system)
        assert problems_of(own) == [Problem(wanted)]
    text = TrainConfig(prompt="p2", system="Be brief.")
    assert problems_of(text) == [Problem([SYSTEM, user])]


def test_a_dataset_is_streamed(tmp_path, monkeypatch):
    """The count's rows alone are read: a later file of the split is damaged."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    table = pa.table({"Question": ["p0", "p1", "p2"], "Answer": ["0", "1", "2"]})
    pyarrow.parquet.write_table(table, folder / "train-00000-of-00002.parquet")
    (folder / "train-00001-of-00002.parquet").write_text("damaged")
    name = str(folder)
    found = read_problems(name, split="train", count=2)
    assert found == [Problem("p0", "0"), Problem("p1", "1")]
    with pytest.raises(UserError, match="^data: cannot open .*name: "):
        read_problems(name, split="train", count=None)
    (folder / "train-00001-of-00002.parquet").unlink()
    for count in (2, None):
        with pytest.raises(UserError) as error:
            read_problems(name, count=count)
        assert (
            str(error.value) == f"split: {name} has no split 'test', but train; add --split train"
        )
    assert read_problems(name, split="train[1:]", count=2) == [
        Problem("p1", "1"),
        Problem("p2", "2"),
    ]


def test_the_command(rows, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["data", str(rows), "--count", "4", "--system", "Be [b]brief."]) == 0
    out, err = capfd.readouterr()
    lines = [line.rstrip() for line in out.splitlines()]
    assert err == "" and max(map(len, out.splitlines())) <= 80
    assert lines[0] == "row 0" and lines[1].startswith("  skipped  a row has no text in any of ")
    at = lines.index("row 2")
    assert lines[at : at + 5] == [
        "row 2",
        "  system  Be [b]brief.",
        "  user    p2",
        "  answer  2",
        "",
    ]
    assert lines[lines.index("row 1") + 3] == "  answer  none"
    assert "4 rows: 3 read, 1 skipped" in lines
    assert any(line.startswith("  1 without an answer  select and eval leave") for line in lines)


def test_the_command_as_json(rows, capfd):
    asked = ["data", str(rows), "--count", "4", "--prompt-column", "text", "--json"]
    assert main([*asked, "--answer-column", "problem"]) == 0
    found = json.loads(capfd.readouterr().out)
    messages = [{"role": "user", "content": "t"}]
    assert found["rows"][0] == {"row": 0, "messages": messages, "answer": None}
    assert (found["read"], found["unanswered"]) == (1, 1)
    assert found["skipped"] == {"a row has no text in column text": 3}


@pytest.mark.parametrize(
    "options, said",
    [
        (["--count", "0"], "count: 0 is less than 1"),
        (
            ["--count", "1"],
            "data: none of .* 1 rows can be used: a row has no text .*columns are text",
        ),
        (
            ["--count", "5", "--prompt-column", "x"],
            "prompt_column: .* has no column 'x'; it has text",
        ),
    ],
)
def test_the_command_refuses(options, said, rows, capfd):
    assert main(["data", str(rows), *options]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.search(f"^em-kernels data: error: {said}", err), err
