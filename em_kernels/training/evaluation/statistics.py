"""95 % intervals, paired tests and pass@k of right and wrong answers."""

from collections.abc import Sequence
from math import ceil, comb, floor

import numpy as np
from scipy.stats import binomtest, bootstrap, norm
from scipy.stats import t as student

RESAMPLES, RESAMPLES_OF_PROMPTS = 2000, 4000


def wilson(right: np.ndarray) -> tuple[float, float]:
    """Return the 95 % Wilson interval of the accuracy."""
    interval = binomtest(int(right.sum()), right.size).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of a mean over problems, by resampling them."""
    # Resampling equal values shows no spread. Instead: Wilson's interval, as if each problem were
    # right or wrong, with the number of right ones rounded down and up.
    if np.ptp(values) == 0 and 0 <= values[0] <= 1:
        fewest, most = (np.arange(values.size) < count(values.sum()) for count in (floor, ceil))
        return wilson(fewest)[0], wilson(most)[1]
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def mean_over_prompts(change: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the mean of (prompts, problems) values and its 95 % interval, resampling both axes."""
    prompts, problems = change.shape
    by_prompt = rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES_OF_PROMPTS)
    # Corrects an interval from few prompts: variance by n, not n - 1; normal, not Student's t.
    wider = np.sqrt(prompts / (prompts - 1)) * student.ppf(0.975, prompts - 1) / norm.ppf(0.975)
    weights = 1 / prompts + wider * (by_prompt / prompts - 1 / prompts)
    by_problem = rng.multinomial(problems, np.full(problems, 1 / problems), RESAMPLES_OF_PROMPTS)
    draws = ((weights @ change) * (by_problem / problems)).sum(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(change.mean()), float(low), float(high)


def paired_change(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float, float]:
    """Return the change on the same problems, its 95 % interval, and McNemar's exact p value."""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    n, changed = before.size, gained + lost
    change = (gained - lost) / n
    half = 1.96 * np.sqrt(max(changed - (gained - lost) ** 2 / n, 0)) / n
    p = binomtest(gained, changed).pvalue if changed else 1.0
    return change, change - half, change + half, p


def pass_at(right: np.ndarray, k: int) -> np.ndarray:
    """Return each problem's unbiased pass@k (Chen et al., arXiv 2107.03374)."""
    n, wrong = right.shape[1], (~right).sum(1)
    return np.array([1 - comb(int(w), k) / comb(n, k) for w in wrong])


def percent(value: float, interval: Sequence[float] = ()) -> str:
    """Format a share as percent, with its interval if one is given."""
    low_high = ", ".join(f"{100 * x:.1f}" for x in interval)
    return f"{100 * value:.1f}" + (f" [{low_high}]" if interval else "")
