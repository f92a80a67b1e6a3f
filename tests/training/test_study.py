"""A whole study of a model that guesses digits, recomputed by hand, and resumed; its statistics on
data with known effects.
"""

import json
import re
import signal
from io import StringIO
from itertools import combinations

import numpy as np
import pytest
import torch
from rich.console import Console
from training import lives
from training.test_evaluate import alone
from training.tiny import make_model, make_tokenizer, read
from transformers import AutoModelForCausalLM

from em_kernels.cli import main
from em_kernels.training.data.problems import Problem, few_shot, read_problems
from em_kernels.training.evaluation import statistics
from em_kernels.training.evaluation.select import Candidate
from em_kernels.training.evaluation.study import StudyConfig, arms_of, only_form
from em_kernels.training.evaluation.study_analysis import (
    ARMS,
    PROMPTS,
    analyse,
    reading,
    table_of,
)
from em_kernels.training.evaluation.teacher_forcing import known_answers
from em_kernels.training.settings import UserError

POOL, HELD_OUT, SHOTS, EXAMPLES = 24, 20, 2, 8
FLAGS = ["--pool", "24", "--samples", "4", "--prompts", "4", "--held-out", "20", "--rollouts", "4"]
FLAGS += ["--updates", "1", "2", "--max-new-tokens", "4", "--lr", "1e-2", "--seed", "5"]
FLAGS += ["--dtype", "float32", "--device", "cpu", "--temperatures", "1", "0.5"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make problems whose answer is the last digit, and a model trained a little on them.

    Two in three have an answer too long for the model to give.
    """
    place, tokenizer = tmp_path_factory.mktemp("place"), make_tokenizer()
    answers = [i % 10 if i < 110 or i % 3 == 0 else 123456789 for i in range(100, 154)]
    rows = [{"prompt": str(i), "answer": answer} for i, answer in enumerate(answers, 100)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_model(max_position_embeddings=512).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        texts = [
            "".join(f"Q: {n}\nA: {n % 10}\n\n" for n in range(step + row, 1000, 97))
            for row in range(8)
        ]
        ids = [tokenizer(text).input_ids[:100] for text in texts]
        assert {len(row) for row in ids} == {100}
        model(torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


def command(place, output):
    data = ["--model", str(place / "model"), "--data", str(place / "rows.jsonl")]
    return ["study", *data, *FLAGS, "--output", str(output)]


@pytest.fixture(scope="module")
def whole(place):
    assert main(command(place, place / "whole")) == 0
    return place / "whole"


def problems_of(place):
    return read_problems(str(place / "rows.jsonl"), count=None)


def by_hand(folder, shots, problems, temperature=1.0):
    """Return greedy verdicts and probabilities of the answers, each computed alone."""
    prompts = [few_shot(shots, problem) for problem in problems]
    known = known_answers(make_tokenizer(), prompts, [p.completion for p in problems])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logprob, greedy = alone(model, known, temperature)
    return greedy, pytest.approx(np.exp(logprob), rel=1e-3)


@pytest.mark.slow
def test_untrained(place, whole):
    """Check the scores with the usual examples, with more, and with examples of the form only."""
    found = json.loads((whole / "untrained.json").read_text())
    shots, rest = problems_of(place)[:SHOTS], problems_of(place)[SHOTS:]
    examples, held_out = rest[:EXAMPLES], rest[EXAMPLES + POOL :]
    assert len(held_out) == HELD_OUT
    for row, temperature in enumerate((1.0, 0.5)):
        greedy, probability = by_hand(place / "model", shots, held_out, temperature)
        assert (found["greedy"], found["probability"][row]) == (greedy, probability)
    assert found["more"] == by_hand(place / "model", examples, held_out)[0]
    assert found["form"] == by_hand(place / "model", only_form(examples), held_out)[0]
    assert np.mean(found["probability"][0]) > 0.02  # The model has learnt to say a digit.
    pool = read(whole / "pool" / "selection.jsonl")
    assert sorted(row["index"] for row in pool) == list(range(POOL))
    for row in pool:
        assert row["prompt"] == few_shot(shots, rest[EXAMPLES + row["index"]])
        assert row["samples"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompt-????.json", "prompt-*-maximised.json"])
def test_a_trained_prompt(kind, place, whole, tmp_path):
    """Repeat the run of one prompt, and score its checkpoints."""
    path = sorted(whole.glob(kind))[0]
    found = json.loads(path.read_text())
    config = whole / "runs" / path.stem / "config.yaml"
    assert main(["train", "--config", str(config), "--output", str(tmp_path / "run")]) == 0
    problems = problems_of(place)
    for row, update in zip(found["scores"], (1, 2), strict=True):
        folder = tmp_path / "run" / "checkpoints" / f"step-{update:05d}"
        greedy, probability = by_hand(folder, problems[:SHOTS], problems[-HELD_OUT:])
        assert row == {"update": update, "greedy": greedy, "probability": probability}
    assert [row["entropy"] for row in read(tmp_path / "run" / "metrics.jsonl")] == found["entropy"]
    assert found["scores"][0] != found["scores"][1]
    assert not (whole / "runs" / path.stem / "checkpoints").exists()


@pytest.mark.slow
def test_killed_and_resumed(place, whole, tmp_path):
    """Kill a study in the second prompt's run. Both use as many threads, on which sums depend."""
    output, point = tmp_path / "study", "update 1 of the second run of two"
    threads = torch.get_num_threads()
    ended = lives.command(command(place, output), tmp_path / "log", point, threads=threads)
    assert ended.code == -signal.SIGKILL
    done = {path: path.read_text() for path in output.glob("prompt-*.json")}
    assert len(done) == 1 and not (output / "study.json").exists()
    assert main(command(place, output)) == 0
    assert all(path.read_text() == text for path, text in done.items())
    assert json.loads((output / "study.json").read_text()) == (
        json.loads((whole / "study.json").read_text())
    )


@pytest.mark.parametrize(
    "options, said",
    [
        (["--pool", "11"], "pool: 11 do not make the arms; take 12 or more"),
        (["--held-out", "21"], "count: .* has 54 problems, 55 are asked for"),
        (["--template", "chat"], "template: 'chat'"),
        (["--model", "./nowhere"], "model: there is no folder ./nowhere"),
        (["--data", "unanswered.jsonl"], "data: not every problem of .* has an answer"),
        (["--model", "adapters"], "model: .*adapters holds adapters; em-kernels merge RUN"),
        (["--temperatures", "1e-40"], "temperatures.0: 1e-40: "),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refused_in_one_line_with_nothing_written(options, said, place, tmp_path, capfd):
    rows = (place / "rows.jsonl").read_text().splitlines(keepends=True)
    (place / "unanswered.jsonl").write_text("".join(rows[:-1]) + '{"prompt": "9"}\n')
    (place / "adapters").mkdir(exist_ok=True)
    (place / "adapters" / "adapter_config.json").write_text("{}")
    options = [str(place / o) if o in ("unanswered.jsonl", "adapters") else o for o in options]
    assert main([*command(place, tmp_path / "study"), *options]) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == "" and stderr.count("\n") == 1, stderr
    assert re.match(f"em-kernels study: error: {said}", stderr), stderr
    assert not (tmp_path / "study").exists()


def candidates(rates):
    """Make candidates of these pass rates, ranked as select does."""
    found = [
        Candidate(f"p{i}", "3", i, 8, rate, 0.0, 0.0, False, 1.0) for i, rate in enumerate(rates)
    ]
    return sorted(found, key=lambda c: (-c.variance, c.index))


@pytest.mark.parametrize("seed", range(5))
def test_arms(seed):
    rates = [i / 8 for i in range(9) for _ in range(4)] + [0.0] * 24
    ranked = candidates(rates)
    arms = arms_of(ranked, 5, seed)
    assert list(arms) == list(ARMS)
    selected, chance, wrong = ({c.index for c in arms[name]} for name in PROMPTS)
    assert len(selected) == len(chance) == len(wrong) == 5
    assert not selected & chance and not selected & wrong and not chance & wrong
    left = [c for c in ranked if c.index not in chance]
    assert arms["selected"] == arms["maximised"] == left[:5]
    assert all(rates[i] == 0 for i in wrong)
    assert arms == arms_of(ranked[::-1][::-1], 5, seed)
    assert chance != {c.index for c in arms_of(ranked, 5, seed + 100)["random"]}


def test_the_random_arm_does_not_depend_on_the_ranking():
    """Each prompt is drawn equally often: 2000 draws of 6 of 30, within 5 standard deviations."""
    ranked, counts = candidates([0.5] * 5 + [0.0] * 25), np.zeros(30)
    for seed in range(2000):
        for candidate in arms_of(ranked, 6, seed)["random"]:
            counts[candidate.index] += 1
    assert counts.sum() == 12000 and abs(counts - 400).max() < 5 * np.sqrt(400 * 0.8)


def test_too_few_wrong_ones():
    said = (
        "^pool: of 23 prompts [0-3] outside .* always wrong, and 4 are needed; take a larger pool"
    )
    with pytest.raises(UserError, match=said):
        arms_of(candidates([0.5] * 20 + [0.0] * 3), 5, 0)
    arms = arms_of(candidates([0.5] * 20 + [0.0] * 12), 8, 0)
    assert 4 <= len(arms["always wrong"]) <= 8


def test_only_form():
    examples = [Problem("a", "1", "so 1"), Problem("b", "2", "so 2"), Problem("c", "x")]
    assert only_form(examples) == [
        Problem("a", "2", "so 2"),
        Problem("b", "x", "so x"),
        Problem("c", "1", "1"),
    ]
    alike = [Problem("a", "1"), Problem("b", "1", "so 1"), Problem("c", "2")]
    assert [problem.completion for problem in only_form(alike)] == [" 2\n", " so 2\n", " 1\n"]
    with pytest.raises(UserError, match="^data: the first 2 problems all have the answer 1"):
        only_form(alike[:2])


@pytest.mark.parametrize(
    "prompts, of_prompt, of_problem, least, most",
    [
        (24, 0.05, 0.3, 0.91, 0.99),  # many prompts: about 95 %
        (8, 0.0, 0.3, 0.91, 1.0),
        (8, 0.2, 0.0, 0.91, 0.99),
        (4, 0.2, 0.1, 0.90, 1.0),
        (8, 0.0, 0.0, 0.95, 1.0),  # pure noise is resampled twice: too wide
    ],
)
def test_interval_covers(prompts, of_prompt, of_problem, least, most, monkeypatch):
    """Draw effects of prompts, of problems and of pairs; 300 draws are good to 1.3 to 2 points."""
    monkeypatch.setattr(statistics, "RESAMPLES_OF_PROMPTS", 400)
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        change = 0.05 + 0.3 * rng.normal(size=(prompts, 60))
        change += of_prompt * rng.normal(size=(prompts, 1)) + of_problem * rng.normal(size=60)
        mean, low, high = statistics.mean_over_prompts(change, rng)
        assert mean == pytest.approx(change.mean())
        hits += low <= 0.05 <= high
    assert least < hits / 300 <= most


HELD = 40
CONFIG = StudyConfig(updates=(1, 3), temperatures=(1.0, 0.5), held_out=HELD)


def study_of(greedy, sampled, size=4):
    """Analyse scores in which an arm's prompt k makes greedy[arm][k] of the problems right."""
    base = {"greedy": [i < 10 for i in range(HELD)], "more": [True] * 20 + [False] * 20}
    base |= {"form": [True] * 4 + [False] * 36, "probability": [[0.2] * HELD, [0.3] * HELD]}
    scores = {}
    for arm in ARMS:
        scores[arm] = [
            {
                "pass_rate": k / 8,
                "majority_right": k > 1,
                "scores": [
                    {
                        "update": update,
                        "greedy": [i < count + update for i in range(HELD)],
                        "probability": [sampled[arm]] * HELD,
                    }
                    for update in CONFIG.updates
                ],
            }
            for k, count in enumerate(greedy[arm])
        ]
    return analyse(CONFIG, base, scores)


def exact_p(a, b):
    """Return twice the smaller share of all splits whose difference is as large on one side."""
    both, size = np.array([*a, *b], float), len(a)
    splits = [list(s) for s in combinations(range(len(both)), size)]
    sums = np.array([both[s].sum() for s in splits])
    differences = sums / size - (both.sum() - sums) / len(b)
    seen = np.mean(a) - np.mean(b)
    shares = [(sign * differences >= sign * seen - 1e-9).mean() for sign in (1, -1)]
    return min(1.0, 2 * min(shares))


def test_numbers_of_a_report():
    greedy = {"selected": [20, 25, 22, 24], "random": [10, 21, 9, 12], "always wrong": [7] * 4}
    greedy["maximised"] = [3, 11, 4, 6]
    sampled = {"selected": 0.4, "random": 0.3, "always wrong": 0.1, "maximised": 0.2}
    report = study_of(greedy, sampled)
    assert report["base_greedy"] == 0.25 and report["best_temperature"] == 0.5
    assert report["base_sampled"] == {"1.0": pytest.approx(0.2), "0.5": pytest.approx(0.3)}
    assert (report["more_examples"], report["form_only"]) == (0.5, 0.1)
    keys = [(update, arm) for update in (1, 3) for arm in ARMS]
    assert [(row["update"], row["arm"]) for row in report["rows"]] == keys
    for row in report["rows"]:
        right = np.mean(greedy[row["arm"]]) + row["update"]
        assert row["greedy"] == pytest.approx(right / HELD)
        assert row["change"][0] == pytest.approx((right - 10) / HELD)
        assert row["sampled"] == pytest.approx(sampled[row["arm"]])
        assert row["over_temperature"] == pytest.approx([sampled[row["arm"]] - 0.3] * 3)
        assert (row["prompts"], row["majority_right"], row["pass_rate"]) == (4, 2, 1.5 / 8)
    for contrast in report["contrasts"]:
        a, b = (greedy[arm] for arm in contrast["arms"])
        assert contrast["difference"] == pytest.approx((np.mean(a) - np.mean(b)) / HELD)
        assert contrast["p"] == pytest.approx(min(1.0, 12 * exact_p(a, b)))
    assert len(report["contrasts"]) == 12
    last = [3 + count - 10 for arm in PROMPTS for count in greedy[arm]]
    assert report["all_change"][0] == pytest.approx(np.mean(last) / HELD)
    assert report["all_over_temperature"][0] == pytest.approx(np.mean([0.1, 0, -0.2]))
    form = [(3 + count - 4) / HELD for arm in PROMPTS for count in greedy[arm]]
    assert report["all_over_form"][0] == pytest.approx(np.mean(form))
    raised = f"{100 * (np.mean(greedy['maximised']) + 3 - 10) / HELD:+.1f} ["
    assert f", and by {raised}" in report["reading"]
    assert "where training raised the entropy instead; over all prompts" in report["reading"]
    assert "and is above the 10.0 % of the untrained model when 8 examples" in report["reading"]
    console = Console(file=StringIO(), width=80)
    console.print(table_of(report))
    assert max(map(len, console.file.getvalue().splitlines())) <= 80


def test_reading_where_nothing_is():
    same = [5, 7, 9, 9, 6, 6, 7, 7]  # mean 7; after three updates 10, as untrained
    told = study_of(dict.fromkeys(ARMS, same), dict.fromkeys(ARMS, 0.3))["reading"]
    for other in ("random", "always wrong"):
        assert f"selected prompts is not shown to differ from training on {other} ones" in told
    assert "is not shown to differ from raising the entropy on the same (+0.0 points" in told
    assert "(+0.0 points greedy, p = 1 adjusted)" in told
    assert "over all prompts it is not shown to have changed (+0.0 [" in told
    assert "the trained models are not shown to differ from what the untrained one has at T" in told
    assert "after 3 updates" in told and " T = 0.5 (+0.0 " in told


@pytest.mark.parametrize("up", [True, False])
def test_reading_where_something_is(up):
    high, low = [20 + k for k in range(8)], [1, 0, 1, 0, 1, 1, 0, 1]
    greedy = {"selected": high if up else low, "random": low if up else high}
    greedy["always wrong"] = greedy["maximised"] = greedy["random"]
    sampled = dict.fromkeys(ARMS, 0.5 if up else 0.1)
    told = study_of(greedy, sampled)["reading"]
    assert told.count(f"did {'better' if up else 'worse'} than") == 3
    assert f"the trained models are {'above' if up else 'below'} what" in told
    more = dict.fromkeys(ARMS, high if up else low)
    told = study_of(more, sampled)["reading"]
    assert f"over all prompts it {'rose' if up else 'fell'} (" in told


def test_reading_is_of_the_last_update():
    report = study_of(dict.fromkeys(ARMS, [7] * 4), dict.fromkeys(ARMS, 0.3))
    for contrast in report["contrasts"]:
        contrast["p"], contrast["difference"] = 0.01 if contrast["update"] == 1 else 1.0, 0.5
    assert "did better" not in reading(report, 3) and "did better" in reading(report, 1)
