"""Runs of two real processes (gloo) equal the same runs of one."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console
from training.lives import slow
from training.processes import (
    APART,
    BASE,
    FSDP2,
    RUNS,
    alone,
    assert_same_run,
    in_other_orders,
    left,
    replayed,
    run_all,
)
from training.tiny import settings

from em_kernels.training.engines.step import Scoring, rank_share
from em_kernels.training.rollouts.sampling import Rollout
from em_kernels.training.trainer import train

# FSDP2 needs a launch of its own, which takes as long as all runs of the replicas.
ENGINES = pytest.mark.parametrize(
    ("engine", "env"),
    [slow("replicas", {}), slow("fsdp2", FSDP2)],
)


@pytest.fixture(scope="module")
def by_engine(tmp_path_factory, folders):
    """Return a function that gives the folder of an engine's runs, with each process's output."""
    found = {}

    def runs(engine, **env):
        if engine not in found:
            home = tmp_path_factory.mktemp(engine)
            run_all(engine, folders, home, **env)
            found[engine] = home
        return found[engine]

    return runs


@ENGINES
def test_engines(by_engine, engine, env):
    home = by_engine(engine, **env)
    scales = []
    for rank in (0, 1):
        facts = json.loads((home / f"engine.{rank}.json").read_text())
        assert facts["loss"] == [0] * 5 and facts["told"]
        line = "rollouts: 1 are fewer than the 2 processes; raise it"
        assert facts["refusal"] == ("2" if rank else line)
        layers = [f"model.layers.{i}" for i in range(2)] if engine == "fsdp2" else []
        assert [name for name in facts["parts"] if "layers" in name] == layers
        scales.append(facts.get("scales"))
    assert scales[0] == scales[1]  # an overflow on one rank is one on all
    if engine == "replicas":
        *halved, norm = scales[0]
        assert halved == [2.0**i for i in range(16, 3, -1)] and norm > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS["replicas"])
def test_replicas_equal_one_process(by_engine, folders, tmp_path, name):
    home = by_engine("replicas")
    others = in_other_orders("replicas", name, folders, home, tmp_path)
    tied, _ = RUNS["replicas"][name]
    assert_same_run(left(home / name), left(home / "alone" / name), others, tied)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS["fsdp2"])
def test_fsdp2_equals_one_process(by_engine, folders, tmp_path, name):
    home = by_engine("fsdp2", **FSDP2)
    others = in_other_orders("fsdp2", name, folders, home, tmp_path)
    tied, _ = RUNS["fsdp2"][name]
    half = name == "half"
    assert_same_run(left(home / name), left(home / "alone" / name), others, tied, half)


@ENGINES
def test_stopped_runs_go_on_to_the_same_bits(by_engine, engine, env):
    home = by_engine(engine, **env)
    (metrics, tensors), (again, found) = left(home / next(iter(RUNS[engine]))), left(home / "again")
    for name in ("entropy", "grad_norm", "tokens"):
        assert [row[name] for row in metrics] == [row[name] for row in again]
    for whole, taken_up in zip(tensors, found, strict=True):
        assert all(torch.equal(whole[name], taken_up[name]) for name in whole)
    assert "Resuming after update 2; 0 more" in (home / "again.0.txt").read_text()


@pytest.mark.slow
def test_every_rank_knows_the_run_and_one_speaks(by_engine):
    home = by_engine("replicas")
    first, second = (json.loads((home / f"plain.{rank}.json").read_text()) for rank in (0, 1))
    of_all = {"entropy", "grad_norm", "tokens", "ended", "repetition", "peak_memory_gib"}
    assert len(first) == 3 and all(
        ours[name] == theirs[name]
        for ours, theirs in zip(first, second, strict=True)
        for name in of_all
    )
    assert "update  3/3" in (home / "plain.0.txt").read_text()
    assert (home / "plain.1.txt").read_text() == ""
    facts = json.loads((home / "plain/checkpoints/step-00003/training_state.json").read_text())
    assert (facts["settings"]["ranks"], facts["settings"]["engine"]) == (2, "replicas")


@pytest.mark.slow
def test_another_number_of_processes_replays(by_engine, folders, tmp_path):
    """One process cannot use the state of two; it trains again on the recorded completions."""
    import shutil

    shutil.copytree(by_engine("replicas") / "again", tmp_path / "again")
    config = settings(folders[True], tmp_path / "again", **{**BASE, "steps": 4})
    console = Console(file=StringIO(), width=300)
    train(config, console=console, resume=True)
    said = console.file.getvalue()
    assert "cannot be resumed from: it was made with ranks 2, not null" in said
    assert "Resuming after update 0; 3 more are trained again" in said
    asked = {**BASE, "steps": 4}
    expected = alone(folders, tmp_path / "one", True, asked)
    asked = replayed(asked, tmp_path / "one")
    runs = [alone(folders, tmp_path / f"sums-{seed}", True, asked, seed) for seed in (1, 2)]
    assert_same_run(left(tmp_path / "again"), expected, runs, True)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_token_counts_once(count, official):
    rollouts = [Rollout([1, 2, 3], list(range(1, 2 + i % 7)), bool(i % 2)) for i in range(13)]
    asked = {**APART, "official_loss": official, "micro_batch_rows": 2 if official else None}
    config = settings("none", "none", **asked)
    scoring = Scoring(official, padding=3)
    parts = [rank_share(rollouts, config, 20, index, count, scoring) for index in range(count)]
    batches = [[b for _, group in part.work for b in group] for part in parts]
    given = [id(rollout) for own in batches for batch in own for rollout in batch]
    assert sorted(given) == sorted(map(id, rollouts))
    assert {part.rounds for part in parts} == {max(map(len, batches))}
    weights = [
        tokens / parts[0].divisor(tokens, scoring)
        for own in batches
        for batch in own
        if (tokens := sum(len(scoring.positions(r)) for r in batch))
    ]
    assert sum(weights) == pytest.approx(1)
    sizes = [sum(map(len, (r for b in own for r in b))) for own in batches]
    assert max(sizes) <= min(sizes) + 10 or official  # dealt in turn, by length
