"""Intervals against known values and by simulation; evaluation and selection of a model."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from training.tiny import make_model

from em_kernels.training.config import Sampling
from em_kernels.training.data import Problem, encode
from em_kernels.training.evaluate import evaluate, paired_change, wilson
from em_kernels.training.grading import is_correct
from em_kernels.training.rollout import generate
from em_kernels.training.select import Candidate, select

PLAIN = Sampling(temperature=1, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=8)


def outcomes(right, n):
    return np.arange(n) < right


@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (5, 10), (94, 200), (1, 1)])
def test_wilson(right, n):
    """The two roots of (p - right / n)^2 = z^2 p (1 - p) / n."""
    z2, share = 1.959963984540054**2, right / n
    roots = np.roots([1 + z2 / n, -2 * share - z2 / n, share**2])
    assert wilson(outcomes(right, n)) == pytest.approx(sorted(roots), abs=1e-9)


def test_wilson_covers():
    """Exactly, over the binomial: 95 % on average over rates, never below 90 % beyond the ends."""
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
    [  # the exact binomial test of gained against lost, by hand
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
    """200 problems: 4000 draws, the estimate of the coverage is good to 1 point."""
    rng = np.random.default_rng(0)
    n, draws = 200, 4000
    hits = 0
    for g, k, _ in rng.multinomial(n, [gained, lost, 1 - gained - lost], size=draws):
        _, low, high, _ = paired_change(*pair(g, k, n - g - k, 0))
        hits += low <= gained - lost <= high
    assert 0.93 < hits / draws < 0.97


def test_evaluate_is_generate_and_grade(tokenizer):
    model = make_model(dtype=torch.float64)
    problems = [Problem("2 + 3 =", "5"), Problem("Hello", "1"), Problem("2 + 4 =", None)]
    found = evaluate(model, tokenizer, problems, PLAIN, samples=40, seed=3, chat_template=False)
    assert found.shape == (3, 40) and found.dtype == bool and not found[2].any()
    for i, problem in enumerate(problems[:2]):
        prompt = encode(tokenizer, problem.prompt, False)
        seeds = [(3, i, k, 1) for k in range(40)]
        alone = generate(model, tokenizer, [prompt] * 40, seeds, PLAIN)
        texts = [tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in alone]
        assert found[i].tolist() == [is_correct(text, problem.answer) for text in texts]
    assert found.any()


def test_same_seed_same_verdicts(tokenizer):
    model = make_model(dtype=torch.float64)
    problems = [Problem(f"{i} + 3 =", "5") for i in range(6)]
    first = evaluate(model, tokenizer, problems, PLAIN, samples=30)
    done = []
    again = evaluate(
        model, tokenizer, problems, PLAIN, samples=30, batch_size=7, on_done=done.append
    )
    other = evaluate(model, tokenizer, problems, PLAIN, samples=30, seed=1)
    assert (first == again).all() and sum(done) == 180
    assert first.any() and (first != other).any()


def test_select_ranks_by_the_variance_of_correctness(tokenizer):
    model = make_model(dtype=torch.float64)
    pool = [
        Problem(f"{a} + {b} =", str(answer)) for a in (1, 2) for b in (3, 4) for answer in (3, 5)
    ]
    pool.append(Problem("1 + 3 =", "never"))
    ranked = select(model, tokenizer, pool, PLAIN, samples=30, seed=1)
    assert sorted(c.problem.prompt for c in ranked) == sorted(p.prompt for p in pool)
    variances = [candidate.variance for candidate in ranked]
    assert variances == sorted(variances, reverse=True) and variances[0] > 0
    assert ranked[-1].problem.answer == "never" and ranked[-1].pass_rate == 0


@pytest.mark.parametrize("samples", [10, 16])
def test_rates_as_far_from_half_rank_alike(samples):
    for right in range(samples + 1):
        rates = right / samples, (samples - right) / samples
        low, high = (Candidate(Problem("p"), rate) for rate in rates)
        assert low.variance == high.variance
        assert low.variance == pytest.approx(rates[0] * (1 - rates[0]))
    best = Candidate(Problem("p"), 0.5).variance
    assert best == 0.25 and best > Candidate(Problem("p"), 7 / 16).variance
