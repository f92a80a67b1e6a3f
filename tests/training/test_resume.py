"""Runs killed at named points, and resumed."""

import os
import shutil
import signal

import pytest
import yaml
from training.faults import BETWEEN, INSIDE
from training.lives import ENDS, MODES, assert_same, check, command, comparable, content, slow
from training.tiny import read

FAST = [
    ("full", ["half of the third completions"]),
    ("replay", ["slab 3 of update 3"]),
    ("lora", ["half of the second state"]),
]


@pytest.mark.parametrize("mode, points", FAST)
def test_a_kill_loses_nothing(mode, points, start, resume, whole_of, tmp_path):
    check(mode, points, start, resume, whole_of, tmp_path)


KILLS = [*INSIDE, *BETWEEN]
STATELESS = {point for point in KILLS if "state" in point or "facts" in point}
SLOW = [("full", [point]) for point in KILLS]
SLOW += [("replay", [point]) for point in INSIDE if point not in STATELESS]


@pytest.mark.slow
@pytest.mark.parametrize("mode, points", SLOW)
def test_a_kill_anywhere_loses_nothing(mode, points, start, resume, whole_of, tmp_path):
    check(mode, points, start, resume, whole_of, tmp_path)


TWICE = [
    ("full", ["half of the third completions", "half of the first state"]),
    ("replay", ["the last micro-batch of update 4", "slab 1 of update 1"]),
    ("bf16", ["slab 3 of update 3", "half of the first metrics"]),
    ("fp16", ["slab 3 of update 3", "half of the first metrics"]),
    ("lora", ["the old facts not removed"]),
    ("lora replay", ["token 30", "the step of update 2"]),
    ("offload", ["slab 3 of update 3", "token 5 of update 1"]),
    ("offload_dir", ["half of the fourth metrics", "slab 1 of update 1"]),
    ("offload_dir", ["half of the second model"]),
    ("penalty", ["slab 3 of update 3", "half of the first metrics"]),
    ("official", ["the second micro-batch of update 1", "half of the fourth metrics"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode, points", TWICE)
def test_modes_and_two_kills(mode, points, start, resume, whole_of, tmp_path):
    check(mode, points, start, resume, whole_of, tmp_path)


# Resumed with other settings, or after damage


@pytest.mark.parametrize("mode", [slow("full"), "replay"])
def test_a_finished_run_is_left_alone(mode, resume, whole_of, tmp_path):
    shutil.copytree(whole_of(mode), tmp_path / "run")
    before = content(tmp_path / "run")
    ended = resume("run")
    assert (ended.code, ended.out) == (0, f"{tmp_path}/run/checkpoints/step-00004\n")
    assert "update " not in ended.err.replace("after update 4", "")
    after = content(tmp_path / "run")
    assert yaml.safe_load(after.pop("config.yaml"))["output"] == f"{tmp_path}/run"
    assert after.items() <= before.items() and len(after) == len(before) - 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "replay"])
def test_more_steps(mode, start, resume, whole_of, tmp_path):
    """A resumed run records its new number of steps, for the next one to resume."""
    assert start("run", **{**MODES[mode], "steps": 2}).code == 0
    ended = resume("run", "--steps", "4", points=["half of the first completions"])
    assert ended.code == -signal.SIGKILL
    assert resume("run").code == 0
    assert_same(tmp_path / "run", whole_of(mode))


CHANGES = {
    "--lr 0.002": "lr 0.001, not 0.002",
    "--micro-batch 40": "micro_batch 20, not 40",
    "--temperature 0.5": "sampling.temperature 1.0, not 0.5",
    "--rollouts 7": "rollouts 6, not 7",
    "--prompt Hello": 'prompt "What is 2 + 3?", not "Hello"',
}


def test_settings_that_change_the_numbers_are_refused(resume, whole_of, tmp_path):
    shutil.copytree(whole_of("full"), tmp_path / "run")
    before = content(tmp_path / "run")
    for flags, what in CHANGES.items():
        message = f"resume: the run was made with {what}; go on with that, or start another"
        assert resume("run", "--steps", "6", *flags.split()).refused() == message
        assert content(tmp_path / "run") == before


@pytest.mark.slow
def test_settings_left_open_are_the_runs(start, resume, whole_of, tmp_path):
    shutil.copytree(whole_of("full"), tmp_path / "run")
    assert resume("run", "--micro-batch", "auto", "--mode", "auto").code == 0


def test_not_a_run(resume, start, whole_of, tmp_path):
    (tmp_path / "run").mkdir()
    assert resume("run").refused() == (
        f"resume: {tmp_path}/run is not the folder of a run: it has no config.yaml"
    )
    assert content(tmp_path).keys() == {"run.stdout", "run.stderr"}
    whole = whole_of("full")
    ended = command(["train", "--resume", whole, "--output", tmp_path / "run"], tmp_path / "log")
    assert f"cannot read {tmp_path}/run/config.yaml" in ended.refused()
    assert list((tmp_path / "run").iterdir()) == []
    shutil.copytree(whole, tmp_path / "old")
    path = tmp_path / "old" / "config.yaml"
    path.write_text(path.read_text() + "moment: 3\n")
    assert (
        resume("old").refused() == f"config: {path}: moment: unknown setting; did you mean moments?"
    )
    assert "choose another, or --resume it" in start("old").refused()


@pytest.mark.slow
def test_a_damaged_state_is_named_and_the_completions_replayed(start, resume, whole_of, tmp_path):
    assert start("run", "the norm of update 2", save_at=(1,)).code == -signal.SIGKILL
    path = tmp_path / "run" / "checkpoints" / "step-00001" / "training_state.safetensors"
    os.truncate(path, 5000)
    ended = resume("run", "--save-at", "2")
    assert ended.code == 0
    assert f"{path.parent} cannot be resumed from: {path.name} is truncated" in ended.err
    assert comparable(tmp_path / "run") == comparable(whole_of("full"))
    last = "checkpoints/step-00004"
    assert content(tmp_path / "run" / last) == content(whole_of("full") / last)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_records_that_were_cut_are_made_again(name, resume, whole_of, tmp_path):
    """Remove a damaged line and what follows, as the message says; the state is newer."""
    shutil.copytree(whole_of("full"), tmp_path / "run")
    path = tmp_path / "run" / name
    lines = path.read_bytes().splitlines(True)
    line = 2 if name == "metrics.jsonl" else 8
    path.write_bytes(b"".join([*lines[: line - 1], b"\0" * 9 + b"\n", *lines[line:]]))
    assert (
        f"line {line} of {path} is damaged; remove it and what follows" in resume("run").refused()
    )
    path.write_bytes(b"".join(lines[: line - 1]))
    ended = resume("run")
    assert ended.code == 0 and "records before it are missing" in ended.err
    assert_same(tmp_path / "run", whole_of("full"))


# Other runs' completions


@pytest.mark.slow
def test_replayed_completions_give_the_same_run(start, whole_of, tmp_path):
    whole = whole_of("full")
    assert start("run", rollouts_from=whole).code == 0
    assert comparable(tmp_path / "run") == comparable(whole)
    assert content(tmp_path / "run" / "checkpoints") == content(whole / "checkpoints")
    assert start("sparse", rollouts_from=whole, grad_tolerance=0.3, lr=1e-2).code == 0
    sparse, exact = (read(path / "metrics.jsonl") for path in (tmp_path / "sparse", whole))
    assert [row["tokens"] for row in sparse] == [row["tokens"] for row in exact]
    assert sparse[0]["entropy"] == exact[0]["entropy"] and sparse[0]["active_share"] < 1
    assert sparse[3]["entropy"] != exact[3]["entropy"]
    names = [path / "rollouts.jsonl" for path in (tmp_path / "sparse", whole)]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.slow
def test_completions_that_do_not_suit_are_refused(start, whole_of, tmp_path):
    whole = whole_of("full")
    refusals = {
        f"rollouts_from: {whole} holds 4 whole updates of 5; lower steps": {"steps": 5},
        f"prompt: the completions in {whole} are of another prompt": {"prompt": "Hello"},
        "set rollouts to as many as were sampled": {"rollouts": 5},
        f"sampling.max_new_tokens: completions in {whole} have ": {
            "sampling": ENDS.model_copy(update={"max_new_tokens": 5})
        },
    }
    for line, changes in refusals.items():
        assert line in start("run", rollouts_from=whole, **changes).refused()
        assert not (tmp_path / "run").exists()
    assert "has no rollouts.jsonl" in start("run", rollouts_from=tmp_path).refused()
