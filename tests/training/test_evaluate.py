"""Check intervals against known values and by simulation, evaluations against generate."""

import json
import re
import shutil
from collections import Counter
from io import StringIO
from itertools import combinations
from multiprocessing import forkserver

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import binom
from training.lives import CHILDREN
from training.tiny import PLAIN, make_model, read, save_tiny
from transformers import AutoModelForCausalLM

from em_kernels.cli import main
from em_kernels.training.data import grading
from em_kernels.training.data.grading import Grader, final_answer
from em_kernels.training.data.problems import few_shot, read_problems
from em_kernels.training.evaluation.evaluate import EvalConfig
from em_kernels.training.evaluation.statistics import mean_interval, paired_change, pass_at, wilson
from em_kernels.training.evaluation.teacher_forcing import known_answers, score_answers
from em_kernels.training.rollouts.sampling import generate
from em_kernels.training.settings import UserError

QUIET = Console(file=StringIO())
GREEDY = PLAIN.model_copy(update={"temperature": 0.0, "max_new_tokens": 6})
FLAGS = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "12"]
QUESTIONS = ["2 + 3 =", "What is the 3?", "Hello", "abc 7", "the", "1 2 3 4"]


def outcomes(right, n):
    return np.arange(n) < right


@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (5, 10), (94, 200), (1, 1)])
def test_wilson(right, n):
    """The interval ends are the roots of (p - right / n)^2 = z^2 p (1 - p) / n."""
    z2, share = 1.959963984540054**2, right / n
    low, high = wilson(outcomes(right, n))
    assert 0 <= low < high <= 1
    assert low + high == pytest.approx((2 * share + z2 / n) / (1 + z2 / n), abs=1e-9)
    assert low * high == pytest.approx(share**2 / (1 + z2 / n), abs=1e-9)


def test_wilson_covers():
    """Exact coverage is 95 % on average over rates, and never below 90 % away from the ends."""
    n = 200
    intervals = np.array([wilson(outcomes(k, n)) for k in range(n + 1)])
    rates = np.linspace(0.02, 0.98, 97)
    covered = [
        binom.pmf(np.arange(n + 1), n, p)[(intervals[:, 0] <= p) & (p <= intervals[:, 1])].sum()
        for p in rates
    ]
    assert min(covered) > 0.9 and np.mean(covered) == pytest.approx(0.95, abs=0.01)


def pair(gained, lost, both, neither):
    before = np.repeat([False, True, True, False], [gained, lost, both, neither])
    after = np.repeat([True, False, True, False], [gained, lost, both, neither])
    return before, after


@pytest.mark.parametrize(
    "counts, change, p",
    [  # p: the exact binomial test of gained against lost, by hand
        ((5, 0, 3, 2), 0.5, 2 / 32),
        ((0, 5, 3, 2), -0.5, 2 / 32),
        ((3, 1, 0, 6), 0.2, 10 / 16),
        ((4, 4, 1, 1), 0.0, 1.0),
        ((0, 0, 7, 3), 0.0, 1.0),
    ],
)
def test_paired_change(counts, change, p):
    found, low, high, p_value = paired_change(*pair(*counts))
    assert found == pytest.approx(change) and p_value == pytest.approx(p)
    assert low <= found <= high


def test_paired_interval_of_a_textbook():
    """Agresti: of 1600 Britons 150 lost and 86 gained; change -0.04, interval ±0.0188."""
    change, low, high, _ = paired_change(*pair(86, 150, 794, 570))
    assert (change, low, high) == pytest.approx((-0.04, -0.0588, -0.0212), abs=2e-4)


@pytest.mark.parametrize("gained, lost", [(0.10, 0.10), (0.20, 0.05), (0.05, 0.15)])
def test_paired_interval_covers(gained, lost):
    """Check coverage on 200 problems; 4000 draws estimate it to 1 point."""
    rng = np.random.default_rng(0)
    n, draws = 200, 4000
    hits = 0
    drawn = rng.multinomial(n, [gained, lost, 1 - gained - lost], size=draws)
    for (g, k, _), times in Counter(map(tuple, drawn.tolist())).items():
        _, low, high, _ = paired_change(*pair(g, k, n - g - k, 0))
        hits += times * (low <= gained - lost <= high)
    assert 0.93 < hits / draws < 0.97


@pytest.mark.parametrize("n", [1, 5, 8])
def test_pass_at_is_the_share_of_subsets_with_a_right_one(n):
    right = np.array([outcomes(count, n) for count in range(n + 1)])
    for k in range(1, n + 1):
        expected = [np.mean([any(s) for s in combinations(row, k)]) for row in right.tolist()]
        assert pass_at(right, k) == pytest.approx(expected)


def test_interval_over_problems_covers():
    """Check coverage on 60 problems with correlated samples; 400 draws are good to 2.5 points."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        rates = rng.beta(0.5, 1, 60)  # of mean 1/3
        low, high = mean_interval(rng.binomial(8, rates) / 8)
        hits += low <= 1 / 3 <= high
    assert 0.90 < hits / 400 < 0.98


def test_interval_where_resampling_sees_no_spread():
    """Equal rates get Wilson's bounds: a mean of 1.25 of 5 the lower of 1 of 5, the upper of 2."""
    assert mean_interval(np.full(5, 0.25)) == (wilson(outcomes(1, 5))[0], wilson(outcomes(2, 5))[1])
    assert mean_interval(np.full(5, 1.0)) == wilson(outcomes(5, 5))
    low, high = mean_interval(np.array([0.5]))
    assert (low, high) == (wilson(outcomes(0, 1))[0], wilson(outcomes(1, 1))[1]) == (0, 1)


@pytest.fixture(autouse=True)
def quick_workers(monkeypatch):
    """Fork grading workers from a process that has their imports, before output is captured."""
    forkserver.ensure_running()
    monkeypatch.setattr(grading, "_Context", lambda: CHILDREN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a model with room for worked examples."""
    return save_tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Make tables as wide as they need, whatever the terminal."""
    monkeypatch.setenv("COLUMNS", "200")


def texts_of(folder, tokenizer, prompts, seed, samples, sampling):
    """Sample each completion alone; return texts and rollouts."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    rollouts = [
        generate(model, tokenizer, [tokenizer(text).input_ids], [(seed, i, k, 1)], sampling)[0]
        for i, text in enumerate(prompts)
        for k in range(samples)
    ]
    texts = [tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
    return texts, rollouts


def rows_of(path, questions, answers):
    rows = [{"problem": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data", str(path)]


def answers_of(texts, samples):
    """Choose answers so that some sample of each problem is right, if one has a number."""
    groups = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    found = [[answer for text in group if (answer := final_answer(text))] for group in groups]
    return [answers[-1] if answers else "0" for answers in found]


def test_eval_is_generate_and_grade(folder, tokenizer, tmp_path, capfd):
    flags = ["--samples", "8", "--temperature", "1", "--seed", "3", *FLAGS]
    asked = [f"<|user|>{question}<|end|><|assistant|>" for question in QUESTIONS]
    texts, rollouts = texts_of(folder, tokenizer, asked, 3, 8, PLAIN)
    answers = answers_of(texts, 8)
    data = rows_of(tmp_path / "rows.jsonl", QUESTIONS, answers)
    output = tmp_path / "eval"
    arguments = ["eval", "--model", str(folder), *data, *flags, "--output", str(output)]
    assert main([*arguments, "--batch-size", "7"]) == 0
    stdout, stderr = capfd.readouterr()
    kept = {(row["problem"], row["sample"]): row for row in read(output / "completions.jsonl")}
    keys = [(i, k) for i in range(6) for k in range(8)]
    assert sorted(kept) == keys and len(read(output / "completions.jsonl")) == 48
    assert [kept[key]["text"] for key in keys] == texts
    assert [kept[key]["tokens"] for key in keys] == [len(r.response_ids) for r in rollouts]
    results = json.loads((output / "results.json").read_text("utf-8"))
    right = np.array(results["right"])
    easy = [i for i, text in enumerate(texts) if not set(text) & set("$%\\")]  # need no workers
    verdicts = Grader().grade([(texts[i], answers[i // 8]) for i in easy])
    assert right.flatten()[easy].tolist() == verdicts and len(easy) > 24
    assert right.shape == (6, 8) and results["accuracy"] == pytest.approx(right.mean())
    assert 0 < right.mean() < 1
    draws = np.random.default_rng(5).integers(0, 6, (4000, 6))
    expected = np.quantile(right.mean(1)[draws].mean(1), (0.025, 0.975))
    assert results["interval"] == pytest.approx(expected, abs=0.03)
    for k in (1, 2, 4, 8):
        share = np.mean([any(s) for row in right.tolist() for s in combinations(row, k)])
        assert results["pass_at"][str(k)] == pytest.approx(share)
    assert results["ended"] == pytest.approx(np.mean([r.ended for r in rollouts]))
    assert results["mean_tokens"] == pytest.approx(np.mean([len(r.response_ids) for r in rollouts]))
    problems = [{"prompt": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    assert read(output / "problems.jsonl") == problems
    assert stderr == "" and "avg@8" in stdout and f"{100 * right.mean():.1f} [" in stdout
    assert "pass@8" in stdout and stdout.endswith(f"Kept in {output}\n")


def test_one_problem(folder, tmp_path, capfd):
    base = ["eval", "--model", str(folder), "--data", "addition", "--template", "few-shot", *FLAGS]
    base += ["--count", "1", "--output"]
    assert main([*base, str(tmp_path / "forced"), "--teacher-forced"]) == 0
    said = capfd.readouterr().out
    assert "0.0 [0.0, 79.3]" in said and said.count("0.0 [0.0, 100.0]") == 3
    sampled = tmp_path / "sampled"
    assert main([*base, str(sampled), "--samples", "2", "--temperature", "1"]) == 0
    rows, total = read(sampled / "completions.jsonl"), read(sampled / "problems.jsonl")[0]["answer"]
    rows[0]["text"], rows[1]["text"] = total, "no"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (sampled / "completions.jsonl").write_text(lines)
    assert main(["eval", "--regrade", str(sampled)]) == 0
    assert "50.0 [0.0, 100.0]" in capfd.readouterr().out


def test_regrade_and_against(folder, tokenizer, tmp_path, capfd):
    data = rows_of(tmp_path / "rows.jsonl", QUESTIONS, "123456")
    base = ["eval", "--model", str(folder), *data, *FLAGS, "--template", "raw", "--output"]
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    assert main([*base, before]) == 0
    shutil.copytree(before, after)
    files = {name: tmp_path / name / "completions.jsonl" for name in ("before", "after")}
    for name, right in (("before", "110000"), ("after", "101111")):
        rows = read(files[name])
        for row in rows:
            i = row["problem"]
            row["text"] = f"it is {'123456'[i] if right[i] == '1' else 'unknown'}"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["eval", "--regrade", str(tmp_path / name)]) == 0
        results = json.loads((tmp_path / name / "results.json").read_text("utf-8"))
        assert results["right"] == [[r == "1"] for r in right]
        assert results["interval"] == list(wilson(np.array([r == "1" for r in right])))
    capfd.readouterr()
    assert main(["eval", "--regrade", after, "--against", before]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert f"Against {before}: +50.0 points [" in said
    assert "p = 0.38 by McNemar's exact test: no more than chance explains." in said  # 6 / 16
    assert "4 became right, 1 wrong." in said


def refused(arguments, capfd):
    capfd.readouterr()
    assert main(["eval", *arguments]) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and stderr.startswith("em-kernels eval: error: ")
    assert stderr.count("\n") == 1 and stderr.endswith("\n")
    return stderr


def test_refused_comparisons(folder, tmp_path, capfd):
    data = rows_of(tmp_path / "rows.jsonl", QUESTIONS[:2], "12")
    other = rows_of(tmp_path / "other.jsonl", QUESTIONS[:2], "13")
    base = ["--model", str(folder), *FLAGS[:-1], "3", "--template", "raw"]
    one, two, many = (str(tmp_path / name) for name in ("one", "two", "many"))
    sampled = ["--samples", "2", "--temperature", "1"]
    assert main(["eval", *base, *data, "--output", one]) == 0
    assert main(["eval", *base, *data, *sampled, "--output", many]) == 0
    for arguments, said in (
        ([*base, *other, "--output", two], f"{one} is of other problems; give both the same data"),
        (
            [*base, *data, *sampled, "--output", two],
            "McNemar's test needs .* one sample per problem",
        ),
    ):
        assert re.search(f"against: {said}", refused([*arguments, "--against", one], capfd))
        assert not (tmp_path / "two").exists()
    capfd.readouterr()
    assert main(["eval", "--regrade", many, "--against", one]) == 2  # after showing the results
    assert "against: McNemar's test" in capfd.readouterr().err
    assert main(["eval", *base, *data, "--seed", "1", "--output", two, "--against", one]) == 0
    assert "But their settings differ: seed 0, not 1." in capfd.readouterr().out
    nothing = str(tmp_path / "nothing")
    line = refused([*base, *data, "--output", nothing, "--against", nothing], capfd)
    assert f"against: {nothing} is not the folder of a finished evaluation" in line
    assert not (tmp_path / "nothing").exists()
    assert "not with --suite" in refused(["--regrade", one, "--suite", "qwen25-math"], capfd)
    assert "regrade: goes with --against and --grader, not with --data" in refused(
        ["--regrade", one, *data], capfd
    )
    assert f"regrade: {nothing} is no evaluation's folder" in refused(["--regrade", nothing], capfd)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("prompt: p\n")  # a training run's
    line = refused(["--regrade", str(tmp_path / "run")], capfd)
    assert line.endswith("run is no evaluation's folder: it has no problems.jsonl\n")
    (tmp_path / "run" / "problems.jsonl").write_text("{}\n")
    (tmp_path / "run" / "config.yaml").write_text("[\n")
    line = refused(["--regrade", str(tmp_path / "run")], capfd)
    assert "run is no evaluation's folder: while parsing" in line
    lines = (tmp_path / "many" / "completions.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "many" / "completions.jsonl").write_text("".join(lines[:-1]), "utf-8")
    assert f"regrade: {many} is not finished" in refused(["--regrade", many], capfd)


def alone(model, rollouts, temperature):
    """Return each response's log-probability, and whether greedy decoding would give it."""
    totals, greedy = [], []
    for prompt, response, _ in ((r.prompt_ids, r.response_ids, r.ended) for r in rollouts):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0]
        logits = logits[len(prompt) - 1 : -1].double()
        picked = torch.tensor(response)
        totals.append(
            (logits / temperature).log_softmax(-1).gather(1, picked[:, None]).sum().item()
        )
        greedy.append(bool((logits.argmax(-1) == picked).all()))
    return totals, greedy


KINDS = {
    "llama": {},
    "qwen2": {"tied": False},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"sliding_window": 8, "head_dim": 8, "query_pre_attn_scalar": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_plain_torch(kind, tokenizer):
    """Prompts with and without a common prefix, answers of one token and of many."""
    model = make_model(kind, dtype=torch.float64, max_position_embeddings=512, **KINDS[kind])
    problems = read_problems("addition", count=12)
    prompts = [few_shot(problems[:2], problem) for problem in problems[2:]]
    answers = [" 3\n", *(problem.completion for problem in problems[3:])]
    for texts in (prompts, [*prompts, "Hello"]):
        known = known_answers(tokenizer, texts, [*answers, "abc"][: len(texts)])
        for rollout, text in zip(known, texts, strict=True):
            assert tokenizer.decode(rollout.prompt_ids) == text
        with torch.no_grad():  # The last answers are those of greedy sampling.
            said = generate(model, tokenizer, [r.prompt_ids for r in known[:3]], [(0,)] * 3, GREEDY)
        right, logprob = score_answers(model, [*known, *said], (1.0, 0.5, 0.25), QUIET)
        for row, temperature in enumerate((1.0, 0.5, 0.25)):
            expected, greedy = alone(model, [*known, *said], temperature)
            assert logprob[row] == pytest.approx(expected, rel=1e-6)
        assert right.tolist() == greedy and right[-3:].all()
        assert not right.all()


def test_a_tokenizer_that_joins_prompt_and_answer(tokenizer):
    known = known_answers(tokenizer, ["it is ", "it is 3 or"], ["3\n", " 4\n"])
    # This tokenizer has one token for two line breaks, which ends answers in worked examples too.
    assert [tokenizer.decode(r.response_ids) for r in known] == ["3\n\n", " 4\n\n"]
    with pytest.raises(
        UserError, match=r"^teacher_forced: .* joins .* with 'he 3\\n'; sample instead$"
    ):
        known_answers(tokenizer, ["it is t"], ["he 3\n"])


def test_teacher_forced_greedy_is_greedy_sampling(demo):
    """On 12 sums all verdicts for the 135M model agree; some are right, some wrong."""
    model, tokenizer = demo
    config = EvalConfig(data="addition", template="few-shot", count=12, seed=1)
    problems, shots, _ = config.problems()
    prompts = [config.prompt(problem, shots) for problem in problems]
    known = known_answers(tokenizer, prompts, [problem.completion for problem in problems])
    forced, _ = score_answers(model, known, (1.0,), QUIET)
    sampling = config.sampled().model_copy(update={"max_new_tokens": 24})
    ids = [rollout.prompt_ids for rollout in known]
    sampled = generate(model, tokenizer, ids, [(0,)] * 12, sampling)
    texts = [tokenizer.decode(rollout.response_ids) for rollout in sampled]
    pairs = zip(texts, problems, strict=True)
    verdicts = Grader().grade([(text, problem.answer) for text, problem in pairs])
    assert forced.tolist() == verdicts and 0 < forced.sum() < 12


def test_teacher_forced_eval(folder, tokenizer, tmp_path, capfd):
    output = tmp_path / "eval"
    arguments = ["eval", "--model", str(folder), "--data", "addition", "--count", "5", *FLAGS]
    arguments += ["--template", "few-shot", "--teacher-forced", "--temperatures", "1", "0.5"]
    assert main([*arguments, "--skip", "3", "--output", str(output)]) == 0
    problems = read_problems("addition", count=10)
    prompts = [few_shot(problems[:2], problem) for problem in problems[5:]]
    known = known_answers(tokenizer, prompts, [problem.completion for problem in problems[5:]])
    model = AutoModelForCausalLM.from_pretrained(folder)
    results = json.loads((output / "results.json").read_text("utf-8"))
    for temperature in (1.0, 0.5):
        expected, greedy = alone(model, known, temperature)
        found = np.log(results["probability"][str(temperature)])
        assert found == pytest.approx(expected, rel=1e-4)
    assert results["right"] == [[g] for g in greedy] and results["problems"] == 5
    assert not (output / "completions.jsonl").exists()
    assert "probability of the answer, T = 0.5" in capfd.readouterr().out
    line = refused([*arguments[1:], "--temperatures", "1e-40"], capfd)
    assert "temperatures.0: 1e-40: input should be greater than or equal to 0.01" in line
    for name, wrong in (("chat", []), ("few-shot", ["--server", "http://127.0.0.1:1"])):
        line = refused([*arguments[1:], "--template", name, *wrong], capfd)
        assert "teacher_forced: needs template few-shot, and no server" in line
