"""Faults at named points of a training process: kills, torn writes, no memory, no disk."""

import os
import resource
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import torch


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def on(owner, name, nth, first=die, then=None):
    """Make the nth call of a function run first(), then itself, then then()."""
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
    """Die halfway through a write, the nth time that a module opens this file to write."""
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
    """Limit a file's size: the write beyond fails, or the kernel kills the process in it."""
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full(name):
    """Leave no room for 10 more bytes of this file, nor for any larger file."""
    path = Path(f"run/{name}")
    os.ftruncate(2, 0)  # stderr is a file, too
    limit((path.stat().st_size if path.exists() else 0) + 10, signal.SIG_IGN)


def no_memory(module, name, tokens_of, tokens, nth=1):
    """Make a function run out of memory from the nth call on, for more than so many tokens."""
    real, calls = getattr(module, name), count(1)

    def call(*args, **kwargs):
        if next(calls) >= nth and tokens_of(*args, **kwargs) > tokens:
            raise torch.OutOfMemoryError
        return real(*args, **kwargs)

    setattr(module, name, call)


def no_memory_for_a_gradient():
    """Run out of memory once, while a gradient is added; it stays in parameter.grad."""
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


def twice():
    interrupt()
    interrupt()


def hold():
    """Tell the test that this point is reached, and wait for a signal."""
    Path("held").touch()
    while True:
        signal.pause()


def unread(number):
    """Make a standard stream a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)
    anew = open(number, "w", closefd=False)  # noqa: SIM115
    setattr(sys, ("stdin", "stdout", "stderr")[number], anew)  # the old object expects a file


def on_file(name, nth, method, first=die, then=None):
    """Make the nth call of a method of a Path with this name run first() and then()."""
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
    """Return a class or module of the trainer."""
    from em_kernels.training import run
    from em_kernels.training.engines import optimizer, step
    from em_kernels.training.evaluation import completions
    from em_kernels.training.rollouts import sampling as rollout
    from em_kernels.training.runs import checkpoint, records

    parts = {"checkpoint": checkpoint, "completions": completions, "records": records}
    parts |= {"rollout": rollout, "step": step}
    parts |= {"run": run, "optimizer": optimizer, "AdamW": optimizer.MasterAdamW}
    parts |= {
        "Running": records.Running,
        "SharedPrefix": step.SharedPrefix,
    }
    return parts[name]


# Runs have 4 updates of 6 completions, and two saves (after 2 and 4); uses of a file count from 1.
INSIDE = {  # in the middle of a write, or of something that must happen as a whole
    "half of the settings": lambda: half_text(".config.yaml.partial", 1),
    "half of the first completions": lambda: torn(the("records"), "rollouts.jsonl", 1),
    "half of the third completions": lambda: torn(the("records"), "rollouts.jsonl", 3),
    "half of the first metrics": lambda: torn(the("records"), "metrics.jsonl", 1),
    "half of the fourth metrics": lambda: torn(the("records"), "metrics.jsonl", 4),
    "completions not synced": lambda: on(the("records"), "sync", 6),
    "half of the second model": lambda: on(the("run"), "save_checkpoint", 2, half_model),
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
    "settings": lambda: after(the("records"), "write_config", 1),
    "token 5 of update 1": lambda: on(the("rollout"), "next_tokens", 5),
    "token 30": lambda: on(the("rollout"), "next_tokens", 30),
    "completions of update 3": lambda: after(the("records"), "append", 5),
    "the second micro-batch of update 1": lambda: on(the("step"), "scored_states", 2),
    "the last micro-batch of update 4": lambda: on(the("SharedPrefix"), "backward", 5),
    "the norm of update 2": lambda: on(the("AdamW"), "norm", 2),
    "the step of update 2": lambda: on(the("AdamW"), "step", 2),
    "the step of update 3, done": lambda: after(the("AdamW"), "step", 3),
    "the metrics of update 2": lambda: after(the("records"), "append", 4),
    "the first save": lambda: after(the("run"), "save_checkpoint", 1),
    "the end": lambda: on(the("Running"), "__exit__", 1),
}
ROOM = (4, 8, 16, 60, 300, 340, 380, 420, 700)  # KiB
OTHERS = {
    "memory for 40 tokens from update 2 on": lambda: no_memory(
        the("step"), "scored_states", lambda model, batch, *rest: 12 * len(batch), 40, 2
    ),
    "memory for 2 completions": lambda: no_memory(
        the("rollout"), "_generate_batch", lambda *given: len(given[-2]), 2
    ),
    "no memory for a gradient": no_memory_for_a_gradient,
    "memory for 30 tokens": lambda: no_memory(
        the("step"), "scored_states", lambda model, batch, *rest: 12 * len(batch), 30
    ),
    "no memory for the optimizer": lambda: on(the("AdamW"), "__init__", 1, exhaust),
    "no memory in the step": lambda: on(the("AdamW"), "_copy_back", 2 * SLABS, exhaust),
    "full at completions of update 3": lambda: on(
        the("records"), "append", 5, lambda: full("rollouts.jsonl")
    ),
    "full at metrics of update 3": lambda: on(
        the("records"), "append", 6, lambda: full("metrics.jsonl")
    ),
    "room for a checkpoint": lambda: on(
        the("run"), "save_checkpoint", 2, lambda: limit(resource.RLIM_INFINITY)
    ),
    "full at the second checkpoint": lambda: on(
        the("run"), "save_checkpoint", 2, lambda: full("config.yaml")
    ),
    **{
        f"{kib} KiB left": lambda kib=kib: on(the("Running"), "__enter__", 1, size(f"{kib}k"))
        for kib in ROOM
    },
    "stopped": lambda: on(the("AdamW"), "norm", 1, stop),
    "Ctrl-C in update 2": lambda: on(
        the("SharedPrefix"), "backward", 3, interrupt
    ),  # planning has called it once
    "Ctrl-C twice in update 2": lambda: on(the("SharedPrefix"), "backward", 3, twice),
    "Ctrl-C twice in the second save": lambda: on_file(".step-00004.partial", 1, "rename", twice),
    "Ctrl-C in the first save": lambda: on(the("run"), "save_checkpoint", 1, interrupt),
    "Ctrl-C at token 5": lambda: on(the("rollout"), "next_tokens", 5, interrupt),
    # In evaluations and studies:
    "5 completions": lambda: after(the("completions"), "append", 5),
    "held after 5 completions": lambda: on(the("completions"), "append", 5, None, hold),
    "update 1 of the second run of two": lambda: after(the("records"), "append", 6),
    # In what is printed:
    "nobody reads stdout": lambda: unread(1),
    "nobody reads stderr": lambda: unread(2),
}
POINTS = {**INSIDE, **BETWEEN, **OTHERS}
SLAB = 1 << 12  # elements
SLABS = 6  # in an update of the model


def half_model():
    limit(4000)  # less than the weights, more than the files that are written before them


def main_of(arguments):
    from em_kernels.cli import main

    return main(arguments)


def life(arguments, log, changes, threads=1):
    """Run one command in a child process, with faults."""
    os.chdir(Path(log).parent)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_APPEND), number)
    from spawned import use_tolerances

    from em_kernels.training.engines import optimizer

    use_tolerances()
    torch.set_num_threads(threads)
    optimizer.SLAB = SLAB
    for change in changes:
        POINTS[change]()
    sys.exit(main_of(arguments))
