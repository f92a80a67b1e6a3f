"""Whole runs killed at named points, and what the next process makes of what they left."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from training.tiny import PLAIN, read, settings

CHILDREN = multiprocessing.get_context("forkserver")  # of a process that has no threads yet
CHILDREN.set_forkserver_preload(
    ["em_kernels.cli", "em_kernels.training.trainer", "em_kernels.training.lora", "tyro"]
    + ["transformers.models.llama.modeling_llama", "training.tiny"]
)
TIMES = {"tokens_per_s", "sampling_s", "training_s", "peak_memory_gib", "planned_memory_gib"}
ENDS = PLAIN.model_copy(update={"stop": ("a", "b", "c", "d", "e", "1")})  # of all lengths
BASE = {"steps": 4, "save_at": (2,), "micro_batch": 20, "sampling": ENDS, "save_optimizer": True}
MODES = {
    "full": {},
    "replay": {"save_optimizer": False},
    "bf16": {"dtype": "bfloat16", "moments": "bf16", "gradients": "bf16", "grad_tolerance": 2**-9},
    "lora": {"mode": "lora"},
    "lora replay": {"mode": "lora", "save_optimizer": False, "gradient_checkpointing": True},
    "offload": {"mode": "offload", "moments": "bf16"},
    "offload_dir": {"mode": "offload", "offload_dir": "state", "dtype": "bfloat16"},
    "official": {"official_loss": True, "micro_batch_rows": 2, "save_optimizer": False},
}


# In the child


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def on(owner, name, nth, first=die, then=None):
    """At the nth call: first(), then the call itself, then then()."""
    real, calls = getattr(owner, name), count(1)

    def call(*args, **kwargs):
        if (now := next(calls) == nth) and first is not None:
            first()
        result = real(*args, **kwargs)
        if now and then is not None:
            then()
        return result

    setattr(owner, name, call)


def after(owner, name, nth):
    on(owner, name, nth, None, die)


def torn(module, file_name, nth, writes=1):
    """The nth time that a module opens this file to write, it dies halfway through a write."""
    opened = count(1)

    class Half:
        def __init__(self, file):
            self.file, self.left = file, writes

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.left -= 1
            self.file.write(data if self.left else memoryview(data)[: len(data) // 2])
            if not self.left:
                self.file.flush()
                die()

    def opening(path, mode="r", **options):
        file = open(path, mode, **options)  # noqa: SIM115
        due = str(path).endswith(file_name) and "r" not in mode and next(opened) == nth
        return Half(file) if due else file

    module.open = opening


def limit(size, action=signal.SIG_DFL):
    """Of a file: the write that goes beyond fails, or the kernel kills in the middle of it."""
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full(name):
    """No room for more than 10 bytes of this file, nor for any that is larger."""
    path = Path(f"run/{name}")
    os.ftruncate(2, 0)  # a file itself
    limit((path.stat().st_size if path.exists() else 0) + 10, signal.SIG_IGN)


def no_memory(module, name, tokens_of, tokens, nth=1):
    """From the nth call on, for more tokens than so many."""
    real, calls = getattr(module, name), count(1)

    def call(*args, **kwargs):
        if next(calls) >= nth and tokens_of(*args, **kwargs) > tokens:
            raise torch.OutOfMemoryError
        return real(*args, **kwargs)

    setattr(module, name, call)


def no_memory_for_a_gradient():
    """Once, when one has arrived and is to be added; it is left behind."""
    on(the("AdamW"), "add", 30, exhaust)


def size(of):
    return lambda disk="run": subprocess.run(
        ["mount", "-o", f"remount,size={of}", disk], check=True
    )


def exhaust():
    raise torch.OutOfMemoryError


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def on_file(name, nth, method, first=die, then=None):
    """At the nth call of a method of a Path with this name."""
    real, calls = getattr(Path, method), count(1)

    def call(path, *args, **kwargs):
        now = path.name == name and next(calls) == nth
        if now and first is not None:
            first()
        result = real(path, *args, **kwargs)
        if now and then is not None:
            then()
        return result

    setattr(Path, method, call)


def half_text(name, nth):
    real, calls = Path.write_text, count(1)

    def write_text(path, text, **kwargs):
        if path.name == name and next(calls) == nth:
            real(path, text[: len(text) // 2], **kwargs)
            die()
        return real(path, text, **kwargs)

    Path.write_text = write_text


def the(name):
    """A class or module of the trainer's."""
    from em_kernels.training import checkpoint, optimizer, records, rollout, step, trainer

    parts = {m.__name__.rpartition(".")[2]: m for m in (checkpoint, records, rollout, step)}
    parts |= {"trainer": trainer, "optimizer": optimizer, "AdamW": optimizer.MasterAdamW}
    parts |= {"Running": records.Running, "Prompt": step.Prompt, "Ends": rollout._SegmentEnd}
    return parts[name]


# Two saves (after updates 2 and 4), 4 updates of 6 completions, a file's n-th use counted from 1.
INSIDE = {  # a write, or what must happen as a whole
    "half of the settings": lambda: half_text(".config.yaml.partial", 1),
    "half of the first completions": lambda: torn(the("records"), "rollouts.jsonl", 1),
    "half of the third completions": lambda: torn(the("records"), "rollouts.jsonl", 3),
    "half of the first metrics": lambda: torn(the("records"), "metrics.jsonl", 1),
    "half of the fourth metrics": lambda: torn(the("records"), "metrics.jsonl", 4),
    "completions not synced": lambda: on(the("records"), "sync", 6),
    "half of the second model": lambda: on(the("trainer"), "save_checkpoint", 2, half_model),
    "half of the first state": lambda: torn(the("checkpoint"), "training_state.safetensors", 1, 9),
    "half of the second state": lambda: torn(the("checkpoint"), "training_state.safetensors", 2, 2),
    "half of the second facts": lambda: half_text("training_state.json", 2),
    "a checkpoint not synced": lambda: on(the("checkpoint"), "sync", 3),
    "a checkpoint not renamed": lambda: on_file(".step-00004.partial", 1, "rename"),
    "a checkpoint renamed": lambda: on_file(".step-00004.partial", 1, "rename", None, die),
    "the old facts not removed": lambda: on_file("training_state.json", 1, "unlink"),
    "the old state not removed": lambda: on_file("training_state.safetensors", 1, "unlink"),
    "the old state removed": lambda: on_file("training_state.safetensors", 1, "unlink", None, die),
    "slab 1 of update 1": lambda: after(the("AdamW"), "_copy_back", 1),
    "slab 3 of update 3": lambda: on(the("AdamW"), "_copy_back", 2 * SLABS + 3),
}
BETWEEN = {
    "nothing yet": lambda: after(the("Running"), "__enter__", 1),
    "settings": lambda: after(the("trainer"), "write_config", 1),
    "token 5 of update 1": lambda: on(the("Ends"), "__call__", 5),
    "token 30": lambda: on(the("Ends"), "__call__", 30),
    "completions of update 3": lambda: after(the("trainer"), "append", 5),
    "the second micro-batch of update 1": lambda: on(the("step"), "scored_states", 2),
    "the last micro-batch of update 4": lambda: on(the("Prompt"), "backward", 5),
    "the norm of update 2": lambda: on(the("AdamW"), "norm", 2),
    "the step of update 2": lambda: on(the("AdamW"), "step", 2),
    "the step of update 3, done": lambda: after(the("AdamW"), "step", 3),
    "the metrics of update 2": lambda: after(the("trainer"), "append", 4),
    "the first save": lambda: after(the("trainer"), "save_checkpoint", 1),
    "the end": lambda: on(the("Running"), "__exit__", 1),
}
ROOM = (4, 8, 16, 60, 300, 340, 380, 420, 700)  # KiB
OTHERS = {
    "memory for 40 tokens from update 2 on": lambda: no_memory(
        the("step"), "scored_states", lambda model, batch, *rest: 12 * len(batch), 40, 2
    ),
    "memory for 2 completions": lambda: no_memory(
        the("rollout"), "_generate_batch", lambda model, tokenizer, ids, *rest: len(ids), 2
    ),
    "no memory for a gradient": no_memory_for_a_gradient,
    "memory for 30 tokens": lambda: no_memory(
        the("step"), "scored_states", lambda model, batch, *rest: 12 * len(batch), 30
    ),
    "no memory for the optimizer": lambda: on(the("AdamW"), "__init__", 1, exhaust),
    "no memory in the step": lambda: on(the("AdamW"), "_copy_back", 2 * SLABS, exhaust),
    "full at completions of update 3": lambda: on(
        the("trainer"), "append", 5, lambda: full("rollouts.jsonl")
    ),
    "full at metrics of update 3": lambda: on(
        the("trainer"), "append", 6, lambda: full("metrics.jsonl")
    ),
    "room for a checkpoint": lambda: on(
        the("trainer"), "save_checkpoint", 2, lambda: limit(resource.RLIM_INFINITY)
    ),
    "full at the second checkpoint": lambda: on(
        the("trainer"), "save_checkpoint", 2, lambda: full("config.yaml")
    ),
    **{
        f"{kib} KiB left": lambda kib=kib: on(the("Running"), "__enter__", 1, size(f"{kib}k"))
        for kib in ROOM
    },
    "stopped": lambda: on(the("AdamW"), "norm", 1, stop),
    "Ctrl-C in update 2": lambda: on(the("Prompt"), "backward", 3, interrupt),  # the plan has one
    "Ctrl-C twice in the second save": lambda: on_file(
        ".step-00004.partial", 1, "rename", lambda: (interrupt(), interrupt())
    ),
}
POINTS = {**INSIDE, **BETWEEN, **OTHERS}
SLAB = 1 << 12  # elements
SLABS = 6  # of an update of the whole model


def half_model():
    limit(4000)  # less than any of the models, more than its other files by then


def main_of(arguments):
    from em_kernels.cli import main

    return main(arguments)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def life(arguments, log, changes):
    """Of a child: one command."""
    os.chdir(Path(log).parent)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_APPEND), number)
    from em_kernels.training import optimizer

    torch.set_num_threads(1)
    optimizer.SLAB = SLAB
    for change in changes:
        POINTS[change]()
    sys.exit(main_of(arguments))


# In the test


class Ended:
    def __init__(self, code, log):
        self.code = code
        self.out, self.err = (Path(f"{log}.{n}").read_text() for n in ("stdout", "stderr"))
        assert "Traceback" not in self.err, self.err

    def refused(self):
        """The one line of an error."""
        assert self.code == 2 and self.out == "", (self.code, self.err)
        lines = [line for line in self.err.splitlines() if "em-kernels train: error: " in line]
        assert [self.err.splitlines()[-1]] == lines
        return lines[0].removeprefix("em-kernels train: error: ")


def command(arguments, log, *changes):
    child = CHILDREN.Process(target=life, args=([*map(str, arguments)], str(log), changes))
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return Ended(child.exitcode, log)


@pytest.fixture
def start(folder, tmp_path):
    """start(name, *points, **settings) runs a new run there."""

    def start(name, *points, **changes):
        config = settings(folder, tmp_path / name, **{**BASE, **changes})
        if config.offload_dir is not None:
            config = config.model_copy(update={"offload_dir": tmp_path / config.offload_dir})
        path = tmp_path / f"{name}.yaml"
        path.write_text(config.to_yaml())
        return command(["train", "--config", path], tmp_path / name, *points)

    return start


@pytest.fixture
def resume(tmp_path):
    def resume(name, *flags, points=()):
        return command(["train", "--resume", tmp_path / name, *flags], tmp_path / name, *points)

    return resume


@pytest.fixture(scope="module")
def whole_of(folder, tmp_path_factory):
    """The folder of a mode's run that was never stopped."""
    found = {}

    def whole_of(mode):
        if mode not in found:
            home = tmp_path_factory.mktemp("whole")
            config = settings(folder, home / "run", **{**BASE, **MODES[mode]})
            (home / "run.yaml").write_text(config.to_yaml())
            assert command(["train", "--config", home / "run.yaml"], home / "log").code == 0
            found[mode] = home / "run"
        return found[mode]

    return whole_of


def comparable(run):
    rows = read(run / "metrics.jsonl")
    return [{name: x for name, x in row.items() if name not in TIMES} for row in rows]


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def assert_same(run, whole):
    assert comparable(run) == comparable(whole)
    assert (run / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    mine, other = content(run / "checkpoints"), content(whole / "checkpoints")
    assert mine.keys() == other.keys()
    assert [name for name in mine if mine[name] != other[name]] == []
    assert sorted(os.listdir(run)) == sorted(os.listdir(whole))


def check(mode, points, start, resume, whole_of, tmp_path):
    """Killed at each point in turn, and then left alone."""
    whole = whole_of(mode)
    ended = start("run", points[0], **MODES[mode])
    for point in [*points[1:], None]:
        assert ended.code in (-signal.SIGKILL, -signal.SIGXFSZ), (ended.code, ended.err)
        left = (point,) if point else ()
        if (tmp_path / "run" / "config.yaml").exists():
            ended = resume("run", points=left)
        else:
            ended = start("run", *left, **MODES[mode])
        assert "died here without a word" in ended.err
    assert ended.code == 0, ended.err
    assert ended.out == f"{tmp_path}/run/checkpoints/step-00004\n"
    assert_same(tmp_path / "run", whole)


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
    ("lora", ["the old facts not removed"]),
    ("lora replay", ["token 30", "the step of update 2"]),
    ("offload", ["slab 3 of update 3", "token 5 of update 1"]),
    ("offload_dir", ["half of the fourth metrics", "slab 1 of update 1"]),
    ("offload_dir", ["half of the second model"]),
    ("official", ["the second micro-batch of update 1", "half of the fourth metrics"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode, points", TWICE)
def test_modes_and_two_kills(mode, points, start, resume, whole_of, tmp_path):
    check(mode, points, start, resume, whole_of, tmp_path)


# A run that goes on otherwise


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
    """They stay, for a run that is killed once more."""
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
    """A damaged line, and what follows, as its message says; the state is of a later update."""
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
        "ask for as many as were sampled": {"rollouts": 5},
        f"sampling.max_new_tokens: completions in {whole} have ": {
            "sampling": ENDS.model_copy(update={"max_new_tokens": 5})
        },
    }
    for line, changes in refusals.items():
        assert line in start("run", rollouts_from=whole, **changes).refused()
        assert not (tmp_path / "run").exists()
    assert "has no rollouts.jsonl" in start("run", rollouts_from=tmp_path).refused()


# Memory


OUT_OF_MEMORY = "memory for 40 tokens from update 2 on"


@pytest.mark.slow
def test_less_memory_than_planned(start, resume, tmp_path):
    """The same numbers to rounding; and the sizes that were found are those of a resumed run."""
    auto = {"micro_batch": "auto", "rollout_batch": "auto", "save_optimizer": False}
    assert start("plain", **auto).code == 0
    ended = start("whole", OUT_OF_MEMORY, **auto)
    assert ended.code == 0 and "Out of memory: once more with micro_batch 36" in ended.err
    plain, whole = (read(tmp_path / name / "metrics.jsonl") for name in ("plain", "whole"))
    assert [row["micro_batch"] for row in plain] == [72] * 4
    assert [row["micro_batch"] for row in whole] == [72, 36, 36, 36]
    for name in ("entropy", "grad_norm"):
        for row, other in zip(plain, whole, strict=True):
            assert row[name] == pytest.approx(other[name], rel=1e-5)
    assert start("run", OUT_OF_MEMORY, "half of the fourth metrics", **auto).code < 0
    assert resume("run", points=["slab 1 of update 1"]).code < 0
    assert resume("run").code == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_less_memory_before_the_state(start, resume, tmp_path):
    """The update after the state begins with the size that the one before it ended with; and may
    halve it again.
    """
    auto = {"micro_batch": "auto", "save_at": (3,)}
    assert start("whole", OUT_OF_MEMORY, **auto).code == 0
    assert start("run", OUT_OF_MEMORY, "the first save", **auto).code < 0
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert resume("run").code == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    ended = resume("again", points=["memory for 30 tokens"])
    assert ended.code == 0 and "once more with micro_batch 18" in ended.err
    assert [row["micro_batch"] for row in read(tmp_path / "again" / "metrics.jsonl")][2:] == [
        36,
        18,
    ]


def test_no_memory_for_a_gradient_that_has_arrived(start, tmp_path):
    """It is not counted twice."""
    auto = {"micro_batch": "auto", "steps": 2}
    assert start("plain", **auto).code == 0
    ended = start("run", "no memory for a gradient", **auto)
    assert ended.code == 0 and "Out of memory: once more with micro_batch 36" in ended.err
    plain, other = (read(tmp_path / name / "metrics.jsonl") for name in ("plain", "run"))
    for row, found in zip(plain, other, strict=True):
        assert found["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_no_memory_to_sample(start, tmp_path):
    assert start("plain", steps=2).code == 0
    ended = start("run", "memory for 2 completions", steps=2, rollout_batch="auto")
    assert ended.code == 0 and "Out of memory: once more with rollout_batch 3" in ended.err
    assert [row["rollout_batch"] for row in read(tmp_path / "run" / "metrics.jsonl")] == [1, 1]
    names = [tmp_path / name / "rollouts.jsonl" for name in ("plain", "run")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.slow
def test_no_memory_to_start(start, tmp_path):
    line = start("run", "no memory for the optimizer").refused()
    assert line.startswith("out of memory with micro_batch 20, rollout_batch 64; no update yet; ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_memory_left_to_free(start, resume, whole_of, tmp_path):
    """In the middle of the weights' step, say; the run goes on elsewhere."""
    line = start("run", "no memory in the step").refused()
    assert line.startswith("out of memory with micro_batch 20, rollout_batch 64; --resume ")
    assert "--resume " + f"{tmp_path}/run goes on; use --micro-batch auto, " in line
    assert resume("run").code == 0
    assert_same(tmp_path / "run", whole_of("full"))


# Full disks


FULL = [
    ["full at metrics of update 3", "room for a checkpoint"],
    ["full at metrics of update 3"],
    ["full at completions of update 3"],
    ["full at the second checkpoint"],
]
DISKS = [(mode, points) for points in FULL for mode in ("full", "replay")]


@pytest.mark.parametrize("mode, points", [DISKS[0], *(slow(*disk) for disk in DISKS[1:])])
def test_a_full_disk_stops_it(mode, points, start, resume, whole_of, tmp_path):
    line = start("run", *points, **MODES[mode]).refused()
    assert line.startswith("output: cannot write ") and "File too large" in line
    goes_on = f"--resume {tmp_path}/run goes on"
    last = f"{tmp_path}/run/checkpoints/step-00002 holds the last update"
    assert line.endswith(f"; {last if 'completions' in points[0] else goes_on}")
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00002"]
    assert resume("run").code == 0
    assert_same(tmp_path / "run", whole_of(mode))


@pytest.mark.slow
@pytest.mark.parametrize("kib", ROOM)
def test_a_disk_that_others_fill(kib, start, resume, whole_of, tmp_path):
    """So that so much is left, once the run has begun."""
    disk = tmp_path / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        line = start("run", f"{kib} KiB left").refused()
        assert line.startswith("output: cannot write ") and "No space left on device" in line
        size("9m")(disk)
        ended = resume("run") if (disk / "config.yaml").exists() else start("run")
        assert ended.code == 0
        assert_same(disk, whole_of("full"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Signals and other processes


@pytest.mark.slow
def test_another_process_in_the_folder(start, resume, whole_of, tmp_path):
    assert start("run", "the norm of update 2").code < 0
    arguments = ["train", "--resume", str(tmp_path / "run")]
    first = CHILDREN.Process(target=life, args=(arguments, str(tmp_path / "1"), ["stopped"]))
    first.start()
    end = time.monotonic() + 60
    while "State:\tT" not in Path(f"/proc/{first.pid}/status").read_text():
        assert first.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    before = content(tmp_path / "run")
    line = resume("run").refused()
    assert line == f"output: another process works in {tmp_path}/run now"
    assert content(tmp_path / "run") == before
    first.kill()
    first.join()
    assert f"Process {first.pid} died here without a word, in update 1" in resume("run").err
    assert_same(tmp_path / "run", whole_of("full"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "replay"])
@pytest.mark.parametrize("point", ["Ctrl-C in update 2", "Ctrl-C twice in the second save"])
def test_ctrl_c_and_on(point, mode, start, resume, whole_of, tmp_path):
    ended = start("run", point, **MODES[mode])
    assert ended.code == 130 and ended.out == ""
    last = ended.err.splitlines()[-1]
    kept = f"; {tmp_path}/run/checkpoints/step-00002 holds the last update"
    assert last == "em-kernels train: interrupted" + ("" if "twice" in point else kept)
    assert resume("run").code == 0
    assert_same(tmp_path / "run", whole_of(mode))
