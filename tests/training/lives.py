"""Commands in processes of their own, and comparison of the folders that they leave."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from spawned import HANG_S
from training.faults import life
from training.tiny import PLAIN, read

CHILDREN = multiprocessing.get_context("forkserver")  # forks a process that has no threads
CHILDREN.set_forkserver_preload(
    ["em_kernels.cli", "em_kernels.training.trainer", "em_kernels.training.models.lora", "tyro"]
    + ["transformers.models.llama.modeling_llama", "training.tiny", "math_verify"]
)
TIMES = {"tokens_per_s", "sampling_s", "training_s", "peak_memory_gib", "planned_memory_gib"}
ENDS = PLAIN.model_copy(update={"stop": ("a", "b", "c", "d", "e", "1")})  # of any length
BASE = {"steps": 4, "save_at": (2,), "micro_batch": 20, "sampling": ENDS, "save_optimizer": True}
MODES = {
    "full": {},
    "replay": {"save_optimizer": False},
    "bf16": {"dtype": "bfloat16", "moments": "bf16", "gradients": "bf16", "grad_tolerance": 2**-9},
    "fp16": {"dtype": "float16"},
    "lora": {"mode": "lora"},
    "lora replay": {"mode": "lora", "save_optimizer": False, "gradient_checkpointing": True},
    "offload": {"mode": "offload", "moments": "bf16"},
    "offload_dir": {"mode": "offload", "offload_dir": "state", "dtype": "bfloat16"},
    "penalty": {"kl_weight": 2.0},
    "official": {"official_loss": True, "micro_batch_rows": 2, "save_optimizer": False},
}


def slow(*values, **named):
    return pytest.param(*values, marks=pytest.mark.slow, **named)


class Ended:
    def __init__(self, code, log):
        self.code = code
        names = ("stdout", "stderr")
        self.out, self.err = (Path(f"{log}.{n}").read_text(encoding="utf-8") for n in names)
        assert "Traceback" not in self.err, self.err

    def refused(self):
        """Check that the command was refused with one line, and return it."""
        assert self.code == 2 and self.out == "", (self.code, self.err)
        lines = [line for line in self.err.splitlines() if "em-kernels train: error: " in line]
        assert [self.err.splitlines()[-1]] == lines
        return lines[0].removeprefix("em-kernels train: error: ")


def begin(arguments, log, *changes, threads=1):
    """Start a command's process, which works in the folder of its log."""
    child = CHILDREN.Process(target=life, args=([*map(str, arguments)], str(log), changes, threads))
    child.start()
    return child


def end(child, log):
    child.join(HANG_S)
    if child.exitcode is None:
        child.kill()
        raise AssertionError(f"{log}: it hangs")
    return Ended(child.exitcode, log)


def command(arguments, log, *changes, threads=1):
    return end(begin(arguments, log, *changes, threads=threads), log)


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
    """Kill a run at each point in turn, and resume it to the end."""
    whole = whole_of(mode)
    ended = start("run", points[0], **MODES[mode])
    for point in [*points[1:], None]:
        assert ended.code in (-signal.SIGKILL, -signal.SIGXFSZ), (ended.code, ended.err)
        left = (point,) if point else ()
        if (tmp_path / "run" / "config.yaml").exists():
            ended = resume("run", points=left)
        else:
            ended = start("run", *left, **MODES[mode])
        assert "died here without a message" in ended.err
    assert ended.code == 0, ended.err
    assert ended.out == f"{tmp_path}/run/checkpoints/step-00004\n"
    assert_same(tmp_path / "run", whole)
