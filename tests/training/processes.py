"""Commands of launchers, and runs of two real processes (gloo) beside the same runs of one. Run by
torchrun, this file is those processes.
"""

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from training.tiny import PLAIN, make_model, make_tokenizer, read, run, settings  # noqa: E402

from em_kernels.training.engines import engine_of  # noqa: E402
from em_kernels.training.ranks import find_ranks  # noqa: E402
from em_kernels.training.rollout import Rollout  # noqa: E402
from em_kernels.training.rounding import dithered  # noqa: E402
from em_kernels.training.session import Interrupted, StopRequest  # noqa: E402
from em_kernels.training.trainer import train  # noqa: E402

EXAMPLES = TESTS.parent / "examples"
ENDS = PLAIN.model_copy(update={"stop": ("a", "b", "c", "d", "e", "1")})  # of all lengths
BASE = {"steps": 3, "rollouts": 9, "micro_batch": 40, "sampling": ENDS, "save_optimizer": True}
APART = {**BASE, "share_prefix": False}
BF16 = {**APART, "dtype": "bfloat16", "lr": 1e-5}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
RUNS = {  # of an engine, by name: folder's weights tied, settings
    "replicas": {
        "plain": (True, BASE),
        "bf16": (True, {**BASE, "moments": "bf16", "gradients": "bf16", "steps": 1}),
        "lora": (True, {**BASE, "mode": "lora", "lr": 1e-2}),
        "offload": (True, {**BASE, "mode": "offload", "offload_dir": "state"}),
        "official": (True, {**BASE, "official_loss": True, "micro_batch_rows": 3}),
        "few": (True, {**BASE, "rollouts": 2}),
    },
    "fsdp2": {
        "tied": (True, APART),
        "untied": (False, APART),
        "recomputed": (False, {**APART, "gradient_checkpointing": True}),
        "half": (True, BF16),
        "official": (True, {**APART, "official_loss": True, "micro_batch_rows": 3}),
    },
    "deepspeed": {"tied": (True, APART), "untied": (False, APART), "half": (True, BF16)},
}


def launched(launcher, *command, where, timeout=300, **env):
    """A finished command of a launcher, two processes of one thread each."""
    command = [f"{Path(sys.executable).parent}/{launcher[0]}", *launcher[1:], *map(str, command)]
    env = {**environment(hidden="cuda" not in command), **env}
    with subprocess.Popen(
        command,
        cwd=where,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        try:
            out, err = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)  # the launcher's processes too
            raise
    return job.returncode, out, err


def environment(hidden=True):
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    gpus = {"CUDA_VISIBLE_DEVICES": ""} if hidden else {}  # FSDP and DeepSpeed would take them
    return {**os.environ, **gpus, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def torchrun():
    return ("torchrun", "--nproc-per-node", "2", "--standalone")


def work(engine):
    """The runs, and one that is stopped after two updates and taken up."""
    runs = RUNS[engine]
    first = next(iter(runs))
    tied, asked = runs[first]
    return [*runs.items(), ("again", (tied, {**asked, "steps": 2})), ("again", (tied, asked))]


def run_all(engine, folders, home, timeout=300, **env):
    """Each of an engine's runs, in a folder of its name."""
    plan = [[name, str(folders[tied]), to_json(s)] for name, (tied, s) in work(engine)]
    (home / "plan.json").write_text(json.dumps(plan))
    code, _, err = launched(torchrun(), __file__, "plan.json", where=home, timeout=timeout, **env)
    assert code == 0, err[-4000:]


def to_json(asked):
    return {**asked, "sampling": asked["sampling"].model_dump()}


def processes(plan):
    """What torchrun runs: each of the runs, in turn; one whose folder is there is taken up."""
    torch.set_num_threads(1)
    for name, folder, asked in json.loads(Path(plan).read_text()):
        config = settings(folder, Path(name), **asked)
        console = Console(file=StringIO())
        result = train(config, console=console, resume=Path(name, "config.yaml").exists())
        rank = os.environ["RANK"]
        Path(f"{name}.{rank}.json").write_text(json.dumps(result.metrics))
        Path(f"{name}.{rank}.txt").write_text(console.file.getvalue())
    config = settings(folder, Path("none"), **{**APART, "official_loss": True})
    Path(f"engine.{rank}.json").write_text(json.dumps(engine_facts(config)))
    torch.distributed.destroy_process_group()  # or its threads may outlive the interpreter


def engine_facts(config):
    """What each process finds by itself."""
    ranks, stop = find_ranks(config), StopRequest()
    engine = engine_of(ranks.world.engine)(make_model(), make_tokenizer(), config, ranks)
    ended = [Rollout([5, 6], [0], True)] * 3  # whose only token the official loss leaves out
    loss, norm = engine.learn(ended, 40, stop.check), engine.norm()
    parts = [name for name, m in engine.model.named_modules() if isinstance(m, FSDPModule)]
    stop.requested = ranks.index == 1  # by one alone
    told = False
    try:
        ranks.together(stop.check)
    except Interrupted:
        told = True
    engine.close()
    return {"loss": [*loss, norm], "told": told, "parts": parts}


def left(run):
    """Metrics, and masters, moments and saved weights after the last update."""
    metrics = read(run / "metrics.jsonl")
    last = run / "checkpoints" / f"step-{len(metrics):05d}"
    files = ["training_state.safetensors", *(p.name for p in last.glob("*model*.safetensors"))]
    return metrics, [load_file(last / name) for name in files]


def alone(folders, output, tied, asked):
    """The same run in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(settings(folders[tied], output, **asked))
    finally:
        torch.set_num_threads(threads)
    return left(output)


def distance(found, expected, start=None):
    """Norm of the difference over that of the change since the start, of all tensors together."""
    assert found.keys() == expected.keys()
    square = sum((found[k].double() - expected[k].double()).square().sum() for k in found)
    since = sum(
        (expected[k].double() - (start[k].double() if start else 0)).square().sum() for k in found
    )
    return (square / since).sqrt().item()


def assert_same_run(found, expected, tied, tolerance, lora=False, half=False):
    """To the rounding of sums whose order differs."""
    assert [r["update"] for r in found[0]] == [r["update"] for r in expected[0]]
    for ours, theirs in zip(found[0], expected[0], strict=True):
        for name in ("accuracy", "tokens", "ended", "repetition"):
            assert ours[name] == theirs[name]
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance)
    (state, weights), (expected_state, expected_weights) = found[1], expected[1]
    start = {f"master.{n}": p.detach() for n, p in make_model(tied=tied).named_parameters()}
    if half:  # these masters lie off by what they were dithered
        start = {name: p.bfloat16().float() for name, p in start.items()}
        off = {n: dithered(p.flatten()).view(p.shape) - p for n, p in start.items()}
        state = {name: t - off[name] if name in off else t for name, t in state.items()}
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        parts = [
            {n: t for n, t in s.items() if n.startswith(f"{kind}.")}
            for s in (state, expected_state)
        ]
        assert parts[0]
        since = start if kind == "master" and not lora else None
        assert distance(*parts, since) <= 100 * tolerance
    steps = [n for n in state if n.startswith("step.")]
    assert steps and all(state[n] == expected_state[n] for n in steps)
    assert distance(weights, expected_weights) <= 2**-12  # a few elements round the other way


def flags(folder, output, *more):
    config = [
        *("--model", folder, "--prompt", "What is 2 + 3?", "--output", output, "--dtype"),
        *("float32", "--rollouts", "6", "--max-new-tokens", "12", "--lr", "1e-3", "--device"),
        *("cpu", "--steps", "2", "--answer", "5", "--no-chat-template"),
    ]
    return [str(word) for word in (*config, *more)]


def example_run(example, folder, where, **env):
    """Of a file in examples/, with two processes."""
    options = ["--config_file", EXAMPLES / f"{example}.yaml", "--main_process_port", "0"]
    command = ("-m", "em_kernels.cli", "train", *flags(folder, "run"))
    return launched(
        *(("accelerate", "launch"), *options, "--num_processes", "2", *command), where=where, **env
    )


if __name__ == "__main__":
    processes(sys.argv[1])
