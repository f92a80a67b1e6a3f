"""Problems from text and files, in the schemas that are met in the wild."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from em_kernels.training.config import TrainConfig, UserError
from em_kernels.training.data import Problem, as_problem, encode, problems_of, read_rows

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 4?"},
]
SCHEMAS = {
    "MATH-500": (
        {"problem": "p", "solution": "s", "answer": r"\frac{1}{2}"},
        ("p", r"\frac{1}{2}"),
    ),
    "AMC": ({"id": "0", "problem": "p", "answer": "27.0", "question": "q"}, ("p", "27.0")),
    "GSM8K": ({"question": "q", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}, ("q", "1,005")),
    "OlympiadBench": ({"question": "q", "final_answer": ["$7$"]}, ("q", "$7$")),
    "no final answer": ({"question": "q", "final_answer": []}, ("q", None)),
    "RLVR": (
        {"prompt": CHAT[:2], "reward_model": {"ground_truth": "5", "style": "rule"}},
        ("What is 2 + 3?", "5"),
    ),
    "RLVR, text": ({"problem": "p", "reward_model": {"ground_truth": "12.8"}}, ("p", "12.8")),
    "several turns": ({"prompt": CHAT}, ("And 4?", None)),
    "prompt alone": ({"prompt": "p"}, ("p", None)),
    "empty columns": (
        {"problem": None, "question": "", "prompt": "p", "answer": None},
        ("p", None),
    ),
    "integer": ({"prompt": "p", "answer": 42}, ("p", "42")),
    "zero": ({"prompt": "p", "answer": 0}, ("p", "0")),
    "float": ({"prompt": "p", "answer": 0.5}, ("p", "0.5")),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(name, suffix, tmp_path):
    row, expected = SCHEMAS[name]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist([row]), path)
    (found,) = read_rows(path)
    assert as_problem(found, path) == Problem(*expected)


def test_lines_end_at_newlines_only(tmp_path):
    """JSON leaves U+2028, U+0085 and their like as they are; lines may end in CR LF or be blank."""
    texts = ["a\u2028b", "c\u0085d\u2029", "é\x7f"]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(("\r\n".join(lines) + "\n\n  \n").encode())
    assert [row["prompt"] for row in read_rows(path)] == texts


def test_rows_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "answer": {i}}}\n' for i in range(5)))
    config = TrainConfig(prompt_from=path, prompt_rows=(3, 0, 3))
    assert problems_of(config) == [Problem("p3", "3"), Problem("p0", "0"), Problem("p3", "3")]
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
    assert tokenizer.convert_ids_to_tokens(chat) == [
        "<|user|>",
        "the",
        "<|end|>",
        "<|assistant|>",
    ]


def test_a_prompt_is_tokenised_whole(tokenizer):
    """Its parts alone would give other tokens."""
    ids = encode(tokenizer, "ab" + "c\n" + "\n", chat_template=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["abc", "ĊĊ"]


def test_begin_token_of_the_tokenizer_once(demo):
    _, tokenizer = demo
    ids = encode(tokenizer, "Hi", chat_template=True)
    text = tokenizer.decode(ids)
    assert text.count("<|im_start|>user\nHi<|im_end|>") == 1
    assert text.endswith("<|im_start|>assistant\n") and text.startswith("<|im_start|>system")
