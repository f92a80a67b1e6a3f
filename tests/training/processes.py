"""Commands of launchers, and runs of two real processes (gloo) beside the same runs of one. Run by
torchrun, this file is those processes.
"""

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from other_sums import FAR, other_sums  # noqa: E402
from spawned import HANG_S  # noqa: E402
from training.tiny import (  # noqa: E402
    PLAIN,
    make_model,
    make_tokenizer,
    read,
    run,
    settings,
)
from training.tiny import rounded as saved  # noqa: E402

from em_kernels.training.distributed import find_ranks  # noqa: E402
from em_kernels.training.engines import engine_of  # noqa: E402
from em_kernels.training.interrupts import Interrupted, StopRequest  # noqa: E402
from em_kernels.training.models.rounding import dithered  # noqa: E402
from em_kernels.training.rollouts.sampling import Rollout  # noqa: E402
from em_kernels.training.settings import UserError  # noqa: E402
from em_kernels.training.trainer import train  # noqa: E402

EXAMPLES = TESTS.parent / "examples"
ENDS = PLAIN.model_copy(update={"stop": ("a", "b", "c", "d", "e", "1")})  # of any length
BASE = {"steps": 3, "rollouts": 9, "micro_batch": 40, "sampling": ENDS, "save_optimizer": True}
APART = {**BASE, "share_prefix": False}
BF16 = {**APART, "dtype": "bfloat16", "lr": 1e-5}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
RUNS = {  # by engine and name: whether the model's weights are tied, settings
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


def launched(launcher, *command, where, timeout=HANG_S, **env):
    """Run a launcher's command to its end, two processes of one thread each."""
    command = [f"{Path(sys.executable).parent}/{launcher[0]}", *launcher[1:], *map(str, command)]
    env = {**environment(hidden="cuda" not in command), **env}
    with subprocess.Popen(
        command,
        cwd=where,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
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
    gpus = {"CUDA_VISIBLE_DEVICES": ""} if hidden else {}  # FSDP and DeepSpeed would use them
    return {**os.environ, **gpus, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def torchrun():
    return ("torchrun", "--nproc-per-node", "2", "--standalone")


def run_all(engine, folders, home, timeout=3 * HANG_S, **env):
    """Run each of an engine's runs in a folder of its name, and in alone/ by one process. One is
    also stopped after two updates and resumed.

    The first samples for itself. The others replay what one process has sampled: products that are
    rounded differently, above all in bf16, would give them other tokens.
    """
    (first, (tied, asked)), *others = RUNS[engine].items()
    stopped = [("again", (tied, {**asked, "steps": 2})), ("again", (tied, asked))]
    for name, (tied, asked) in RUNS[engine].items():
        alone(folders, home / "alone" / name, tied, asked)
    plan = [(first, RUNS[engine][first])]
    plan += [(n, (tied, replayed(asked, home / "alone" / n))) for n, (tied, asked) in others]
    plan = [[n, str(folders[tied]), to_json(s)] for n, (tied, s) in [*plan, *stopped]]
    (home / "plan.json").write_text(json.dumps(plan))
    code, _, err = launched(torchrun(), __file__, "plan.json", where=home, timeout=timeout, **env)
    assert code == 0, err[-4000:]


def replayed(asked, run):
    return {**asked, "rollouts_from": str(run)}


def to_json(asked):
    return {**asked, "sampling": asked["sampling"].model_dump()}


def processes(plan):
    """Run each run in turn, under torchrun; resume one whose folder exists."""
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
    torch.distributed.destroy_process_group()  # its threads might outlive the interpreter


def engine_facts(config):
    """Return what each process observes of its engine."""
    ranks, stop = find_ranks(config.device, config.rollouts), StopRequest()
    engine = engine_of(ranks.launch.engine)(make_model(), make_tokenizer(), config, ranks)
    ended = [Rollout([5, 6], [2], True)] * 3  # the official loss leaves out padding
    loss, norm = engine.forward_backward(ended, 40, stop.check), engine.norm()
    parts = [name for name, m in engine.model.named_modules() if isinstance(m, FSDPModule)]
    stop.requested = ranks.index == 1  # on one rank alone
    told = False
    try:
        ranks.together(stop.check)
    except Interrupted:
        told = True
    engine.close()
    facts = {"loss": [*loss, norm], "told": told, "parts": parts}
    if ranks.launch.engine == "replicas":
        facts["scales"] = scales_after_an_overflow(config, ranks)
    return {**facts, "refusal": refusal(lambda: find_ranks(config.device, rollouts=1))}


def scales_after_an_overflow(config, ranks):
    """Return an fp16 engine's scale before and after each gradient, until it is finite on all
    ranks. The last rank's alone overflows, above a scale of 16.
    """
    config = config.model_copy(update={"dtype": "float16", "official_loss": False})
    engine = engine_of("replicas")(make_model(dtype=torch.float16), make_tokenizer(), config, ranks)
    scales = [engine.optimizer.scale]

    def overflow(gradient):
        return gradient * torch.inf if scales[-1] > 16 else gradient

    if ranks.index == ranks.count - 1:
        engine.model.model.norm.weight.register_hook(overflow)
    rollouts = [Rollout([5, 6], [7, 8, 9], False)] * 3
    engine.forward_backward(rollouts, 40, lambda: None)
    while not math.isfinite(norm := engine.norm()):
        assert engine.halve_scale()
        scales.append(engine.optimizer.scale)
        engine.forward_backward(rollouts, 40, lambda: None)
    engine.close()
    return [*scales, norm]


def refusal(work):
    """Return what ends this process; ranks other than the first say nothing, after a while."""
    with mock.patch("time.sleep"):
        try:
            work()
        except (UserError, SystemExit) as error:
            return str(error)


def left(run):
    """Return a run's metrics, and masters, moments and saved weights after its last update."""
    metrics = read(run / "metrics.jsonl")
    last = run / "checkpoints" / f"step-{len(metrics):05d}"
    files = ["training_state.safetensors", *(p.name for p in last.glob("*model*.safetensors"))]
    return metrics, [load_file(last / name) for name in files]


def alone(folders, output, tied, asked, sums=None):
    """Train in this process; `sums` is a seed with which products are added up in another order."""
    if "offload_dir" in asked:
        asked = {**asked, "offload_dir": str(output.with_name(f"{output.name}-state"))}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with nullcontext() if sums is None else other_sums(sums):
            run(settings(folders[tied], output, **asked))
    finally:
        torch.set_num_threads(threads)
    return left(output)


def in_other_orders(engine, name, folders, home, tmp_path):
    """Repeat a run in one process: the same completions, in other micro-batches
    and with the terms of products added up otherwise.
    """
    tied, asked = RUNS[engine][name]
    asked, found = replayed(asked, home / "alone" / name), []
    for seed, micro_batch in ((1, 20), (2, 80)):
        if "micro_batch_rows" not in asked:  # the official loss depends on its micro-batches
            asked["micro_batch"] = micro_batch
        found.append(alone(folders, tmp_path / f"{name}-{seed}", tied, asked, seed))
    return found


class Distances(NamedTuple):
    """Distances of one run from another, each relative to the other's number."""

    entropy: float
    grad_norm: float
    master: float  # relative to how far the weights have moved
    exp_avg: float
    exp_avg_sq: float


METRICS, TENSORS = Distances._fields[:2], Distances._fields[2:]


def distances(found, expected, start):
    """Compare what `left` returns of two runs that began with the same weights."""
    shares = []
    for name in METRICS:
        pairs = zip(found[0], expected[0], strict=True)
        shares.append(max(abs(ours[name] / theirs[name] - 1) for ours, theirs in pairs))
    for kind in TENSORS:
        ours, theirs = (of_kind(kind, run[1][0]) for run in (found, expected))
        shares.append(norm(ours, theirs) / norm(theirs, start))
    return Distances(*shares)


def of_kind(kind, state):
    return {name: x for name, x in state.items() if name.startswith(f"{kind}.")}


def norm(of, start):
    """Return the L2 norm of the change from start; tensors that start lacks began as zero."""
    assert of
    return sum((x.double() - start.get(n, 0)).square().sum().item() for n, x in of.items()) ** 0.5


def assert_same_run(found, expected, others, tied, half=False):
    """Check that two runs made the same updates: no further apart than FAR times as far as runs of
    one process that add up in other orders, on this machine.

    Args:
        others: those runs.
        half: the found one is of an engine that rounds masters to the nearest bf16.
    """
    assert [r["update"] for r in found[0]] == [r["update"] for r in expected[0]]
    for ours, theirs in zip(found[0], expected[0], strict=True):
        for name in ("accuracy", "tokens", "ended", "repetition"):
            assert ours[name] == theirs[name]
    (state, weights), (expected_state, _) = found[1], expected[1]
    assert state.keys() == expected_state.keys()
    counts = of_kind("step", state)
    assert counts and all(expected_state[n] == x for n, x in counts.items())
    start = {f"master.{n}": p.detach() for n, p in make_model(tied=tied).named_parameters()}
    masters = of_kind("master", state)
    for name, x in weights.items():
        if (master := masters.get(f"master.{name}")) is not None:  # an adapter has another name
            assert torch.equal(x, master.bfloat16() if half else saved(master)), name
    if half:  # their masters start dithered
        start = {name: x.bfloat16().float() for name, x in start.items()}
        off = {name: dithered(x.flatten()).view(x.shape) - x for name, x in start.items()}
        state = {n: x - off[n] if n in off else x for n, x in state.items()}
    spread = [distances(other, expected, start) for other in others]
    ours = distances((found[0], [state, weights]), expected, start)._asdict()
    moved = norm(of_kind("master", expected_state), start)
    floors = dict.fromkeys(ours, 2**-22)  # the precision of fp32
    floors["master"] += len(found[0]) * 2**-24 * norm(masters, {}) / moved
    for name, value in ours.items():
        allowed = FAR * max(getattr(each, name) for each in spread) + floors[name]
        assert value <= allowed, f"{name}: {value:.2e} > {allowed:.2e}"


def flags(folder, output, *more):
    config = [
        *("--model", folder, "--prompt", "What is 2 + 3?", "--output", output, "--dtype"),
        *("float32", "--rollouts", "6", "--max-new-tokens", "12", "--lr", "1e-3", "--device"),
        *("cpu", "--steps", "2", "--answer", "5", "--no-chat-template"),
    ]
    return [str(word) for word in (*config, *more)]


def example_run(example, folder, where, **env):
    """Run an example's configuration with two processes."""
    options = ["--config_file", EXAMPLES / f"{example}.yaml", "--main_process_port", "0"]
    command = ("-m", "em_kernels.cli", "train", *flags(folder, "run"))
    return launched(
        *(("accelerate", "launch"), *options, "--num_processes", "2", *command), where=where, **env
    )


if __name__ == "__main__":
    processes(sys.argv[1])
