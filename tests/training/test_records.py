"""A run's records: reading, damage, torn ends; the marker of the process that works there."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from em_kernels.training.config import TrainConfig, read_yaml
from em_kernels.training.rollouts.sampling import Rollout
from em_kernels.training.runs import records
from em_kernels.training.runs.records import (
    Running,
    append,
    check_output,
    cut_off,
    read_metrics,
    read_rollouts,
    repetition,
    trim,
    write_config,
)
from em_kernels.training.settings import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
N = 3  # completions of an update


def row(update, index):
    text = "ünï\u2028\x85\n\x1c"  # characters at which str.splitlines splits
    ids = {"prompt_ids": [1, 2], "response_ids": [update, index], "ended": index > 0}
    return {"update": update, "index": index, **ids, "text": text}


def rollouts_of(update):
    return [Rollout([1, 2], [update, index], index > 0) for index in range(N)]


@pytest.fixture
def run(tmp_path):
    """A run of three updates."""
    for update in (1, 2, 3):
        append(tmp_path / "rollouts.jsonl", [row(update, index) for index in range(N)])
        append(tmp_path / "metrics.jsonl", [{"update": update, "entropy": 1 / update}])
    return tmp_path


def cut(path, size):
    os.truncate(path, path.stat().st_size + size)


def test_append_and_read(run):
    assert read_rollouts(run, N) == {update: rollouts_of(update) for update in (1, 2, 3)}
    assert [r["entropy"] for r in read_metrics(run)] == [1, 1 / 2, 1 / 3]
    assert len((run / "rollouts.jsonl").read_bytes().split(b"\n")) == 3 * N + 1


def test_any_torn_end_costs_the_last_update_alone(run):
    path = run / "rollouts.jsonl"
    whole = path.read_bytes()
    start = whole.index(b'{"update": 3')
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        assert read_rollouts(run, N) == {update: rollouts_of(update) for update in (1, 2)}
    os.truncate(run / "metrics.jsonl", 30)
    assert [r["update"] for r in read_metrics(run)] == [1]


def test_trim_and_go_on(run):
    kept = (run / "rollouts.jsonl").read_bytes(), (run / "metrics.jsonl").read_bytes()
    append(run / "rollouts.jsonl", [row(4, 0), row(4, 1)])
    cut(run / "rollouts.jsonl", -5)
    append(run / "metrics.jsonl", [{"update": 4}])
    cut(run / "metrics.jsonl", -1)
    trim(run, rollouts_upto=3, metrics_upto=3)
    assert ((run / "rollouts.jsonl").read_bytes(), (run / "metrics.jsonl").read_bytes()) == kept
    times = [path.stat().st_mtime_ns for path in sorted(run.iterdir())]
    trim(run, rollouts_upto=3, metrics_upto=9)
    assert [path.stat().st_mtime_ns for path in sorted(run.iterdir())] == times
    trim(run, rollouts_upto=1, metrics_upto=0)
    assert read_rollouts(run, N) == {1: rollouts_of(1)} and read_metrics(run) == []
    append(run / "rollouts.jsonl", [row(2, index) for index in range(N)])
    assert read_rollouts(run, N) == {1: rollouts_of(1), 2: rollouts_of(2)}


def test_trim_of_a_run_that_has_nothing(tmp_path):
    trim(tmp_path, rollouts_upto=0, metrics_upto=0)
    assert list(tmp_path.iterdir()) == [] and read_metrics(tmp_path) == []


@pytest.mark.parametrize("line", [1, 5, 9])
@pytest.mark.parametrize("damage", [b"", b"{", b'"update"', b"{}", b'{"update": "3"}', b"\xff"])
def test_a_damaged_line_is_named(line, damage, run):
    for name, last in (("rollouts.jsonl", 9), ("metrics.jsonl", 3)):
        lines = (run / name).read_bytes().split(b"\n")
        lines[min(line, last) - 1] = damage
        (run / name).write_bytes(b"\n".join(lines))
    message = f"output: line {line} of .*rollouts.jsonl is damaged"
    with pytest.raises(UserError, match=message):
        read_rollouts(run, N)
    with pytest.raises(UserError, match=message):
        trim(run, rollouts_upto=3, metrics_upto=3)
    with pytest.raises(UserError, match=f"output: line {min(line, 3)} of .*metrics.jsonl is dam"):
        read_metrics(run)


@pytest.mark.parametrize(
    "wrong",
    [{"update": 1}, {"index": 0}, {"index": 2}]
    + [{"prompt_ids": ids} for ids in ([], 3, None)]
    + [{"response_ids": ids} for ids in ([], ["a"], [-1], [0.5])],
)
def test_a_line_that_is_not_the_next_completion(wrong, run):
    lines = (run / "rollouts.jsonl").read_text("utf-8").split("\n")
    lines[4] = json.dumps({**row(2, 1), **wrong})
    (run / "rollouts.jsonl").write_text("\n".join(lines), "utf-8")
    message = r"rollouts: line 5 of .*rollouts.jsonl is not completion 1 \(of 3\) of update 2"
    with pytest.raises(UserError, match=message):
        read_rollouts(run, N)


def test_another_number_of_rollouts(run):
    with pytest.raises(UserError, match=r"line 3 of .* is not completion 0 \(of 2\) of update 2"):
        read_rollouts(run, N - 1)
    with pytest.raises(UserError, match=r"line 4 of .* is not completion 3 \(of 4\) of update 1"):
        read_rollouts(run, N + 1)


def test_a_folder_that_is_no_runs(tmp_path):
    with pytest.raises(UserError, match=f"rollouts_from: {tmp_path} has no rollouts.jsonl"):
        read_rollouts(tmp_path, N)
    write_config(tmp_path, TrainConfig())
    assert read_rollouts(tmp_path, N) == {}  # a run that was stopped before the first update


@pytest.mark.parametrize("prompt", ["ünï: é\n", "a\x85b", " \u2028\u2029\ufeff\t\x7f "])
def test_config(prompt, tmp_path):
    config = TrainConfig(model="demo", prompt=prompt)
    write_config(tmp_path, config)
    assert read_yaml(tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_full_disk(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="output: cannot write .*metrics.jsonl: .*No space left"):
        append(tmp_path / "metrics.jsonl", [{"update": 1}])
    (tmp_path / ".config.yaml.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="output: cannot write .*config.yaml: .*No space left"):
        write_config(tmp_path, TrainConfig())
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output: cannot write .*config.yaml: .*Not a directory"):
        write_config(tmp_path / "file", TrainConfig())


def test_a_start_that_was_killed_is_no_run(tmp_path):
    for name in (".config.yaml.partial", ".asked.json.partial", "asked.json", "running.json"):
        (tmp_path / name).touch()
    check_output(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="output: .* already holds a run"):
        check_output(tmp_path)


# The marker


def train(run, phases, connection):
    """Mark the folder, report, and wait."""
    with Running(run) as running:
        for phase in phases:
            running.phase(phase)
        connection.send(running.death)
        connection.recv()


@pytest.fixture
def trainer():
    """trainer(run, *phases) starts a process that works in a run's folder."""
    context, started = multiprocessing.get_context("fork"), []

    def start(run, *phases):
        ours, theirs = context.Pipe()
        process = context.Process(target=train, args=(run, phases, theirs))
        process.start()
        started.append(process)
        process.death, process.connection = ours.recv(), ours
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def end(process, number=None):
    if number is None:
        process.connection.send(None)
    else:
        os.kill(process.pid, number)
    process.join()


def test_a_clean_end_or_an_exception_leaves_no_marker(trainer, tmp_path):
    run = tmp_path / "new" / "run"
    process = trainer(run)
    assert json.loads((run / "running.json").read_text("utf-8"))["pid"] == process.pid
    end(process)
    assert process.death is None and list(run.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), Running(run) as running:
        assert running.death is None
        raise KeyboardInterrupt
    assert list(run.iterdir()) == []


def test_a_killed_process_is_reported_once(trainer, tmp_path):
    first = trainer(tmp_path, "a very long name of a phase", "update 3")
    end(first, signal.SIGKILL)
    second = trainer(tmp_path)
    assert f"Process {first.pid} died here without a message, in update 3 since 20" in second.death
    assert "most likely the kernel killed it for memory" in second.death
    for remedy in ("--host-memory", "--moments bf16", "--offload-dir"):
        assert remedy in second.death
    assert "\n" not in second.death
    end(second)
    assert trainer(tmp_path).death is None


def test_another_process_in_the_folder_is_refused(trainer, tmp_path):
    process = trainer(tmp_path, "update 1")
    marker = (tmp_path / "running.json").read_bytes()
    with pytest.raises(UserError, match=f"another process works in {tmp_path} now"):
        Running(tmp_path).__enter__()
    assert (tmp_path / "running.json").read_bytes() == marker
    os.kill(process.pid, signal.SIGSTOP)  # stopped is not dead
    with pytest.raises(UserError, match="another process"):
        Running(tmp_path).__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Running(tmp_path) as running:
        assert f"Process {process.pid} died" in running.death


def test_the_kernels_count_is_named(trainer, tmp_path, monkeypatch):
    """The kernel's count is made to have risen by 2 since the process started."""
    end(trainer(tmp_path), signal.SIGKILL)
    facts = json.loads((tmp_path / "running.json").read_text("utf-8"))
    monkeypatch.setattr(records, "_oom_kills", lambda: (facts["kills"] or 0) + 2)
    with Running(tmp_path) as running:
        assert "the kernel has since killed 2 for memory, most likely this one" in running.death


@pytest.mark.parametrize("left", [b"\0" * 400, b'{"pid": 1', b"{}"])
def test_a_marker_that_lost_its_content(left, tmp_path):
    (tmp_path / "running.json").write_bytes(left)
    with Running(tmp_path) as running:
        assert "died here without a message" in running.death
        assert json.loads((tmp_path / "running.json").read_bytes())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output: cannot write .*: .*Not a directory"):
        Running(tmp_path / "file" / "run").__enter__()


# What is said of completions


def test_repetition():
    assert repetition([]) == repetition([1, 1, 1]) == 0
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 14) == 10 / 11
    assert repetition([1, 2, 3, 4, 9, 1, 2, 3, 4]) == 1 / 6


def test_a_warning_where_most_are_cut_off():
    ended, cut = Rollout([1], [2], True), Rollout([1], [2], False)
    assert cut_off([ended, cut]) is None
    assert cut_off([ended, cut, cut]) == (
        "Warning: 2 of 3 completions were cut off; raise sampling.max_new_tokens, or check "
        "sampling.stop."
    )
