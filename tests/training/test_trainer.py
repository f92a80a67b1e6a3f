"""The update against plain torch in fp64; replays; what a run leaves."""

import json
import shutil

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from training.tiny import (
    PLAIN,
    TRAINING_TEXT,
    make_model,
    make_tokenizer,
    read,
    run,
    settings,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from em_kernels.hf import head_of
from em_kernels.training.config import UserError, read_yaml
from em_kernels.training.rollout import Rollout
from em_kernels.training.setup import load_model, make_accelerator
from em_kernels.training.trainer import (
    StopRequest,
    entropy_step,
    micro_batches,
    padded,
)

ROLLOUTS = [  # one prompt of one token; EOS (0) inside a prompt and at ends; a single-token answer
    Rollout([58, 75, 68, 87], [5, 9, 0], True),
    Rollout([34], [100, 101, 102, 103, 104, 105, 0], True),
    Rollout([43, 0, 1], [7], False),
    Rollout([58, 75, 68, 87, 224, 76], [0], True),
    Rollout([261, 224], [33, 44, 55, 66], False),
]
TIMES = {"tokens_per_s", "sampling_s", "training_s", "peak_memory_gib"}


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def plain_loss(model, sequences, temperature):
    """Mean entropy over response tokens of (prompt, response) pairs: full logits, one at a time."""
    entropies = []
    for prompt, response in sequences:
        logits = model(torch.tensor([prompt + response])).logits[0].double() / temperature
        logp = logits.log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1)[len(prompt) - 1 : -1])
    return torch.cat(entropies).mean()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, rollouts, config):
    return entropy_step(
        model, head_of(model), rollouts, config, make_accelerator(config), StopRequest()
    )


MODELS = {
    "tied": ("llama", {}, 1e-12),
    "untied": ("qwen2", {"tied": False}, 1e-12),
    "bias": ("phi", {"tied": False}, 1e-12),
    "softcap": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}, 1e-6),  # its norms are fp32
    "scaled": ("cohere", {"logit_scale": 0.25}, 1e-6),
}


@pytest.mark.parametrize("micro_batch_tokens, batches", [(10**6, 1), (14, 3), (1, 5)])
@pytest.mark.parametrize("temperature", [None, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient(name, temperature, micro_batch_tokens, batches, tmp_path):
    kind, options, tolerance = MODELS[name]
    model = make_model(kind, dtype=torch.float64, **options)
    config = settings(
        "-", tmp_path, micro_batch_tokens=micro_batch_tokens, loss_temperature=temperature
    )
    assert len(list(micro_batches(ROLLOUTS, micro_batch_tokens))) == batches
    loss = step(model, ROLLOUTS, config).entropy
    ours = gradients(model)
    model.zero_grad()
    sequences = [(rollout.prompt_ids, rollout.response_ids) for rollout in ROLLOUTS]
    expected = plain_loss(model, sequences, temperature or 1.0)
    expected.backward()
    truth = gradients(model)
    assert loss == pytest.approx(expected.item(), rel=tolerance)
    assert ours.keys() == truth.keys()
    for parameter in truth:
        error = (ours[parameter] - truth[parameter]).norm() / truth[parameter].norm()
        assert error < tolerance, parameter


def test_scored_positions():
    ids, attention, scores = padded(ROLLOUTS[:3], torch.device("cpu"))
    assert ids.shape == attention.shape == scores.shape == (3, 8)
    assert scores[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert scores[1].tolist() == [1] * 7 + [0]
    assert scores[2].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert attention.sum(1).tolist() == [7, 8, 4]
    assert ids[2].tolist() == [43, 0, 1, 7, 0, 0, 0, 0]


def test_micro_batches_keep_within_their_tokens():
    rollouts = [Rollout([1] * (1 + i % 7), [2] * (1 + i * i % 23), False) for i in range(50)]
    for budget in (1, 30, 64, 200):
        found = list(micro_batches(rollouts, budget))
        assert sorted(map(id, sum(found, []))) == sorted(map(id, rollouts))
        for batch in found:
            assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= budget


@pytest.mark.parametrize("clip", [0.05, 1e6], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("kind, tied", [("llama", True), ("qwen2", False)])
def test_updates_are_a_plain_torch_loop(kind, tied, clip, folder, tmp_path):
    """Several prompts of different length; the tokens replayed from rollouts.jsonl."""
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
        micro_batch_tokens=60,
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
        loss = plain_loss(plain, [(row["prompt_ids"], row["response_ids"]) for row in rows], 0.7)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
        assert metrics[update - 1]["entropy"] == pytest.approx(loss.item(), rel=1e-9)
        assert metrics[update - 1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
        assert (norm > clip) == (clip < 1)
    for name, weight in plain.state_dict().items():
        assert_close(trained.state_dict()[name], weight, rtol=1e-8, atol=1e-10, msg=name)


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


def test_what_a_run_leaves(folder, tmp_path, tokenizer):
    output = tmp_path / "deep" / "run"
    config = settings(folder, output, answer="5", steps=3, save_at=(1,))
    model = load_model(str(folder), config, torch.device("cpu"))
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
    assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())
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


def allocations(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_logits_are_never_made(dtype, tmp_path):
    words = 8192
    model = make_model(vocab_size=words)
    rollouts = [Rollout([5] * 10, [6 + i] * 40, False) for i in range(16)]
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(args))
    config = settings("-", tmp_path, chunk_bytes=2**20, dtype=dtype)
    largest = max(allocations(lambda: step(model, rollouts, config)))
    scored = 16 * 40
    assert not calls and words * 32 * 4 <= largest < scored * words * 2 / 4
    naive = allocations(
        lambda: model(torch.tensor([r.prompt_ids + r.response_ids for r in rollouts]))
    )
    assert max(naive) >= scored * words * 4


def test_gradient_checkpointing_recomputes_to_the_same_gradient(folder, tmp_path):
    found = {}
    for on in (False, True):
        config = settings(folder, tmp_path, gradient_checkpointing=on)
        model = load_model(str(folder), config, torch.device("cpu"))
        calls = []
        layer = model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *args, calls=calls: calls.append(args))
        loss = step(model, ROLLOUTS, config).entropy
        found[on] = loss, gradients(model), len(calls)
    assert (found[False][2], found[True][2]) == (1, 2)
    assert found[False][0] == found[True][0]
    for name, gradient in found[False][1].items():
        assert torch.equal(gradient, found[True][1][name])


def test_gradient_checkpointing_gives_the_same_run(folder, tmp_path):
    plain = run(settings(folder, tmp_path / "a"))
    less = run(settings(folder, tmp_path / "b", gradient_checkpointing=True))
    assert comparable(plain.metrics) == comparable(less.metrics)


def test_bfloat16_compute_keeps_fp32_weights(folder, tmp_path):
    exact = run(settings(folder, tmp_path / "a", steps=1, rollouts=16, dtype="float32"))
    half = run(settings(folder, tmp_path / "b", steps=1, rollouts=16, dtype="bfloat16"))
    weights = weights_of(half.checkpoint)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert half.metrics[0]["entropy"] != exact.metrics[0]["entropy"]
    assert half.metrics[0]["entropy"] == pytest.approx(exact.metrics[0]["entropy"], rel=0.05)


def test_entropy_falls(folder, tmp_path):
    metrics = run(settings(folder, tmp_path / "run", steps=8, rollouts=16, lr=3e-3)).metrics
    assert metrics[-1]["entropy"] < 0.9 * metrics[0]["entropy"]


def test_real_model(demo, tmp_path):
    """Loss and gradient of the 135M model in fp32, two micro-batches."""
    model, tokenizer = demo
    prompt = tokenizer("2 + 3 =").input_ids
    rollouts = [Rollout(prompt, tokenizer(text).input_ids, True) for text in (" 5\n", " five. So")]
    loss = step(model, rollouts, settings("-", tmp_path, micro_batch_tokens=1)).entropy
    ours = gradients(model)
    model.zero_grad()
    expected = plain_loss(model, [(r.prompt_ids, r.response_ids) for r in rollouts], 1.0)
    expected.backward()
    truth = gradients(model)
    model.zero_grad()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    error = sum((ours[name] - truth[name]).square().sum() for name in truth)
    assert error < 1e-8 * sum(gradient.square().sum() for gradient in truth.values())
