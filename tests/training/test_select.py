"""Check rankings against samples drawn one at a time, resuming, and training on the result."""

import json
import shlex
import signal
from collections import Counter
from multiprocessing import forkserver

import numpy as np
import pytest
import torch
from training.lives import CHILDREN, command
from training.test_interrupt import lines
from training.tiny import make_tokenizer, read, save_tiny
from transformers import AutoModelForCausalLM

from em_kernels.cli import main
from em_kernels.commands.flags import train_settings as settings
from em_kernels.training.config import Sampling, read_yaml
from em_kernels.training.data import grading
from em_kernels.training.data.grading import Grader, final_answer
from em_kernels.training.evaluation.select import Candidate
from em_kernels.training.rollouts.sampling import generate

QUESTIONS = ["2 + 3 =", "What is the 3?", "Hello", "abc 7", "the", "1 2 3 4", "5 5", "It is 4 or"]
SAMPLING = Sampling(temperature=0.7, top_k=30, top_p=1, repetition_penalty=1, max_new_tokens=10)
FLAGS = ["--temperature", "0.7", "--top-k", "30", "--top-p", "1", "--repetition-penalty", "1"]
FLAGS += ["--device", "cpu", "--dtype", "float32"]
STOP = ["--stop", *"0123456789"]
SAMPLES, MORE, SEED = 6, 6, 4


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch):
    """Fork grading workers from a process that has their imports, before output is captured."""
    forkserver.ensure_running()
    monkeypatch.setattr(grading, "_Context", lambda: CHILDREN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a model with room for worked examples."""
    return save_tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def drawn(folder):
    """Sample every question alone: return texts, answers and mean entropies.

    A text is an answer if it ends with a digit, not if it is cut off.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = make_tokenizer()
    sampling = SAMPLING.model_copy(update={"stop": tuple("0123456789")})
    texts, said, entropies = [], [], []
    for i, question in enumerate(QUESTIONS):
        ids = tokenizer(f"<|user|>{question}<|end|><|assistant|>").input_ids
        rollouts = [
            generate(model, tokenizer, [ids], [(SEED, i, k, 2)], sampling)[0]
            for k in range(SAMPLES + MORE)
        ]
        texts.append([tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rollouts])
        pairs = zip(rollouts, texts[-1], strict=True)
        said.append([text if rollout.ended else "" for rollout, text in pairs])
        with torch.no_grad():
            logits = [
                model(torch.tensor([ids + r.response_ids])).logits[0, len(ids) - 1 : -1]
                for r in rollouts
            ]
        each = [torch.distributions.Categorical(logits=x / 0.7).entropy().mean() for x in logits]
        entropies.append(torch.stack(each).tolist())
    return texts, said, entropies


def write_rows(path, answers=None):
    rows = [{"problem": question} for question in QUESTIONS]
    for row, answer in zip(rows, answers or (), strict=False):
        row["answer"] = answer
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", str(path)]


def selection(folder, data, output, *options, tokens=10):
    arguments = ["select", "--model", str(folder), *data, *FLAGS, "--seed", str(SEED)]
    arguments += ["--samples", str(SAMPLES), "--more", str(MORE), "--output", str(output)]
    return [*arguments, "--max-new-tokens", str(tokens), *options]


def two_stages(score):
    """Rank the pool by score(i, samples), the first quarter again with more samples."""
    first = sorted(range(len(QUESTIONS)), key=lambda i: (-score(i, SAMPLES), i))
    best = sorted(first[:2], key=lambda i: (-score(i, SAMPLES + MORE), i))
    return best + first[2:]


def test_by_variance_of_correctness(folder, drawn, tmp_path, capfd):
    """Known answers are those of a sample, if one has a number; the first two are not."""
    texts, said, entropies = drawn
    found = [[answer for text in group if (answer := final_answer(text))] for group in texts]
    answers = [(group or ["0"])[0] for group in found]
    answers[:2] = ["none of them"] * 2
    data = write_rows(tmp_path / "rows.jsonl", answers)
    output = tmp_path / "selection"
    assert main(selection(folder, data, output, *STOP)) == 0
    rows = read(output / "selection.jsonl")
    with Grader() as grader:
        pairs = [(t, a) for group, a in zip(texts, answers, strict=True) for t in group]
        right = np.array(grader.grade(pairs)).reshape(len(QUESTIONS), -1)
        agreed = {n: grader.agreement([group[:n] for group in said]) for n in (6, 12)}

    def variance(i, samples):
        return round(right[i, :samples].mean() * (1 - right[i, :samples].mean()), 9)

    assert [row["index"] for row in rows] == two_stages(variance)
    assert [row["samples"] for row in rows] == [12, 12] + [6] * 6
    assert rows[0]["variance"] > 0
    for row in rows:
        i, n = row["index"], row["samples"]
        assert (row["prompt"], row["answer"]) == (QUESTIONS[i], answers[i])
        assert row["pass_rate"] == pytest.approx(right[i, :n].mean())
        assert row["variance"] == pytest.approx(variance(i, n))
        first, _ = agreed[n][i]
        assert row["majority_right"] == (said[i][first] != "" and right[i, first])
        assert row["ended"] == np.mean([text != "" for text in said[i][:n]])
        assert row["entropy"] == pytest.approx(np.mean(entropies[i][:n]), rel=1e-4)
    kept = read(output / "completions.jsonl")
    assert {(r["problem"], r["sample"]): r["text"] for r in kept} == {
        (i, k): texts[i][k] for i, n in ((r["index"], r["samples"]) for r in rows) for k in range(n)
    }
    assert len(kept) == 2 * 12 + 6 * 6
    stdout, stderr = capfd.readouterr()
    assert "The first 8 of 8" in stdout and stdout.endswith(f"{output / 'selection.jsonl'}\n")
    assert stderr == ""


def test_by_disagreement_where_no_answer_is_known(folder, drawn, tmp_path):
    """Completions that were cut off have no answer, and agree with each other."""
    _, said, _ = drawn
    output = tmp_path / "selection"
    assert main(selection(folder, write_rows(tmp_path / "rows.jsonl"), output, *STOP)) == 0
    rows = read(output / "selection.jsonl")
    with Grader() as grader:
        agreed = {n: grader.agreement([group[:n] for group in said]) for n in (6, 12)}
    assert [row["index"] for row in rows] == two_stages(lambda i, n: 1 - agreed[n][i][1])
    checked = []
    for row in rows:
        i, n = row["index"], row["samples"]
        assert row["disagreement"] == pytest.approx(1 - agreed[n][i][1])
        assert row["pass_rate"] is row["majority_right"] is row["answer"] is None
        if not any(set(text) & set("$%\\/,.-") for text in said[i][:n]):
            most = Counter(text[-1:] for text in said[i][:n]).most_common(1)[0][1]
            assert row["disagreement"] == pytest.approx(1 - most / n)
            checked.append(row["disagreement"])
    assert len(set(checked)) > 1


def test_by_entropy_in_one_stage(folder, drawn, tmp_path):
    *_, entropies = drawn
    data, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "selection"
    assert main(selection(folder, data, output, *STOP, "--score", "entropy", "--more", "0")) == 0
    rows = read(output / "selection.jsonl")
    means = np.mean([group[:SAMPLES] for group in entropies], axis=1)
    assert [row["index"] for row in rows] == (-means).argsort().tolist()
    assert {row["samples"] for row in rows} == {SAMPLES}


def test_variance_needs_answers(folder, tmp_path, capfd):
    data = write_rows(tmp_path / "rows.jsonl")
    assert main(selection(folder, data, tmp_path / "no", "--score", "variance")) == 2
    stdout, stderr = capfd.readouterr()
    said = f"score: variance needs answers, which {data[1]} lacks; use auto"
    assert (stdout, stderr) == ("", f"em-kernels select: error: {said}\n")
    assert not (tmp_path / "no").exists()


def test_rows_without_an_answer_are_never_selected(folder, tmp_path, capfd):
    data = write_rows(tmp_path / "rows.jsonl", ["proof", 1, 2, "notfound"])
    output, options = tmp_path / "selection", ["--samples", "2", "--more", "0"]
    assert main(selection(folder, data, output, *options, tokens=2)) == 0
    assert {row["prompt"] for row in read(output / "selection.jsonl")} == {*QUESTIONS[1:3]}
    told = f"Left out {len(QUESTIONS) - 2} of {len(QUESTIONS)} rows of {data[1]}: no answer "
    assert told in capfd.readouterr().err


@pytest.mark.parametrize("template", ["chat", "few-shot", "qwen25-math-cot"])
def test_the_command_that_it_tells_trains_on_the_first(
    template, folder, tokenizer, tmp_path, capfd
):
    data, output = write_rows(tmp_path / "rows.jsonl", "12345678"), tmp_path / "selec tion"
    options = ["--template", template, "--stop", "\n", "it's", "--more", "0", "--samples", "2"]
    options += ["--template-kwargs", '{"deep": true}'] if template == "chat" else []
    assert main(selection(folder, data, output, *options, tokens=3)) == 0
    told = capfd.readouterr().out.split("Train on the first: ")[1].rpartition("\n")[0]
    told = told.rpartition("\n")[0]  # The last line is the file's name.
    program, command, *flags = shlex.split(told)
    assert (program, command) == ("em-kernels", "train")
    config, _ = settings("train", flags, "")
    assert config.sampling == SAMPLING.model_copy(
        update={"stop": ("\n", "it's"), "max_new_tokens": 3}
    )
    assert config.chat_template == (template == "chat")
    assert config.template_kwargs == ('{"deep": true}' if template == "chat" else "{}")
    assert (config.prompt_from, config.prompt_rows) == (output / "selection.jsonl", (0,))
    run = tmp_path / "run"
    more = ["--steps", "1", "--rollouts", "2", "--device", "cpu", "--output", str(run)]
    assert main(["train", *flags, *more]) == 0
    prompt = read(output / "selection.jsonl")[0]["prompt"]
    starts = {
        "few-shot": "Q: 2 + 3 =\nA: 1\n\nQ: ",
        "qwen25-math-cot": "<|im_start|>system\nPlease",
    }
    assert prompt in QUESTIONS or prompt.startswith(starts[template])
    asked = f"<|user|>{prompt}<|end|><|assistant|>" if template == "chat" else prompt
    for rollout in read(run / "rollouts.jsonl"):
        assert tokenizer.decode(rollout["prompt_ids"]) == asked
    assert read_yaml(run / "config.yaml").sampling == config.sampling
    assert read(run / "metrics.jsonl")[0]["accuracy"] is not None


def test_killed_and_resumed(folder, tmp_path, capfd):
    data = write_rows(tmp_path / "rows.jsonl", "12345678")
    assert main(selection(folder, data, tmp_path / "whole", tokens=3)) == 0
    arguments = selection(folder, data, tmp_path / "killed", tokens=3)
    ended = command([*arguments, "--batch-size", "1"], tmp_path / "log", "5 completions")
    assert ended.code == -signal.SIGKILL
    assert lines(tmp_path / "killed" / "completions.jsonl") == 5
    assert not (tmp_path / "killed" / "selection.jsonl").exists()
    assert main([*arguments, "--samples", "5"]) == 2
    assert "was made with samples 6, not 5" in capfd.readouterr().err
    assert main(arguments) == 0
    whole, killed = (tmp_path / name / "selection.jsonl" for name in ("whole", "killed"))
    ranked = [{**row, "entropy": pytest.approx(row["entropy"], rel=1e-4)} for row in read(whole)]
    assert read(killed) == ranked


@pytest.mark.parametrize("samples", [10, 16])
def test_rates_as_far_from_half_rank_alike(samples):
    def variance(rate):
        return Candidate("p", "3", 0, samples, rate, 0.0, 0.0, None, 1.0).variance

    for right in range(samples + 1):
        rates = right / samples, (samples - right) / samples
        assert variance(rates[0]) == variance(rates[1])
        assert variance(rates[0]) == pytest.approx(rates[0] * (1 - rates[0]))
    assert variance(0.5) == 0.25 > variance(7 / 16) and variance(None) == 0
