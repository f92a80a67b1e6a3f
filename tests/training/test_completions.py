"""Prompts, refusals, and evaluations that are stopped and resumed."""

import json
import os
import re
import signal

import pytest
import torch
from spawned import outlived, wait_for
from training.lives import begin, end, slow
from training.test_interrupt import lines
from training.tiny import PLAIN, make_model, make_tokenizer, read, save_tiny
from transformers import AutoModelForCausalLM

from em_kernels.cli import main
from em_kernels.decoding import EntropyMinimizationLogitsProcessor
from em_kernels.training.data.problems import Problem
from em_kernels.training.evaluation.completions import EVAL_STREAM, local_completer
from em_kernels.training.evaluation.task import TaskSettings, token_ids
from em_kernels.training.evaluation.teacher_forcing import mean_entropies
from em_kernels.training.rollouts.sampling import generate
from em_kernels.training.settings import UserError

FLAGS = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a model with room for worked examples."""
    return save_tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def asked(tokenizer, model, **settings):
    """Return the prompt that the model reads of the first problem."""
    config = TaskSettings(data="addition", count=1, **settings)
    (problem,), shots, _ = config.problems()
    (ids,) = token_ids(config, (model, tokenizer), [config.prompt(problem, shots)])
    return tokenizer.decode(ids)


def test_templates(demo):
    model, tokenizer = demo
    assert asked(tokenizer, model, template="raw") == "What is 12 + 7?"
    assert asked(tokenizer, model, template="few-shot", shots=1, seed=3) == (
        "Q: What is 12 + 7?\nA: 12 + 7 = 19\n\nQ: What is 23 + 45?\nA:"
    )
    user = {"role": "user", "content": "What is 12 + 7?"}
    chat = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    assert asked(tokenizer, model, template="chat") == chat
    said = "Please reason step by step, and put your final answer within \\boxed{}."
    messages = [{"role": "system", "content": said}, user]  # The demo model has Qwen's template.
    cot = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert asked(tokenizer, model, template="qwen25-math-cot") == cot


def test_template_kwargs(tokenizer):
    hinted = make_tokenizer()
    hinted.chat_template += "{{ hint }}"
    model = make_model(max_position_embeddings=1024)
    text = asked(hinted, model, template_kwargs='{"hint": "the 3"}')
    assert text == "<|user|>What is 12 + 7?<|end|><|assistant|>the 3"


def test_decoding_em_inf(folder, tokenizer, tmp_path, capfd):
    """It samples as generate does with the logits processor, and only where it changes anything."""
    questions = [f"What is {i} + 3?" for i in range(6)]
    rows = [{"problem": question, "answer": "3"} for question in questions]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["eval", "--model", str(folder), "--data", str(tmp_path / "rows.jsonl"), *FLAGS]
    base += ["--template", "raw", "--decoding", "em-inf", "--output"]
    model, prompts = AutoModelForCausalLM.from_pretrained(folder), tokenizer(questions).input_ids
    seeds, sharpen = (
        [(0, i, 0, EVAL_STREAM) for i in range(6)],
        EntropyMinimizationLogitsProcessor(),
    )
    sharpened, plain = (
        tokenizer.batch_decode([r.response_ids for r in found], skip_special_tokens=True)
        for processors in ([sharpen], [])
        for found in [generate(model, tokenizer, prompts, seeds, PLAIN, processors=processors)]
    )
    assert main([*base, str(tmp_path / "eval"), "--temperature", "1"]) == 0
    kept = sorted(read(tmp_path / "eval" / "completions.jsonl"), key=lambda row: row["problem"])
    assert [row["text"] for row in kept] == sharpened != plain
    capfd.readouterr()
    other = [*base, str(tmp_path / "other")]
    for more, why in (([], "leaves greedy"), (["--server", "http://localhost:1/v1"], "samples on")):
        assert main([*other, *more]) == 2
        assert f"error: decoding: em-inf {why}" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_context_limits_new_tokens(folder, tokenizer, tmp_path):
    """Of each prompt alone; the completions that it cut off are marked."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    context = model.config.max_position_embeddings
    texts = ["7" * (context - 10), "Hello", "7" * (context - 12)]
    prompts = tokenizer(texts).input_ids
    room = [context - len(ids) for ids in prompts]
    assert 0 < room[0] < room[2] < 20 < room[1]
    config = TaskSettings(template="raw", sampling=PLAIN.model_copy(update={"max_new_tokens": 20}))
    done = []
    complete = local_completer(config, (model, tokenizer), texts, EVAL_STREAM)
    complete([(0, 0), (1, 0), (2, 0)], done.extend)
    limits = [room[0], 20, room[2]]
    for found, limit in zip(sorted(done), limits, strict=True):
        sampling = PLAIN.model_copy(update={"max_new_tokens": limit})
        seeds = [(config.seed, found.problem, 0, EVAL_STREAM)]
        (alone,) = generate(model, tokenizer, [prompts[found.problem]], seeds, sampling)
        assert (found.tokens, found.ended) == (len(alone.response_ids), alone.ended)
        assert found.text == tokenizer.decode(alone.response_ids, skip_special_tokens=True)
        assert found.capped == (limit < 20 and not alone.ended)
    assert any(found.capped for found in done)


def test_a_few_shot_answer_ends_with_its_line():
    few_shot = TaskSettings(template="few-shot")
    assert few_shot.sampled() == few_shot.sampling.model_copy(update={"stop": ("\n",)})
    assert TaskSettings(template="qwen25-math-cot").sampled().stop == ("<|im_end|>",)
    own = TaskSettings(template="few-shot", sampling={"stop": (";",)})
    assert own.sampled() == own.sampling
    assert TaskSettings(template="raw").sampled().stop == ()


def test_worked_examples_and_skipped_ones_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}", "answer": {i}}}\n' for i in range(10)))
    every = [Problem(f"p{i}", str(i)) for i in range(10)]
    task = TaskSettings(data=str(path), template="few-shot", shots=3, skip=2)
    assert task.problems() == (every[5:], every[:3], "")
    assert task.model_copy(update={"count": 4}).problems() == (every[5:9], every[:3], "")
    assert task.model_copy(update={"template": "raw"}).problems() == (every[2:], [], "")
    with pytest.raises(
        UserError, match="^data: .* has 10 problems; 3 worked .* and 7 skipped leav"
    ):
        task.model_copy(update={"skip": 7}).problems()
    with pytest.raises(UserError, match="^count: .* has 10 problems, 11 are asked for"):
        task.model_copy(update={"count": 6}).problems()


@pytest.mark.parametrize("data", ["addition", "gym:products"])
def test_a_generator_makes_what_is_left_out_too(data):
    task = TaskSettings(data=data, template="few-shot", skip=1000)
    problems, shots, _ = task.problems()
    assert len(problems) == 1000 and len(shots) == 2
    again, *_ = task.model_copy(update={"skip": 0}).problems()
    assert len(again) == 1000 and not {*problems} & {*again}


@pytest.fixture(scope="module")
def place(tmp_path_factory, folder):
    place = tmp_path_factory.mktemp("place")
    rows = [{"problem": f"{i} + {j} =", "answer": str(i + j)} for i in range(4) for j in range(5)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "unanswered.jsonl").write_text('{"problem": "a"}\n{"problem": "b"}\n')
    (place / "long.jsonl").write_text(json.dumps({"prompt": "W" * 510, "answer": 3}) + "\n")
    save_tiny(place / "plain")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(place / "plain")
    (place / "plain" / "chat_template.jinja").unlink()
    (place / "model").symlink_to(folder)
    return place


REFUSED = [
    (["--data", ""], "data: missing"),
    (["--data", "missing.jsonl"], "data: cannot read missing.jsonl"),
    (["--data", "unanswered.jsonl"], "data: no problem of unanswered.jsonl has an answer"),
    (["--data", "unanswered.jsonl", "--template", "few-shot"], "shots: .* has no answers for"),
    (["--system", "Be brief.", "--template", "raw"], "system: goes with template chat, not"),
    (["--answer-column", "x"], "answer_column: rows.jsonl has no column 'x'; it has problem, ans"),
    (["--data", "addition", "--prompt-column", "x"], "prompt_column: goes with a file or a hub"),
    (["--skip", "20"], "data: rows.jsonl has 20 problems; .* leave none; lower skip or shots"),
    (["--count", "21"], "count: rows.jsonl has 20 problems"),
    (["--samples", "2"], "samples: 2 are all the same at sampling.temperature 0; raise it"),
    (["--seed", str(2**32)], "seed: 4294967296: input should be less than 4294967296"),
    (["--model", ""], "model: missing"),
    (["--model", "/no/folder"], "model: there is no folder /no/folder"),
    (["--model", "./plain"], "template: the tokenizer has no chat template; use few-shot or raw"),
    (
        ["--data", "long.jsonl"],
        r"data: the prompt of problem 0 has 5\d\d tokens, too many for the model's context of 512",
    ),
    (["--template-kwargs", "{"], "template_kwargs: '{' is not a JSON object"),
    (["--attention", "none"], "attention: 'none' is refused: "),
]


@pytest.mark.parametrize("arguments, said", REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_refused_in_one_line_with_nothing_written(arguments, said, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    base = ["eval", "--model", "./model", "--data", "rows.jsonl", *FLAGS]
    assert main([*base, "--output", "eval", *arguments]) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and stderr.count("\n") == 1 and stderr.endswith("\n")
    assert stderr.startswith("em-kernels eval: error: ")
    assert re.search(said, stderr), stderr
    assert sorted(place.rglob("*")) == before


def results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def long(place):
    """Return the arguments of an evaluation, and its results when nothing stops it."""
    base = ["eval", "--model", str(place / "model"), "--data", str(place / "rows.jsonl"), *FLAGS]
    base += ["--samples", "2", "--temperature", "1", "--template", "raw"]
    assert main([*base, "--output", str(place / "whole")]) == 0
    return base, results(place / "whole")


@pytest.mark.parametrize("number", [slow(signal.SIGINT), signal.SIGKILL])
def test_stopped_and_resumed(number, long, tmp_path, capfd):
    """Results equal those of one that was never stopped; others cannot write there meanwhile."""
    output, kept = tmp_path / "eval", tmp_path / "eval" / "completions.jsonl"
    base, whole = [*long[0], "--output", str(output)], long[1]
    log = tmp_path / "log"
    with outlived(begin([*base, "--batch-size", "1"], log, "held after 5 completions")) as process:
        wait_for((tmp_path / "held").exists, process.is_alive)
        capfd.readouterr()
        assert main(base) == 2
        assert capfd.readouterr().err == (
            f"em-kernels eval: error: output: another process works in {output} now; "
            "wait, or name another\n"
        )
        os.kill(process.pid, number)
        ended = end(process, log)
    said = f"em-kernels eval: interrupted; the same command continues {output}\n"
    if number == signal.SIGINT:
        assert (ended.code, ended.out, ended.err) == (130, "", said)
    else:
        assert (ended.code, ended.out, ended.err) == (-9, "", "")
        with open(kept, "a") as file:
            file.write('{"problem": 3, "sam')
    assert lines(kept) == 5 and not (output / "results.json").exists()
    before = kept.read_text("utf-8").rpartition("\n")[0]
    assert main([*base, "--seed", "1"]) == 2
    assert f"output: {output} was made with seed 0, not 1; go on" in capfd.readouterr().err
    assert main(base) == 0
    assert results(output) == whole
    assert kept.read_text("utf-8").startswith(before + "\n") and len(read(kept)) == 40
    assert not (output / "running.json").exists()


def test_a_damaged_or_changed_evaluation(place, tmp_path, capfd):
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join((place / "rows.jsonl").read_text("utf-8").splitlines(keepends=True)[:3])
    )
    model = save_tiny(tmp_path / "model")
    base = ["eval", "--model", str(model), "--data", str(data), *FLAGS]
    base += ["--template", "raw", "--output", str(tmp_path / "eval")]
    assert main(base) == 0
    kept = tmp_path / "eval" / "completions.jsonl"
    whole = kept.read_text("utf-8")
    kept.write_text(whole.replace('"problem"', "", 1), "utf-8")
    capfd.readouterr()
    assert main(base) == 2
    assert f"output: line 1 of {kept} is damaged; remove it" in capfd.readouterr().err
    kept.write_text(whole, "utf-8")
    data.write_text(data.read_text("utf-8").replace("0 + 0", "0 + 1"))
    assert main(base) == 2
    assert "data: is not what it was when " in capfd.readouterr().err
    save_tiny(model, tied=False)
    assert main(base) == 2
    assert "model: is not what it was when " in capfd.readouterr().err
    assert kept.read_text("utf-8") == whole


SHAPES = {"llama": {}, "gemma2": {"sliding_window": 8, "head_dim": 8, "query_pre_attn_scalar": 8}}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("start", ["the abc\n\nWhat is ", ""], ids=["common", "apart"])
def test_mean_entropies(start, temperature, kind, tokenizer):
    model = make_model(kind, dtype=torch.float64, **SHAPES[kind])
    prompts = [tokenizer(start + text).input_ids for text in ("2 + 3?", "7", "the 12 + 13?")] * 3
    rollouts = generate(model, tokenizer, prompts, [(i,) for i in range(9)], PLAIN)
    expected = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1] / temperature
        expected.append(torch.distributions.Categorical(logits=logits).entropy().mean().item())
    assert mean_entropies(model, rollouts, temperature) == pytest.approx(expected, rel=1e-6)
