"""`python -m benchmarks`: measures every provider on every case, each in a process of its own."""

import argparse
import difflib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import inputs, report, store, tables
from benchmarks.measure import GEMMS, TASKS, Case
from benchmarks.providers import ON_REQUEST, PROVIDERS
from benchmarks.store import BenchError
from em_kernels.ops.memory import free_bytes


class Head(NamedTuple):
    """Sizes and softcap of an LM head."""

    hidden_size: int
    vocab_size: int
    softcap: float | None = None


SHAPES = {
    "smollm2-135m": Head(576, 49152),
    "qwen2.5-0.5b": Head(896, 151936),
    "qwen2.5-1.5b": Head(1536, 151936),
    "qwen2.5-7b": Head(3584, 152064),
    "qwen3-8b": Head(4096, 151936),
    "llama3-8b": Head(4096, 128256),
    "gemma2-2b": Head(2304, 256000, 30.0),
}
DTYPES = ("float32", "bfloat16")
TOKENS = {"cpu": 512, "cuda": 8192}
INPUTS = {  # by kind and temperature
    "lm-0.5": "as peaked as SmolLM2's at temperature 0.5 (--calibration)",
    "lm-1": "the same at temperature 1",
    "uniform-1": "near-uniform: the worst case for grad_tolerance",
}
for kind, model in inputs.REAL.items():
    INPUTS[f"{kind}-0.5"] = f"{model.texts}, sampled at 0.5; only with its own shape"
    INPUTS[f"{kind}-1"] = "the same at temperature 1"
SCALING_PROVIDERS = ("ours-sparse", "ours", "ours-64mib", "trl", "stable-eager")
SCALING_WIDTH = {"cpu": 128, "cuda": 2048}
SCALING_TOKENS = (256, 1024, 4096, 16384, 32768)
SCALING_VOCABS = (32768, 65536, 131072, 262144)
SPARE_BYTES = 2**30  # for libraries and a chunk


def listed(texts: dict[str, str]) -> str:
    return "\n".join(f"  {name:<21}{text}" for name, text in texts.items())


DESCRIPTION = f"""Measure time, peak memory, GEMM work and error of losses over an LM head.

Each case runs in a process of its own, and on a CPU again in a second one. By
default these are measured, in bfloat16, for the loss with all gradients:
  CPU  {" and ".join(f"{shape} with {kind}" for shape, kind in report.FEATURED["cpu"])}
  GPU  {", ".join(shape for shape, _ in report.FEATURED["cuda"])}, with lm-0.5
with every provider but ours-64mib and, on a CPU, linear-cross-entropy (80 s a
call). Results are added to benchmarks/results/<device>.json after each case;
Ctrl-C keeps them.

  time    median, and its ratio (quartiles) to the floor: the bare matrix
          products, timed in turns with it. Compare ratios: a machine's speed varies
  fresh   the ratio in a fresh process, as your program is: nothing is set there,
          so each call pays for the pages of its new outputs. The first process
          keeps freed memory, as a GPU's allocator does. Only on a CPU
  peak    memory above the inputs: of the device's allocator, or resident on a CPU
  work    GEMM work / (tokens x hidden x vocabulary); a product costs 2
  error   relative, against fp64 on a sample: the worst of loss and gradients

tasks:
{listed(TASKS)}
inputs:
{listed(INPUTS)}
providers:
{listed({name: provider.title for name, provider in PROVIDERS.items()})}"""
EXAMPLES = """examples:
  python -m benchmarks --shape gemma2-2b llama3-8b --provider ours ours-sparse compile
  python -m benchmarks --shape 2048x32000 --tokens 1024 --input lm-1 uniform-1
  python -m benchmarks --shape all --task all --dtype all --input all --provider all
  python -m benchmarks --scaling && python -m benchmarks --report
  python -m benchmarks --compile-report --arch 90    registers and occupancy, without a GPU
"""


def chosen(kind: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the names of a flag, checked, with "all" expanded; `kind` is the flag."""
    known = list(known)
    if "all" in names:
        return known
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0) or known
            raise BenchError(
                f"--{kind}: {name!r} is unknown; did you mean {near[0]!r}? "
                f"Known: {', '.join(known)}, all"
            )
    return list(dict.fromkeys(names))


def head_of(name: str) -> Head:
    """Return the head of a named shape, or of one such as 2048x32000 (hidden x vocabulary)."""
    left, _, right = name.partition("x")
    if left.isdecimal() and right.isdecimal() and int(left) > 0 and int(right) > 1:
        return Head(int(left), int(right))
    chosen("shape", [name], SHAPES)
    return SHAPES[name]


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases that the flags ask for."""
    device = options.device
    providers = [name for name in PROVIDERS if name not in ON_REQUEST[device]]
    if options.scaling:
        providers = list(SCALING_PROVIDERS)
    if options.provider:
        providers = chosen("provider", options.provider, PROVIDERS)
    dtypes = chosen("dtype", options.dtype, DTYPES)
    tasks = chosen("task", options.task, TASKS)
    problems = list(scaling_problems(options) if options.scaling else problems_of(options))
    for problem, dtype, task, provider in product(problems, dtypes, tasks, providers):
        yield Case(provider=provider, dtype=dtype, task=task, device=device, **problem)


def problems_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield shape, sizes and input of the problems that the flags ask for."""
    asked = [x for name in options.input for x in by_temperature(name)]
    kinds = chosen("input", asked, INPUTS) if asked else ["lm-0.5"]
    featured = report.FEATURED[options.device]
    shapes = list(SHAPES) if "all" in options.shape else options.shape
    wanted: Iterable[tuple[str, str]] = product(shapes, kinds)
    if not shapes and asked:
        wanted = [(shape_of(kind) or featured[0][0], kind) for kind in kinds]
    elif not shapes:
        wanted = featured
    for shape, kind in wanted:
        if shape_of(kind) in (None, shape):
            tokens = options.tokens or TOKENS[options.device]
            yield {"shape": shape, "tokens": tokens, "input": kind, **head_of(shape)._asdict()}
        elif "all" not in options.input:
            raise BenchError(f"--input: {kind} exists for --shape {shape_of(kind)} only")


def by_temperature(name: str) -> list[str]:
    """Return the inputs that a kind without its temperature stands for, else the name itself."""
    return [known for known in INPUTS if known.rsplit("-", 1)[0] == name] or [name]


def shape_of(kind: str) -> str | None:
    """Return the one shape that a model's own input has; None if it can have any."""
    model = inputs.REAL.get(kind.rsplit("-", 1)[0])
    return None if model is None else model.shape


def scaling_problems(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield shape, sizes and input of --scaling: more tokens, then larger vocabularies."""
    if options.shape or options.input or options.tokens:
        raise BenchError("--scaling: has its own shapes, tokens and input; leave those flags out")
    sizes = [(tokens, SCALING_VOCABS[0]) for tokens in SCALING_TOKENS]
    sizes += [(SCALING_TOKENS[1], vocab) for vocab in SCALING_VOCABS[1:]]
    for tokens, vocab in sizes:
        head = Head(SCALING_WIDTH[options.device], vocab)
        yield {"shape": "scaling", "tokens": tokens, "input": "lm-0.5", **head._asdict()}


def needed_bytes(case: Case) -> int:
    """Estimate memory: inputs, gradients in their dtype and in fp32, logits if it holds them."""
    provider, item = PROVIDERS[case.provider], getattr(torch, case.dtype).itemsize
    elements = (case.tokens + case.vocab_size) * case.hidden_size
    trained = elements if case.task in ("loss", "stats") else case.tokens * case.hidden_size
    gradients = trained * (item + 4) if GEMMS[case.task] > 1 else 0
    logits = case.tokens * case.vocab_size * max(provider.bytes_per_logit, item)
    return elements * item + gradients + logits + SPARE_BYTES


def reason_not_to(case: Case) -> str | None:
    """Say why this provider cannot run this case here, as far as is known without trying."""
    provider = PROVIDERS[case.provider]
    if case.provider == "ours-sparse" and case.task in ("stats", "forward"):
        return "grad_tolerance is for the gradients of a loss"
    if case.task == "stats" and provider.statistics is None and case.provider != "floor":
        return "gives no entropy and logprob per token"
    if case.softcap is not None and not provider.softcap:
        return "has no softcap"
    if provider.cuda_only and case.device != "cuda":
        return "needs a CUDA GPU"
    return lack(provider.package, needed_bytes(case), case.device)


def lack(package: str, needed: int, device: str) -> str | None:
    """Say which package or how much memory is missing here."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    free = free_bytes(torch.device(device))
    if needed > free:
        return f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
    return None


def run_process(kind: str, case: Any, truth: Path) -> dict:
    """Run the case's module in a child; return what it prints, {"skipped": why} if it fails."""
    child = subprocess.Popen(
        [sys.executable, "-m", type(case).__module__, kind, str(truth)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.getcwd()])},
    )
    try:
        out, errors = child.communicate(json.dumps(case._asdict()))
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode == -9:
        return {"skipped": "out of memory (killed)"}
    if child.returncode:
        lines = [line for line in errors.splitlines() if line.strip()]
        return {"skipped": f"failed: {lines[-1] if lines else child.returncode}"}
    return json.loads(out.splitlines()[-1])


def line_of(case: Any, row: dict) -> str:
    name = f"  {case.provider:<22}"
    if "skipped" in row:
        return f"{name}skipped: {row['skipped']}"
    error = f"error {tables.worst_error(row):.1e}" if "error" in row else ""
    if "wrong" in row:
        return f"{name}WRONG: {error} ({row['wrong']})"
    low, high = row["ratio_quartiles"]
    peak = f"{row['peak_mib']:.0f} MiB" if "peak_mib" in row else "-"
    work = "-" if row["gemm_units"] is None else f"{row['gemm_units']:.2f}"
    fresh = ""
    if "fresh_ratio" in row:
        fresh = ", fresh {:.2f} ({:.2f}-{:.2f})".format(
            row["fresh_ratio"], *row["fresh_ratio_quartiles"]
        )
    elif "fresh_skipped" in row:
        fresh = f", fresh skipped: {row['fresh_skipped']}"
    return (
        f"{name}{row['time_ms']:9.1f} ms {row['ratio']:6.2f} of the floor ({low:.2f}-{high:.2f})"
        f"{fresh}{peak:>12}  work {work}  {error}"
    )


def measured_row(case: Any, truth: Path) -> dict:
    """Measure a case; on a CPU also in a fresh process, whose fields begin with fresh_.

    A GPU's memory is kept by its allocator in every process, and --scaling is about memory.
    """
    row = run_process("run", case, truth)
    if case.device == "cpu" and case.shape != "scaling" and "ratio" in row:
        fresh = run_process("fresh", case, truth)
        row |= {f"fresh_{name}": value for name, value in fresh.items()}
    return row


def run(
    cases: Sequence[Any],
    path: Path,
    section: str = "cases",
    why_not: Callable[[Any], str | None] = reason_not_to,
) -> int:
    """Measure the cases, storing each when it is done; return how many could be measured."""
    if path.exists():
        store.load(path)  # Refuse a file of another version before hours are spent.
    measured = 0
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder) / "truth.pt"
        for problem, group in groupby(cases, key=lambda case: case.problem):
            print(problem, flush=True)
            failed: dict | None = None  # None: no fp64 truth yet; {}: it is there; else why not
            for case in group:
                name = f"  {case.provider:<22}"
                print(name, end="", flush=True)  # A case takes a minute.
                why = why_not(case)
                if why is None and failed is None:
                    failed = run_process("truth", case, truth)
                row = {"skipped": why} if why else failed or measured_row(case, truth)
                print(line_of(case, row).removeprefix(name), flush=True)
                measured += "skipped" not in row
                key = f"{case.problem} {case.provider}"
                store.merge(path, case.device, section, {key: case._asdict() | row})
    return measured


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse and check the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--shape",
        default=[],
        help=f"{', '.join(SHAPES)}, all, or hidden x vocabulary, such as 2048x32000",
        **several,
    )
    parser.add_argument(
        "--task", default=["loss"], help="tasks as above, or all (default: loss)", **several
    )
    parser.add_argument("--input", default=[], help="inputs as above, or all", **several)
    parser.add_argument(
        "--dtype",
        default=["bfloat16"],
        help=f"{', '.join(DTYPES)}, or all (default: bfloat16)",
        **several,
    )
    parser.add_argument("--provider", default=[], help="providers as above, or all", **several)
    parser.add_argument("--tokens", type=int, help="tokens (default: 512 on a CPU, 8192 on a GPU)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--results", type=Path, help="file to add to (default: benchmarks/results/<device>.json)"
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help=f"measure {SCALING_TOKENS[0]} to {SCALING_TOKENS[-1]} tokens, and vocabularies of "
        f"{SCALING_VOCABS[0]} to {SCALING_VOCABS[-1]} entries",
    )
    parser.add_argument(
        "--calibration",
        action="store_true",
        help="print how LM-like inputs compare with real ones, and stop",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="write the tables and plots of README and docs from the results, and stop",
    )
    options = parser.parse_args(arguments)
    if options.tokens is not None and options.tokens < 1:
        raise BenchError(f"--tokens: {options.tokens} is not positive")
    check_device(options.device)
    return options


def check_device(name: str) -> None:
    chosen("device", [name], TOKENS)
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device: torch sees no CUDA GPU; use cpu")


def main(arguments: list[str]) -> int:
    """Run the suite; return an exit status, as of exit_status()."""
    return exit_status("python -m benchmarks", lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    if any(argument.startswith("--compile-report") for argument in arguments):
        from . import compile_report  # needs Triton

        return compile_report.main(arguments)
    options = parse(arguments)
    if options.calibration:
        for line in inputs.calibration({name: SHAPES[name][:2] for name in SHAPES}):
            print(line, flush=True)
        return 0
    path = options.results or store.path_of(options.device)
    if options.report:
        for written in report.write(path):
            print(written)
        return 0
    print(f"{run(list(cases_of(options)), path)} measured, in {os.path.relpath(path)}")
    return 0


def exit_status(program: str, work: Callable[[], int]) -> int:
    """Work; return 0 when done, 2 for an error the user can mend, 130 if interrupted."""
    try:
        return work()
    except BenchError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        remedy = "pip install --editable '.[train,bench]'"
        print(f"{program}: error: {error.name} is not installed; {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; finished cases are kept", file=sys.stderr)
        return 130
