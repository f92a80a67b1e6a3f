"""Warnings before training, and runs that stop by themselves."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from training.tiny import make_model, make_tokenizer, read, settings
from transformers import AutoModelForCausalLM

from em_kernels.training.config import TrainConfig
from em_kernels.training.rollouts.sampling import generate
from em_kernels.training.settings import UserError
from em_kernels.training.stopping import doubts, held_out_metrics, why_stop_early
from em_kernels.training.trainer import train


@pytest.mark.parametrize(
    "model, accuracy, entropy, said",
    [
        ("Qwen/Qwen2.5-Math-7B", 0.5, 0.05, None),
        ("Qwen/Qwen2.5-Math-7B", None, 0.05, None),
        ("models/item", 0.5, 0.05, None),
        ("Qwen/Qwen2.5-Math-7B", 0.0, 0.05, "no completion is right"),
        ("Qwen/Qwen2.5-Math-7B", 1.0, 0.05, "all completions are right"),
        ("Qwen/Qwen2.5-Math-7B", 0.5, 0.0042, "the entropy is near 0 (0.0042 nats)"),
        ("Qwen/Qwen2.5-1.5B-Instruct", 0.5, 0.05, "the model is tuned to instructions"),
        ("google/gemma-3-1b-it", 0.0, 0.05, "no completion is right, the model is tuned"),
    ],
)
def test_doubts(model, accuracy, entropy, said):
    found = list(doubts(TrainConfig(model=model), accuracy, entropy))
    assert len(found) == (said is not None)
    assert all(line.startswith(f"Warning: before training {said}") for line in found)
    assert not list(doubts(TrainConfig(model=model, objective="maximise"), accuracy, entropy))


def test_held_out_metrics():
    before, now = np.array([True] * 6 + [False] * 4), np.array([True] + [False] * 8 + [True])
    found = held_out_metrics(before, now)
    assert (found["held_out"], found["held_out_before"]) == (0.2, 0.6)
    assert found["held_out_p"] == pytest.approx((1 + 6) / 2**6)  # 5 or 6 of 6 lost
    assert held_out_metrics(now, before)["held_out_p"] == pytest.approx(1 - 1 / 2**6)
    assert held_out_metrics(now, now)["held_out_p"] == 1


def test_the_best_update_is_named():
    config, common = TrainConfig(stop_on="set.jsonl"), {"entropy": 1.0, "repetition": 0.0}
    rows = [
        {**common, "update": i + 1, "held_out": share, "held_out_before": 0.4, "held_out_p": p}
        for i, (share, p) in enumerate([(0.45, 0.9), (0.3, 0.2), (0.1, 0.02)])
    ]
    assert why_stop_early(config, rows[:2]) == ""
    assert why_stop_early(config, rows) == (
        "accuracy on set.jsonl fell from 40% to 10% (p = 0.02); it was best after update 1, 45%"
    )
    assert "it was best before training, 40%" in why_stop_early(config, rows[1:])


@pytest.fixture(scope="module")
def held_out(folder, tmp_path_factory):
    """Write problems whose answers are what the untrained model says greedily."""
    texts = [f"What is {i} + {i + 1}?" for i in range(12)]
    tokenizer, model = make_tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    config = settings(folder, Path("none"))
    changes = {"temperature": 0.0, "repetition_penalty": 1.0}
    sampling = config.sampling.model_copy(update=changes)
    found = generate(model, tokenizer, tokenizer(texts).input_ids, [(0,)] * 12, sampling)
    rows = [
        {"prompt": text, "answer": tokenizer.decode(r.response_ids, skip_special_tokens=True)}
        for text, r in zip(texts, found, strict=True)
    ]
    path = tmp_path_factory.mktemp("held-out") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(config, resume=False):
    console = Console(file=StringIO(), width=200)
    return train(config, console=console, resume=resume).metrics, console.file.getvalue()


def test_a_fall_on_held_out_problems_stops_a_run(folder, held_out, tmp_path):
    asked = {"stop_on": held_out, "chat_template": False, "steps": 3}
    metrics, told = trained(settings(folder, tmp_path / "gentle", **asked, lr=1e-12))
    assert [row["held_out"] for row in metrics] == [row["held_out_before"] for row in metrics]
    assert metrics[0]["held_out_before"] > 0.7 and len(metrics) == 3 and "Stopped" not in told
    config = settings(folder, tmp_path / "harsh", **asked, lr=0.3)
    metrics, told = trained(config)
    assert len(metrics) == 1 and metrics[0]["held_out"] < 0.3
    assert f"Stopped early: accuracy on {held_out} fell from" in told
    assert "it was best before training" in told
    assert [row["update"] for row in read(tmp_path / "harsh" / "held-out.jsonl")] == [0, 1]
    metrics, told = trained(config, resume=True)
    assert len(metrics) == 1 and "Stopped early: accuracy on" in told


def test_held_out_problems_need_answers(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    config = settings(folder, tmp_path / "run", stop_on=tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="^stop_on: not every problem of .* has an answer"):
        train(config, model=make_model(), console=Console(file=StringIO()))
    assert not (tmp_path / "run").exists()
