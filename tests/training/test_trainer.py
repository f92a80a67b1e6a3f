"""Updates against plain torch in fp64, repeated runs, and a run's folder."""

import json
import shutil
from io import StringIO

import pytest
import torch
import yaml
from rich.console import Console
from torch.testing import assert_close
from training.test_step import plain_loss
from training.tiny import (
    PLAIN,
    TRAINING_TEXT,
    make_model,
    make_tokenizer,
    read,
    rounded,
    run,
    settings,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from em_kernels.training.config import read_yaml
from em_kernels.training.models.loading import load_model
from em_kernels.training.rollouts.sampling import Rollout
from em_kernels.training.settings import UserError
from em_kernels.training.trainer import train

TIMES = {"tokens_per_s", "sampling_s", "training_s", "peak_memory_gib", "rollout_batch"}


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_fresh_prompts(folder, tmp_path):
    """Updates have other rows until too few are left, also in a run that is resumed."""
    pool = tmp_path / "pool.jsonl"
    texts = ["What is 2 + 3?", "Hello", "the abc\n\nthe", "abc", "1 2 3"]
    pool.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    asked = {"prompt": None, "prompt_from": pool, "prompt_rows": ["0:5"], "fresh_prompts": 2}
    asked |= {"chat_template": False, "rollouts": 4}
    config = settings(folder, tmp_path / "run", **asked, steps=3)
    assert config.prompt_rows == (0, 1, 2, 3, 4)
    run(config)
    longer = config.model_copy(update={"steps": 5})
    assert len(train(longer, console=Console(file=StringIO()), resume=True).metrics) == 5
    prompts, records = make_tokenizer()(texts).input_ids, read(tmp_path / "run" / "rollouts.jsonl")
    dealt = []
    for update in range(1, 6):
        ids = [row["prompt_ids"] for row in records if row["update"] == update]
        assert ids[:2] == ids[2:] and ids[0] != ids[1]
        dealt += [prompts.index(row) for row in ids[:2]]
    assert len(set(dealt[:4])) == len(set(dealt[4:8])) == 4 and dealt[:4] != dealt[4:8]


@pytest.mark.parametrize("clip", [0.05, 1e6], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("kind, tied", [("llama", True), ("qwen2", False)])
def test_updates_are_a_plain_torch_loop(kind, tied, clip, folder, tmp_path):
    """Replay the tokens of rollouts.jsonl, of prompts of different length, in plain torch."""
    pool = tmp_path / "pool.jsonl"
    texts = ["What is 2 + 3?", "Hello", "the abc\n\nthe"]
    pool.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    config = settings(
        folder,
        tmp_path / "run",
        prompt=None,
        prompt_from=pool,
        prompt_rows=(0, 1, 2),
        chat_template=False,
        steps=3,
        rollouts=7,
        lr=1e-2,
        betas=(0.8, 0.99),
        eps=1e-6,
        weight_decay=0.1,
        clip=clip,
        loss_temperature=0.7,
        micro_batch=60,
    )
    trained = make_model(kind, tied=tied, dtype=torch.float64)
    metrics = run(config, trained).metrics
    records = read(tmp_path / "run" / "rollouts.jsonl")
    plain = make_model(kind, tied=tied, dtype=torch.float64)
    optimizer = torch.optim.AdamW(
        plain.parameters(), lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1
    )
    prompts = make_tokenizer()(texts).input_ids
    for update in (1, 2, 3):
        rows = [row for row in records if row["update"] == update]
        assert [row["prompt_ids"] for row in rows] == [prompts[i % 3] for i in range(7)]
        rollouts = [Rollout(r["prompt_ids"], r["response_ids"], r["ended"]) for r in rows]
        loss = plain_loss(plain, rollouts, 0.7)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
        assert metrics[update - 1]["entropy"] == pytest.approx(loss.item(), rel=1e-6)
        assert metrics[update - 1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
        assert (norm > clip) == (clip < 1)
    for name, weight in plain.state_dict().items():
        assert_close(trained.state_dict()[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def comparable(metrics):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics]


def test_same_settings_same_run_other_seed_another(folder, tmp_path):
    first = run(settings(folder, tmp_path / "a"))
    again = run(settings(folder, tmp_path / "b", rollout_batch=6))
    other = run(settings(folder, tmp_path / "c", seed=16))
    assert comparable(first.metrics) == comparable(again.metrics)
    text = {name: (tmp_path / name / "rollouts.jsonl").read_text() for name in "abc"}
    assert text["a"] == text["b"]
    ids = {
        name: {tuple(row["response_ids"]) for row in read(tmp_path / name / "rollouts.jsonl")}
        for name in "ac"
    }
    assert len(ids["a"]) == 12 and not ids["a"] & ids["c"]
    mine, same = weights_of(first.checkpoint), weights_of(again.checkpoint)
    assert all(torch.equal(mine[name], same[name]) for name in mine)
    assert not torch.equal(mine["lm_head.weight"], weights_of(other.checkpoint)["lm_head.weight"])


def test_a_model_trained_twice_is_its_own_afterwards(folder, tmp_path):
    """An earlier run's hooks no longer take the model's gradients."""
    model = make_model()
    run(settings(folder, tmp_path / "a"), model)
    fresh = run(settings(folder, tmp_path / "b", steps=1), make_model()).metrics[0]["entropy"]
    assert run(settings(folder, tmp_path / "c", steps=1), model).metrics[0]["entropy"] != fresh
    model(torch.tensor([[1, 2]])).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_what_a_run_leaves(folder, tmp_path, tokenizer):
    output = tmp_path / "deep" / "run"
    config = settings(folder, output, answer="5", steps=3, save_at=(1,))
    model = load_model(str(folder), config.dtype, config.attention, torch.device("cpu"))
    result = run(config, model)
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "rollouts.jsonl",
    ]
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert kept == ["step-00001", "step-00003"]
    assert read_yaml(output / "config.yaml") == config
    rows = read(output / "metrics.jsonl")
    assert rows == result.metrics and [row["update"] for row in rows] == [1, 2, 3]
    records = read(output / "rollouts.jsonl")
    assert [(r["update"], r["index"]) for r in records] == [
        (u, i) for u in (1, 2, 3) for i in range(6)
    ]
    chat = f"<|user|>{TRAINING_TEXT}<|end|><|assistant|>"
    assert {tokenizer.decode(record["prompt_ids"]) for record in records} == {chat}
    for row in rows:
        mine = [record for record in records if record["update"] == row["update"]]
        assert row["tokens"] == sum(len(record["response_ids"]) for record in mine)
        assert row["mean_length"] == row["tokens"] / 6
        assert row["ended"] == sum(record["ended"] for record in mine) / 6
        assert row["accuracy"] == sum(record["correct"] for record in mine) / 6
        assert 0 < row["entropy"] < 5.6 and row["tokens_per_s"] > 0 and row["peak_memory_gib"] > 0
    for record in records:
        text = tokenizer.decode(record["response_ids"], skip_special_tokens=True)
        assert record["text"] == text
    saved = weights_of(result.checkpoint)
    assert result.checkpoint == output / "checkpoints" / "step-00003"
    trained = {name: rounded(weight) for name, weight in model.state_dict().items()}
    assert all(torch.equal(saved[name], weight) for name, weight in trained.items())
    one = run(settings(folder, tmp_path / "one", steps=1)).checkpoint
    early = weights_of(output / "checkpoints" / "step-00001")
    assert all(torch.equal(early[name], weight) for name, weight in weights_of(one).items())
    again = AutoTokenizer.from_pretrained(result.checkpoint)
    assert again(chat).input_ids == tokenizer(chat).input_ids
    assert again.chat_template == tokenizer.chat_template and again.eos_token == "<|end|>"


def test_without_an_answer_there_is_no_accuracy(folder, tmp_path):
    result = run(settings(folder, tmp_path / "run", steps=1))
    assert result.metrics[0]["accuracy"] is None
    assert all(record["correct"] is None for record in read(tmp_path / "run" / "rollouts.jsonl"))


def test_published_generation_config_is_kept(folder, tmp_path):
    """Flags of sampling without do_sample, as Llama 2 has them, are refused by strict saving."""
    published = {"eos_token_id": [0, 9], "temperature": 0.6, "top_p": 0.9}
    (shutil.copytree(folder, tmp_path / "model") / "generation_config.json").write_text(
        json.dumps(published)
    )
    result = run(settings(tmp_path / "model", tmp_path / "run", steps=1))
    kept = GenerationConfig.from_pretrained(result.checkpoint)
    assert (kept.eos_token_id, kept.temperature, kept.top_p) == ([0, 9], 0.6, 0.9)


def test_config_file_reproduces_the_run(folder, tmp_path):
    sampling = PLAIN.model_copy(update={"stop": ("\n", "é|"), "temperature": 0.9})
    text = "Ünïcödé: {yes}\n\t'quoted' # no comment"
    config = settings(folder, tmp_path / "a", prompt=text, sampling=sampling, save_at=(1,))
    run(config)
    values = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text(encoding="utf-8"))
    assert values["prompt"] == text and values["sampling"]["stop"] == ["\n", "é|"]
    again = read_yaml(tmp_path / "a" / "config.yaml")
    assert again == config
    run(again.model_copy(update={"output": tmp_path / "b"}))
    rollouts = [(tmp_path / name / "rollouts.jsonl").read_text() for name in "ab"]
    assert rollouts[0] == rollouts[1]


def test_every_update_draws_anew(folder, tmp_path):
    run(settings(folder, tmp_path / "run", lr=1e-30))
    ids = [tuple(row["response_ids"]) for row in read(tmp_path / "run" / "rollouts.jsonl")]
    assert len(set(ids)) == len(ids) == 12


def test_early_stop(folder, tmp_path):
    config = settings(folder, tmp_path / "run", steps=60, lr=2e-3, stop_below=0.9)
    result = run(config)
    entropies = [row["entropy"] for row in result.metrics]
    assert 1 < len(entropies) < 60
    assert entropies[-1] < 0.9 * entropies[0] <= min(entropies[:-1])
    assert result.checkpoint.name == f"step-{len(entropies):05d}"


@pytest.mark.parametrize("name", ["file", "empty file", "folder", ".hidden"])
def test_occupied_output_is_refused_and_untouched(name, folder, tmp_path):
    output = tmp_path / "run"
    if name == "empty file":
        output.touch()
    else:
        output.mkdir()
        (output / "kept").mkdir() if name == "folder" else (output / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"output: .*run already holds"):
        run(settings(folder, output))
    assert sorted(tmp_path.rglob("*")) == before


def test_empty_output_is_taken(folder, tmp_path):
    assert run(settings(folder, tmp_path, steps=1)).checkpoint.parent.parent == tmp_path


def test_gradient_checkpointing_gives_the_same_run(folder, tmp_path):
    plain = run(settings(folder, tmp_path / "a"))
    less = run(settings(folder, tmp_path / "b", gradient_checkpointing=True))
    assert comparable(plain.metrics) == comparable(less.metrics)


def test_bfloat16_compute_keeps_fp32_masters(folder, tmp_path):
    """At a rate that moves few bf16 weights, ten updates move more."""
    exact = run(settings(folder, tmp_path / "a", steps=1, rollouts=16))
    half = run(settings(folder, tmp_path / "b", steps=1, rollouts=16, dtype="bfloat16"))
    assert half.metrics[0]["entropy"] != exact.metrics[0]["entropy"]
    assert half.metrics[0]["entropy"] == pytest.approx(exact.metrics[0]["entropy"], rel=0.05)
    slow = {"lr": 3e-5, "dtype": "bfloat16", "rollouts": 2, "weight_decay": 0, "save_at": (1,)}
    many = run(settings(folder, tmp_path / "c", steps=10, **slow))
    start = make_model(dtype=torch.bfloat16).state_dict()
    once = weights_of(many.checkpoint.with_name("step-00001"))
    moved = [
        sum(int((found[name] != start[name]).sum()) for name in start)
        for found in (once, weights_of(many.checkpoint))
    ]
    assert moved[1] > 3 * moved[0]


def test_entropy_falls(folder, tmp_path):
    metrics = run(settings(folder, tmp_path / "run", steps=8, rollouts=16, lr=3e-3)).metrics
    assert metrics[-1]["entropy"] < 0.9 * metrics[0]["entropy"]
