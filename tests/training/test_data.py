"""Problems from text, files, the hub and generators, in the schemas of public datasets."""

import copy
import json
from functools import partial

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers.processors import TemplateProcessing

from em_kernels.training.config import TrainConfig
from em_kernels.training.data.columns import Problem
from em_kernels.training.data.problems import (
    as_problem,
    encode,
    few_shot,
    problems_of,
    read_problems,
    read_rows,
)
from em_kernels.training.evaluation.teacher_forcing import known_answers
from em_kernels.training.presets import ADDITION_SHOTS, DEMO_SHOTS
from em_kernels.training.settings import UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 4?"},
]
PARTS = [{"type": "text", "text": text} for text in "pq"]
SCHEMAS = {  # a row; its prompt and answer; test_columns.py reads them, and others
    "MATH-500": ({"problem": "p", "solution": "s", "answer": r"\frac12"}, "p", r"\frac12"),
    "AMC": ({"id": "0", "problem": "p", "answer": "27.0", "question": "q"}, "p", "27.0"),
    "GSM8K": ({"question": "q", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}, "q", "1,005"),
    "OlympiadBench": ({"question": "q", "final_answer": ["$7$"]}, "q", "$7$"),
    "no final answer": ({"question": "q", "final_answer": []}, "q", None),
    "RLVR": ({"prompt": CHAT[:2], "reward_model": {"ground_truth": "5"}}, CHAT[:2], "5"),
    "RLVR, text": ({"problem": "p", "reward_model": {"ground_truth": "12.8"}}, "p", "12.8"),
    "several answers": ({"question": "q", "final_answer": ["1", "-1"]}, "q", "1, -1"),
    "blank answer": ({"question": "q", "answer": " "}, "q", None),
    "blank answer, solution": ({"question": "q", "answer": "", "solution": r"\boxed{5}"}, "q", "5"),
    "several turns": ({"prompt": CHAT}, CHAT, None),
    "one turn": ({"prompt": CHAT[1:2]}, "What is 2 + 3?", None),
    "parts of text": ({"prompt": [{"role": "user", "content": PARTS}]}, "pq", None),
    "prompt alone": ({"prompt": "p"}, "p", None),
    "empty columns": ({"problem": None, "question": "", "prompt": "p", "answer": None}, "p", None),
    "integer": ({"prompt": "p", "answer": 42}, "p", "42"),
    "zero": ({"prompt": "p", "answer": 0}, "p", "0"),
    "float": ({"prompt": "p", "answer": 0.5}, "p", "0.5"),
    "Minerva": ({"problem": "p", "solution": r"\boxed{1}, so $\boxed{3}$, not 4"}, "p", "3"),
    "solution, answer": ({"problem": "p", "solution": r"\boxed{1}", "answer": "2"}, "p", "2"),
    "a solution without a box": ({"problem": "p", "solution": "so it is 3"}, "p", None),
}


def test_lines_end_at_newlines_only(tmp_path):
    """JSON does not escape U+2028 or U+0085; lines may end in CR LF or be blank."""
    texts = ["a\u2028b", "c\u0085d\u2029", "é\x7f"]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(("\r\n".join(lines) + "\n\n  \n").encode())
    assert [row["prompt"] for row in read_rows(path)] == texts


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    rows, path = [{"prompt": "p"}], tmp_path / name
    path.write_text(json.dumps(rows if name == "rows.json" else rows[0]), encoding="utf-8-sig")
    assert read_rows(path) == rows


def test_rows_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "answer": {i}}}\n' for i in range(5)))
    config = TrainConfig(prompt_from=path, prompt_rows=("3", "0:2", 3))
    assert config.prompt_rows == (3, 0, 1, 3)
    assert problems_of(config) == [Problem(f"p{i}", str(i)) for i in (3, 0, 1, 3)]
    with pytest.raises(UserError, match="prompt_rows: 5 is not in .* has 5 rows"):
        problems_of(TrainConfig(prompt_from=path, prompt_rows=(0, 5)))


def test_only_the_chosen_rows_need_a_prompt(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": 1}\n{"prompt": "p"}\n')
    assert problems_of(TrainConfig(prompt_from=path, prompt_rows=(1,))) == [Problem("p")]


def test_prompt_as_text():
    assert problems_of(TrainConfig(prompt=" p\n", answer="3")) == [Problem(" p\n", "3")]


def test_encode(tokenizer):
    raw = encode(tokenizer, " the abc\n", chat_template=False)
    assert tokenizer.decode(raw) == " the abc\n"
    chat = encode(tokenizer, "the", chat_template=True)
    assert tokenizer.decode(chat) == "<|user|>the<|end|><|assistant|>" and len(chat) == 4


def test_a_prompt_is_tokenised_whole(tokenizer):
    """Tokenised in parts, it would have other tokens."""
    ids = encode(tokenizer, "ab" + "c\n" + "\n", chat_template=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["abc", "ĊĊ"]


def test_begin_token_of_the_tokenizer_once(demo):
    _, tokenizer = demo
    ids = encode(tokenizer, "Hi", chat_template=True)
    text = tokenizer.decode(ids)
    assert text.count("<|im_start|>user\nHi<|im_end|>") == 1
    assert text.endswith("<|im_start|>assistant\n") and text.startswith("<|im_start|>system")


def test_template_kwargs(tokenizer):
    template = "{{ messages[0].content }}{% if deep %} abc{% endif %}"
    plain = encode(tokenizer, "the", True)
    assert encode(tokenizer, "the", True, {"tokenize": True}) == plain
    tokenizer.chat_template = template
    texts = [tokenizer.decode(encode(tokenizer, "the", True, {"deep": d})) for d in (True, False)]
    tokenizer.chat_template = "{{ raise_exception('no role ' ~ messages[0].role) }}"
    with pytest.raises(UserError, match="^chat_template: it refuses the prompt: no role user;"):
        encode(tokenizer, "the", True)
    assert texts == ["the abc", "the"]


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "the"}
ASSISTANT = {"role": "assistant", "content": "so abc"}


def test_conversations(tokenizer):
    """Every message is kept, in order; a last message of the assistant's is continued."""
    ask = partial(encode, tokenizer, chat_template=True)
    system = "<|system|>Be brief.<|end|>"
    assert tokenizer.decode(ask([SYSTEM, USER])) == f"{system}<|user|>the<|end|><|assistant|>"
    turns = f"{system}<|user|>the<|end|><|assistant|>so abc"
    assert tokenizer.decode(ask([SYSTEM, USER, ASSISTANT])) == turns
    again = f"{turns}<|end|><|user|>the<|end|><|assistant|>"
    assert tokenizer.decode(ask([SYSTEM, USER, ASSISTANT, USER])) == again
    assert ask([USER]) == ask("the")
    with pytest.raises(UserError, match="^prompt: is a conversation of 2 messages, which only"):
        encode(tokenizer, [SYSTEM, USER], chat_template=False)
    with pytest.raises(UserError, match="^template: few-shot takes prompts of one text"):
        few_shot([], Problem([SYSTEM, USER]))


def test_what_a_template_cannot_take_is_refused(monkeypatch, tokenizer):
    last = "{{ messages[-1].content }}"
    monkeypatch.setattr(tokenizer, "chat_template", last)
    with pytest.raises(UserError, match="the chat template leaves out what the system says;"):
        encode(tokenizer, [SYSTEM, USER], chat_template=True)
    thought = {"role": "assistant", "content": "<think>3 + 4</think>7"}
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}7" + last)
    assert tokenizer.decode(encode(tokenizer, [USER, thought, USER], True)) == "the7the"


@pytest.mark.parametrize(
    "answer",
    [float("nan"), False, True, {"value": 5}, [], " ", float("inf"), ["5", None], None],
    ids=str,
)
def test_answers_that_are_none(answer):
    assert as_problem({"prompt": "p", "answer": answer}, "row 0") == Problem("p")
    later = {"prompt": "p", "answer": answer, "ground_truth": 7}
    assert as_problem(later, "row 0") == Problem("p", "7")


@pytest.mark.parametrize("box", [r"\boxed{5}", r"\boxed 5", r"\fbox{5}", r"$\boxed {5}$."])
def test_answer_of_a_solution(box):
    assert as_problem({"problem": "p", "solution": f"2 + 3 is {box}"}, "row 0") == Problem("p", "5")


def test_a_prompt_never_ends_in_eos(tokenizer):
    """T5's tokenizer and others append EOS, which is dropped unless the user wrote it."""
    appending = copy.deepcopy(tokenizer)
    appending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A <|end|>", special_tokens=[("<|pad|>", 2), ("<|end|>", 0)]
    )
    assert appending("the").input_ids[-1] == tokenizer.eos_token_id
    for text in ("the", "the<|end|>", "<|end|>", ""):
        ids = encode(appending, text, chat_template=False)
        assert ids == [2, *encode(tokenizer, text, chat_template=False)]
    known = known_answers(appending, ["Q: a\nA:"], [" 3\n"])
    assert known[0].response_ids == known_answers(tokenizer, ["Q: a\nA:"], [" 3\n"])[0].response_ids


def test_few_shot():
    shots = [Problem(f"What is {a} + {b}?", "", f"{a} + {b} = {a + b}") for a, b in ADDITION_SHOTS]
    text = few_shot(shots, Problem("What is 38 + 45?"))
    assert text == f"{DEMO_SHOTS}Q: What is 38 + 45?\nA:"
    assert few_shot([], Problem("p")) == "Q: p\nA:"
    assert few_shot([Problem("a", "3")], Problem("p")) == "Q: a\nA: 3\n\nQ: p\nA:"


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_addition(seed):
    """The worked examples come first, then every sum of two two-digit numbers once."""
    count = 90 * 90 + 1  # The first worked example, 12 + 7, is not one of the 90 * 90 sums.
    found = read_problems("addition", count=count, seed=seed)
    numbers = [tuple(map(int, p.prompt[len("What is ") : -1].split(" + "))) for p in found]
    assert tuple(numbers[:2]) == ADDITION_SHOTS
    assert len(set(numbers)) == len(numbers) and numbers[2:] != sorted(numbers[2:])
    assert all(10 <= n <= 99 for pair in numbers[1:] for n in pair)
    for problem, (a, b) in zip(found, numbers, strict=True):
        assert problem == Problem(f"What is {a} + {b}?", str(a + b), f"{a} + {b} = {a + b}")
    assert found[:300] == read_problems("addition", count=300, seed=seed)
    other = read_problems("addition", count=300, seed=seed + 1)
    assert found[:2] == other[:2] and len(set(found[2:300]) & set(other[2:])) < 100
    assert len(read_problems("addition", count=None)) == 1000
    with pytest.raises(UserError, match="^count: addition has 8101 problems, 8102 are asked for$"):
        read_problems("addition", count=8102)


def test_a_reasoning_gym_task():
    found = read_problems("gym:products?min_digits=1&max_digits=1", count=80, seed=4)
    assert len({problem.prompt for problem in found}) == 80  # There are a hundred.
    for problem in found:
        a, b = problem.prompt.split(": ")[1].split(".")[0].split(" * ")
        assert int(a) * int(b) == int(problem.answer) and len(a + b) == 2
    again = read_problems("gym:products?min_digits=1&max_digits=1", count=30, seed=4)
    assert again == found[:30]
    other = set(read_problems("gym:products", count=300, seed=5))
    assert len(other & set(read_problems("gym:products", count=300, seed=4))) < 30
    assert len(read_problems("gym:products", count=None)) == 1000


@pytest.mark.parametrize(
    "source, said",
    [
        ("gym:letter_countin", r"no task 'letter_countin'; it has letter_counting\b"),
        ("gym:", "no task ''; it has ab, "),
        ("gym:products?max_digits=0", "gym:products.max_digits=0: .*max_digits"),
        ("gym:products?digits=1", "unexpected keyword argument 'digits'"),
        ("gym:products?max_digits=two", "gym:products.max_digits=two: "),
        ("gym:products?max_digits=[", "is not TASK.setting=value"),
        ("gym:products?max_digits", "is not TASK.setting=value"),
        ("gym:graph_color", "gym:graph_color has no one right answer"),  # It has no answer.
        ("gym:countdown", "gym:countdown has no one right answer"),  # Its answer is one of many.
        ("missing.jsonl", "cannot read missing.jsonl"),
        ("missing.parquet", "cannot read missing.parquet"),
        ("missing/folder/", "cannot open missing/folder/: "),
        ("nobody/no-such-dataset", "cannot open nobody/no-such-dataset: "),
    ],
)
def test_refused_sources(source, said, monkeypatch):
    for module in (datasets.config, huggingface_hub.constants):  # as HF_HUB_OFFLINE=1 has it
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"^data: .*{said}") as error:
        read_problems(source, count=3)
    assert "\n" not in str(error.value)


def test_a_task_with_too_few_problems():
    with pytest.raises(UserError, match="^count: gym:coin_flip.* has 8 problems, 9 are asked for"):
        read_problems("gym:coin_flip?min_trials=3&max_trials=3", count=9)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_dataset(suffix, tmp_path, cache):
    """load_dataset accepts a folder as well as a name on the hub."""
    rows = {
        split: [{"question": f"{split} {i}?", "answer": f"so\n#### {i}"} for i in range(count)]
        for split, count in (("test", 3), ("train", 5))
    }
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split, found in rows.items():
        if suffix == "jsonl":
            text = "".join(json.dumps(row) + "\n" for row in found)
            (folder / f"{split}.jsonl").write_text(text)
        else:
            pyarrow.parquet.write_table(
                pa.Table.from_pylist(found), folder / f"{split}-00000-of-00001.parquet"
            )
    name = str(folder)
    assert read_problems(name, count=None) == [Problem(f"test {i}?", str(i)) for i in range(3)]
    assert read_problems(name, split="train", count=2) == [
        Problem("train 0?", "0"),
        Problem("train 1?", "1"),
    ]
    for options, said in (
        ({"split": "dev"}, "^split: .* has no split 'dev', but train, test; add --split train"),
        ({"split": "dev", "count": 1}, "^split: .* has no split 'dev', but train, test; add"),
        ({"subset": "algebra"}, "^data: cannot open .*algebra"),
        ({"count": 4}, "^count: .* has 3 problems, 4 are asked for"),
    ):
        with pytest.raises(UserError, match=said):
            read_problems(name, **{"count": None, **options})


def test_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "answer": {i}}}\n' for i in range(5)))
    assert read_problems(str(path), count=None) == [Problem(f"p{i}", str(i)) for i in range(5)]
    assert read_problems(str(path), count=2) == [Problem("p0", "0"), Problem("p1", "1")]
    with pytest.raises(UserError, match="^count: .* has 5 problems, 6 are asked for"):
        read_problems(str(path), count=6)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="^data: cannot read .*: maximum recursion depth exceeded"):
        read_problems(str(path), count=None)
    path.write_text("\n")
    with pytest.raises(UserError, match="^data: .* has no rows"):
        read_problems(str(path), count=None)
    for row, said in (
        ('{"text": "p"}', "a row has no text in any of the columns problem, question, prompt"),
        ("3", "a row is int, not an object"),
        (r'{"prompt": "\ud800"}', "the prompt is not text in UTF-8"),
    ):
        path.write_text('{"prompt": "p"}\n' + row + "\n")
        problem, unusable = read_problems(str(path), count=None)
        assert problem == Problem("p") and str(unusable).startswith(said)
        path.write_text(row + "\n")
        with pytest.raises(UserError, match=f"^data: none of {path}'s 1 rows can be used: {said}"):
            read_problems(str(path), count=None)


def test_a_json_list(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "p", "answer": 1}, {"prompt": "q"}], indent=1))
    assert read_problems(str(path), count=None) == [Problem("p", "1"), Problem("q")]
    path.rename(tmp_path / "rows")
    with pytest.raises(UserError, match="^data: .*rows is neither .jsonl nor .parquet"):
        read_problems(str(tmp_path / "rows"), count=None)


def test_evaluation_files(evaluation):
    path, rows = evaluation
    found = read_problems(str(path), count=None)
    assert len(found) == rows and len(set(found)) == rows
    assert all(problem.prompt.strip() and problem.answer for problem in found)
    assert all(len(problem.answer) < 300 and "boxed" not in problem.answer for problem in found)
