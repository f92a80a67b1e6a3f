"""What a report says in words."""

from pathlib import Path

import numpy as np
from scipy.stats import fisher_exact

from em_kernels.training.config import TrainConfig
from em_kernels.training.report.page import Run, happened, majority_lost, over_runs, warnings


def told_of(metrics, rollouts=32):
    rows = [{"update": i + 1, "repetition": 0, "ended": 1, **m} for i, m in enumerate(metrics)]
    for row in rows:
        row["right"] = np.arange(rollouts) < (row["accuracy"] or 0) * rollouts
    return happened(rows), list(warnings(rows))


def test_words_follow_the_numbers():
    rise = [{"entropy": 0.5, "accuracy": 0.25}, {"entropy": 0.1, "accuracy": 0.75}]
    p = fisher_exact([[8, 24], [24, 8]]).pvalue
    assert told_of(rise)[0].endswith(
        "from 25% to 75% of the completions; more than chance explains "
        f"(Fisher's exact p = {p:.2g})."
    )
    assert "a change is not shown" in told_of(rise, rollouts=4)[0] and told_of(rise)[1] == []
    fall = [*rise, {"entropy": 0.01, "accuracy": 0.25}]
    (warning,) = told_of(fall)[1]
    assert warning.startswith("Overtrained: accuracy on the training prompt fell from 75% in ")
    assert told_of(fall, rollouts=4)[1] == []  # With four completions it may be chance.
    unknown = [{"entropy": 0.5, "accuracy": None}, {"entropy": 0.6, "accuracy": None}]
    assert "Accuracy is not known" in told_of(unknown)[0] and told_of(unknown)[1] == []
    late = [{"entropy": 0.6, "accuracy": None}, *fall]  # The answer was given on resume.
    said, (warning,) = told_of(late)
    assert "Accuracy on the training prompt went from 25% in update 2 to 25% of the" in said
    assert "fell from 75% in update 3 to 25% in update 4" in warning
    assert told_of(late[:2])[0].endswith("Accuracy on the training prompt was 25% in update 2.")
    bad = [{**unknown[0], "ended": 0.4}, {**unknown[1], "repetition": 0.2}]
    cut, repeated = told_of(bad)[1]
    assert "cut off at sampling.max_new_tokens in 1 of 2 updates" in cut
    assert repeated.startswith("Repetition rose from 0.0% to 20.0% of the 4-grams")


def test_the_majority_answer_is_followed():
    """By prompt; the first update that falls to half, beyond chance, is named."""

    def told(*shares, prompts=((5,), (6,))):
        records = {}
        for update, share in enumerate(shares, 1):
            records[update] = [
                {
                    "prompt_ids": list(ids),
                    "text": f"so \\boxed{{{ids[0] if i < share else 100 + i}}}",
                }
                for ids in prompts
                for i in range(8)
            ]
        return list(majority_lost(Run(Path(), TrainConfig(), [], {}, records, None)))

    assert told(6) == told(6, 5, 6) == told() == []
    (said,) = told(6, 5, 1, 0)
    p = fisher_exact([[4, 12], [14, 2]]).pvalue
    assert said.startswith(
        "The commonest answer of update 1, in 75% of its completions, was in 12% of those of "
    )
    assert f"update 3 (p = {p:.2g})" in said
    assert told(3, 1, prompts=((5,),)) == []  # With eight completions it may be chance.


def test_mean_and_deviation_over_runs():
    runs = [
        [{"update": 1, "entropy": 0.2, "accuracy": 0.5}, {"update": 2, "entropy": 0.1}],
        [{"update": 1, "entropy": 0.4, "accuracy": 0.75}, {"update": 2, "entropy": 0.3}],
        [{"update": 1, "entropy": 0.3, "accuracy": None}],
    ]
    heads, first = over_runs(runs)
    assert heads == ["update", "Entropy, nats per token"] and first == ["1", "0.3 ± 0.1"]
    heads, first, second = over_runs(runs[:2])
    assert heads[2] == "Accuracy on the training prompt, % of completions"
    assert first == ["1", "0.3 ± 0.14", "62.5 ± 18"] and second == ["2", "0.2 ± 0.14", ""]
    assert over_runs(runs[:1]) == over_runs([runs[0], []]) == []
