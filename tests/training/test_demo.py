"""The demo's problems and verdicts, and the whole of it on a model too small to add."""

import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from training.tiny import save_tiny
from transformers import AutoModelForCausalLM

from em_kernels.training import demo as demo_module
from em_kernels.training.config import UserError
from em_kernels.training.data import encode
from em_kernels.training.demo import HELD_OUT, POOL, addition, addition_problems, run_demo
from em_kernels.training.grading import is_correct
from em_kernels.training.trainer import TrainResult


def question(problem):
    """The two numbers asked for."""
    words = problem.prompt.rsplit("What is ", 1)[1].split("?")[0].split(" + ")
    return tuple(map(int, words))


@pytest.mark.parametrize("seed", [0, 1, 15])
def test_problems_are_distinct_and_have_their_answers(seed):
    problems = addition_problems(seed, POOL + HELD_OUT)
    assert problems == addition_problems(seed, POOL + HELD_OUT)
    assert problems != addition_problems(seed + 1, POOL + HELD_OUT)
    numbers = [question(problem) for problem in problems]
    assert len(set(numbers)) == len(numbers) == 224
    assert not set(numbers) & {(12, 7), (23, 45)}
    assert all(10 <= n <= 99 for pair in numbers for n in pair)
    assert all(problem.answer == str(sum(question(problem))) for problem in problems)


def test_prompt_as_the_model_reads_it(demo):
    """Raw text that ends where the answer's own blank begins, one token a digit."""
    _, tokenizer = demo
    problem = addition(31, 52)
    ids = encode(tokenizer, problem.prompt, chat_template=False)
    assert ids == tokenizer(problem.prompt).input_ids
    assert tokenizer.decode(ids) == problem.prompt
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == ["Ċ", "A", ":"]
    assert is_correct(" 31 + 52 = 83\n", problem.answer)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A random model in the place of the 135M one; a few problems."""
    folder = save_tiny(tmp_path / "model", max_position_embeddings=256)
    monkeypatch.setattr(demo_module, "fetch_demo", lambda: folder)
    monkeypatch.setattr(demo_module, "POOL", 3)
    monkeypatch.setattr(demo_module, "SAMPLES", 2)
    monkeypatch.setattr(demo_module, "HELD_OUT", 10)


def test_the_whole_demo(small, tmp_path):
    output = tmp_path / "run"
    text = StringIO()
    report = run_demo(4, output, Console(file=text, width=100))
    assert json.loads((output / "demo.json").read_text()) == report
    problems = addition_problems(4, 13)
    assert report["prompt"] in [problem.prompt for problem in problems[:3]]
    assert [len(report["before"][t]) for t in ("0.0", "1.0", "0.5", "0.25")] == [10] * 4
    assert [len(report["after"][t]) for t in ("0.0", "1.0")] == [10] * 2
    updates = len(report["metrics"])
    assert 1 <= updates <= 5
    AutoModelForCausalLM.from_pretrained(output / "checkpoints" / f"step-{updates:05d}")
    said = text.getvalue()
    for part in (
        "of 3 prompts",
        "before, greedy:",
        "after, T = 1:",
        "Greedy accuracy",
        str(output),
    ):
        assert part in said
    with pytest.raises(UserError, match="already holds"):
        run_demo(4, output, Console(file=text))


def test_bad_seed(small, tmp_path):
    with pytest.raises(UserError, match="seed: -1"):
        run_demo(-1, tmp_path / "run", Console(file=StringIO()))
    assert not (tmp_path / "run").exists()


def right(count):
    return np.arange(200) < count


@pytest.mark.parametrize(
    "after, said",
    [
        (130, "rose by 15.0 points, more than chance explains (p = 1.9e-09)"),
        (85, "fell by 7.5 points, more than chance explains"),
        (105, "changed by +2.5 points, which 200 problems cannot tell from no change"),  # p = 0.06
        (100, "changed by +0.0 points, which 200 problems cannot tell"),
    ],
)
def test_verdict_of_greedy_accuracy(after, said):
    before = {0.0: right(100), 1.0: right(60), 0.5: right(80), 0.25: right(90)}
    result = TrainResult(None, metrics=[{"entropy": 0.5}, {"entropy": 0.25}])
    text = demo_module._reading(before, {0.0: right(after), 1.0: right(95)}, result)
    assert f"Greedy accuracy {said}" in text
    assert "at T = 0.25 gives 45.0 %" in text and "not distinguishable from that" in text
    assert "from 0.500 to 0.250 nats in 2 updates" in text


@pytest.mark.parametrize("after, relation", [(120, "is above that"), (60, "is below that")])
def test_verdict_of_sampled_accuracy(after, relation):
    before = {0.0: right(100), 1.0: right(50), 0.5: right(90), 0.25: right(80)}
    result = TrainResult(None, metrics=[{"entropy": 0.5}])
    text = demo_module._reading(before, {0.0: right(100), 1.0: right(after)}, result)
    assert "at T = 0.5 gives 45.0 %" in text and relation in text
