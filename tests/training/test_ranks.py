"""Runs of two real processes (gloo) against the same runs of one; what signals and deaths do to
them. Run by torchrun, this file is those processes.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from training.tiny import (  # noqa: E402
    PLAIN,
    make_model,
    make_tokenizer,
    read,
    run,
    save_tiny,
    settings,
)

from em_kernels.training.config import TrainConfig, UserError  # noqa: E402
from em_kernels.training.engines import engine_of  # noqa: E402
from em_kernels.training.ranks import find_ranks  # noqa: E402
from em_kernels.training.records import Running  # noqa: E402
from em_kernels.training.rollout import Rollout  # noqa: E402
from em_kernels.training.rounding import dithered  # noqa: E402
from em_kernels.training.session import Interrupted, StopRequest  # noqa: E402
from em_kernels.training.step import part_of, scored  # noqa: E402
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    found = {tied: save_tiny(home / str(tied), tied=tied) for tied in (True, False)}
    return {**found, "falcon": save_tiny(home / "falcon", "falcon")}


@pytest.fixture(scope="module")
def by_engine(tmp_path_factory, folders):
    """A function: the folder in which an engine's runs lie, and its words to each process."""
    found = {}

    def runs(engine, **env):
        if engine not in found:
            home = tmp_path_factory.mktemp(engine)
            plan = [[name, str(folders[tied]), to_json(s)] for name, (tied, s) in work(engine)]
            (home / "plan.json").write_text(json.dumps(plan))
            code, out, err = launched(torchrun(), __file__, "plan.json", where=home, **env)
            assert code == 0, err[-4000:]
            found[engine] = home
        return found[engine]

    return runs


def work(engine):
    """The runs, and one that is stopped after two updates and taken up."""
    runs = RUNS[engine]
    first = next(iter(runs))
    tied, asked = runs[first]
    return [*runs.items(), ("again", (tied, {**asked, "steps": 2})), ("again", (tied, asked))]


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
        ranks.agree(stop.check)
    except Interrupted:
        told = True
    engine.close()
    return {"loss": [*loss, norm], "told": told, "parts": parts}


@pytest.mark.parametrize(("engine", "env"), [("replicas", {}), ("fsdp2", FSDP2)])
def test_engines(by_engine, engine, env):
    home = by_engine(engine, **env)
    for rank in (0, 1):
        facts = json.loads((home / f"engine.{rank}.json").read_text())
        assert facts["loss"] == [0, 0, 0, 0] and facts["told"]
        layers = [f"model.layers.{i}" for i in range(2)] if engine == "fsdp2" else []
        assert [name for name in facts["parts"] if "layers" in name] == layers


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


@pytest.mark.parametrize("name", RUNS["replicas"])
def test_replicas_equal_one_process(by_engine, folders, tmp_path, name):
    tied, asked = RUNS["replicas"][name]
    expected = alone(folders, tmp_path / "one", tied, {**asked, **offloaded(asked, tmp_path)})
    # each rank rounds its own sum to bf16, and the ranks' once more
    tolerance = 5e-4 if name == "bf16" else 1e-6
    found = left(by_engine("replicas") / name)
    assert_same_run(found, expected, tied, tolerance, lora=name == "lora")


def offloaded(asked, tmp_path):
    return {"offload_dir": str(tmp_path / "state")} if "offload_dir" in asked else {}


@pytest.mark.parametrize("name", RUNS["fsdp2"])
def test_fsdp2_equals_one_process(by_engine, folders, tmp_path, name):
    tied, asked = RUNS["fsdp2"][name]
    expected, half = alone(folders, tmp_path / "one", tied, asked), name == "half"
    found = left(by_engine("fsdp2", **FSDP2) / name)
    assert_same_run(found, expected, tied, 1e-4 if half else 1e-6, half=half)


@pytest.mark.parametrize(("engine", "env"), [("replicas", {}), ("fsdp2", FSDP2)])
def test_stopped_runs_go_on_to_the_same_bits(by_engine, engine, env):
    home = by_engine(engine, **env)
    (metrics, tensors), (again, found) = left(home / next(iter(RUNS[engine]))), left(home / "again")
    for name in ("entropy", "grad_norm", "tokens"):
        assert [row[name] for row in metrics] == [row[name] for row in again]
    for whole, taken_up in zip(tensors, found, strict=True):
        assert all(torch.equal(whole[name], taken_up[name]) for name in whole)
    assert "Going on after update 2; 0 more" in (home / "again.0.txt").read_text()


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


def test_another_number_of_processes_replays(by_engine, folders, tmp_path):
    """The state is of two; one process trains again on the completions, to rounding."""
    import shutil

    shutil.copytree(by_engine("replicas") / "again", tmp_path / "again")
    config = settings(folders[True], tmp_path / "again", **{**BASE, "steps": 4})
    console = Console(file=StringIO(), width=300)
    train(config, console=console, resume=True)
    said = console.file.getvalue()
    assert "cannot be resumed from: it was made with ranks 2, not null" in said
    assert "Going on after update 0; 3 more are trained anew" in said
    expected = alone(folders, tmp_path / "one", True, {**BASE, "steps": 4})
    assert_same_run(left(tmp_path / "again"), expected, True, 1e-6)


# Command line, signals, deaths


def flags(folder, output, *more):
    config = [
        *("--model", folder, "--prompt", "What is 2 + 3?", "--output", output, "--dtype"),
        *("float32", "--rollouts", "6", "--max-new-tokens", "12", "--lr", "1e-3", "--device"),
        *("cpu", "--steps", "2", "--answer", "5", "--no-chat-template"),
    ]
    return [str(word) for word in (*config, *more)]


@pytest.mark.parametrize(
    ("example", "engine", "model"),
    [("2-gpus", "replicas", True), ("8-gpus-fsdp2", "fsdp2", "falcon")],  # whose layers are its h
)
def test_examples(folders, tmp_path, example, engine, model):
    code, out, err = example_run(example, folders[model], tmp_path)
    assert code == 0, err
    assert out.splitlines()[-1] == "run/checkpoints/step-00002"
    assert out.count("step-00002") == 1 and err.count("update  2/2") == 1
    state = json.loads((tmp_path / "run/checkpoints/step-00002/training_state.json").read_text())
    assert (state["settings"]["ranks"], state["settings"]["engine"]) == (2, engine)
    assert [row["index"] for row in read(tmp_path / "run/rollouts.jsonl")] == [*range(6)] * 2


@pytest.mark.parametrize(
    ("more", "env", "line"),
    [
        (["--steps", "0"], {}, "greater than or equal to 1"),
        (["--rollouts", "1"], {}, "rollouts: 1 are fewer than the 2 processes"),
        (["--mode", "lora"], FSDP2, "mode: lora does not go with fsdp2, which has full"),
        ([], {**FSDP2, "FSDP_VERSION": "1"}, "fsdp: version 1 is not supported"),
    ],
)
def test_what_cannot_work_is_one_line(folders, tmp_path, more, env, line):
    command = ("-m", "em_kernels.cli", "train", *flags(folders[True], "run", *more))
    code, out, err = launched(torchrun(), *command, where=tmp_path, **env)
    assert code != 0 and not (tmp_path / "run").exists()
    ours = [words for words in err.splitlines() if words.startswith("em-kernels train: error")]
    assert [line in words for words in ours] == [True], err
    assert "rank      : " in err  # the launcher's own table


def test_a_mesh_of_many_dimensions_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(UserError, match="parallelism_config: is not supported"):
        find_ranks(TrainConfig(device="cpu"))


def test_a_folder_in_use_is_one_line(folders, tmp_path):
    command = ("-m", "em_kernels.cli", "train", *flags(folders[True], "run"))
    with Running(tmp_path / "run"):
        code, out, err = launched(torchrun(), *command, where=tmp_path)
    ours = [words for words in err.splitlines() if words.startswith("em-kernels train:")]
    assert code != 0 and len(ours) == 1 and "another process works in run now" in ours[0], err


@pytest.fixture(params=[("replicas", {}), ("fsdp2", FSDP2)], ids=["replicas", "fsdp2"])
def running(request, folders, tmp_path):
    """A job of many updates that has finished some, its launcher and the process of rank 1."""
    command = [f"{Path(sys.executable).parent}/torchrun", *torchrun()[1:], "-m", "em_kernels.cli"]
    command += ["train", *flags(folders[True], "run", "--steps", "100000", "--save-at", "100000")]
    env = {**environment(), **request.param[1]}
    with open(tmp_path / "said", "w+") as said:
        job = subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=said, stderr=said, start_new_session=True
        )
        deadline = time.monotonic() + 120
        metrics = tmp_path / "run/metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert job.poll() is None and time.monotonic() < deadline, said.read()
            time.sleep(0.2)
        yield job, tmp_path
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def rank_of(job, rank):
    """Its process."""
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = status.read_bytes().split(b"\0")
            parent = int(re.search(r"PPid:\t(\d+)", (status.parent / "status").read_text())[1])
        except OSError:
            continue
        if f"RANK={rank}".encode() in words and parent == job.pid:
            return int(status.parent.name)
    raise AssertionError("there is no such process")


def test_a_rank_that_dies_ends_the_job_with_its_name(running):
    job, home = running
    pid, began = rank_of(job, 1), time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    assert time.monotonic() - began < 60
    said = (home / "said").read_text()
    root = said[said.index("Root Cause") :]
    assert "rank      : 1 " in root and f"-9 (pid: {pid})" in root
    # what was recorded is whole
    config = TrainConfig(output=home / "run")
    rows = read(config.output / "metrics.jsonl")
    assert [row["update"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 3


@pytest.mark.parametrize("everyone", [True, False], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_leaves_the_last_finished_update(running, everyone):
    job, home = running
    if everyone:  # as a terminal does: each process, and the launcher passes it on once more
        os.killpg(job.pid, signal.SIGINT)
    else:
        os.kill(job.pid, signal.SIGTERM)
    assert job.wait(timeout=60) != 0
    done = len(read(home / "run/metrics.jsonl"))
    said = (home / "said").read_text()
    last = f"run/checkpoints/step-{done:05d}"
    assert said.count(f"em-kernels train: interrupted; {last} holds the last update") == 1
    assert (home / last / "config.json").exists() and "Error: interrupted" not in said


def example_run(example, folder, where, **env):
    """Of a file in examples/, with two processes."""
    options = ["--config_file", EXAMPLES / f"{example}.yaml", "--main_process_port", "0"]
    command = ("-m", "em_kernels.cli", "train", *flags(folder, "run"))
    return launched(
        *(("accelerate", "launch"), *options, "--num_processes", "2", *command), where=where, **env
    )


# The division


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_token_counts_once(count, official):
    rollouts = [Rollout([1, 2, 3], list(range(1, 2 + i % 7)), bool(i % 2)) for i in range(13)]
    asked = {**APART, "official_loss": official, "micro_batch_rows": 2 if official else None}
    config = settings("none", Path("none"), **asked)
    parts = [part_of(rollouts, config, 20, index, count) for index in range(count)]
    batches = [[b for _, group in part.work for b in group] for part in parts]
    given = [id(rollout) for own in batches for batch in own for rollout in batch]
    assert sorted(given) == sorted(map(id, rollouts))
    assert {part.rounds for part in parts} == {max(map(len, batches))}
    weights = [
        tokens / parts[0].divisor(tokens, official)
        for own in batches
        for batch in own
        if (tokens := sum(len(scored(r, official)) for r in batch))
    ]
    assert sum(weights) == pytest.approx(1)
    sizes = [sum(map(len, (r for b in own for r in b))) for own in batches]
    assert max(sizes) <= min(sizes) + 10 or official  # by length, in turns


# DeepSpeed


ZERO = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 10**6}}
OFFLOAD = {
    "zero_optimization": {**ZERO["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
}


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    """Environment of a launcher that runs it on CPUs; what it compiles lies apart."""
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation")
    home = tmp_path_factory.mktemp("deepspeed")

    def environment(config):
        path = home / f"{len(json.dumps(config))}.json"
        path.write_text(json.dumps(config))
        return {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
            "TORCH_EXTENSIONS_DIR": str(home / "extensions"),
        }

    return environment


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_deepspeed_equals_one_process(deepspeed, folders, tmp_path, offload):
    plan = [[name, str(folders[tied]), to_json(s)] for name, (tied, s) in work("deepspeed")]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    env = deepspeed(OFFLOAD if offload else ZERO)
    code, _, err = launched(torchrun(), __file__, "plan.json", where=tmp_path, timeout=600, **env)
    assert code == 0, err[-4000:]
    for name, (tied, asked) in RUNS["deepspeed"].items():
        expected = alone(folders, tmp_path / f"one-{name}", tied, asked)
        half = name == "half"
        assert_same_run(left(tmp_path / name), expected, tied, 1e-3 if half else 2e-6, half=half)
    assert_same_run(left(tmp_path / "again"), left(tmp_path / "tied"), True, 1e-6)


@pytest.mark.slow
def test_deepspeed_example(deepspeed, folders, tmp_path):
    extensions = deepspeed(ZERO)["TORCH_EXTENSIONS_DIR"]
    code, out, err = example_run(
        "8-gpus-zero2-offload", folders[True], tmp_path, TORCH_EXTENSIONS_DIR=extensions
    )
    assert code == 0, err
    assert out.splitlines()[-1] == "run/checkpoints/step-00002"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage 3 is not supported"),
        ({"zero_optimization": {"stage": 1}}, "stage 1 is not supported: each process would hold"),
        ({**ZERO, "optimizer": {"type": "AdamW"}}, "leave optimizer out of its configuration"),
    ],
)
def test_deepspeed_refusals(deepspeed, folders, tmp_path, config, line):
    command = ("-m", "em_kernels.cli", "train", *flags(folders[True], "run"))
    code, _, err = launched(torchrun(), *command, where=tmp_path, **deepspeed(config))
    assert code != 0 and line in err and not (tmp_path / "run").exists()


if __name__ == "__main__":
    processes(sys.argv[1])
