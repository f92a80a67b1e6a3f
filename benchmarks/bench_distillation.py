"""`python -m benchmarks.bench_distillation`: divergences and top-k beside eager, TRL and Liger."""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import store, suite
from benchmarks.distillation import AGREEMENT, PROVIDERS, TASKS, TOP_K, Case
from benchmarks.store import BenchError

PROGRAM = "python -m benchmarks.bench_distillation"


class Pair(NamedTuple):
    """Hidden sizes of student and teacher, and their vocabulary."""

    hidden_size: int
    ref_hidden_size: int
    vocab_size: int


SHAPES = {
    "qwen2.5": Pair(896, 1536, 151936),  # 0.5B from 1.5B
    "smollm2": Pair(576, 960, 49152),  # 135M from 360M
}
DESCRIPTION = f"""Measure distillation losses of an LM head with all gradients of the student.

Each case runs in a process of its own, and on a CPU again in a fresh one that sets
nothing, as `python -m benchmarks` does; see its --help for the figures. The floor is
the bare matrix products: both heads' logits and the student's two gradients for a
divergence (8 units of work), without the teacher's for the others (6). Inputs are
LM-like; {AGREEMENT:.0%} of the variance of the teacher's logits is the student's.

Results are added to benchmarks/results/<device>.json after each case; Ctrl-C keeps
them. `python -m benchmarks --report` writes the tables of docs/benchmarks.md.

tasks:
{suite.listed({name: task.title for name, task in TASKS.items()})}
providers:
{suite.listed({name: provider.title for name, provider in PROVIDERS.items()})}
shapes, student's x teacher's hidden size x vocabulary:
{suite.listed({name: "x".join(map(str, shape)) for name, shape in SHAPES.items()})}"""
EXAMPLES = f"""examples:
  {PROGRAM}                        the tables of the docs
  {PROGRAM} --shape smollm2        a third of the size, minutes
  {PROGRAM} --task jsd --provider ours trl
  {PROGRAM} --shape 64x96x4000 --tokens 64 --results try.json
"""


def pair_of(name: str) -> Pair:
    """Return a named shape, or one such as 896x1536x151936."""
    sizes = name.split("x")
    if len(sizes) == 3 and all(map(str.isdecimal, sizes)):
        found = Pair(*map(int, sizes))
        if not 0 < found.hidden_size < found.ref_hidden_size or found.vocab_size < TOP_K:
            raise BenchError(
                f"--shape: {name}: the teacher must be wider than the student, the vocabulary "
                f"have {TOP_K} entries"
            )
        return found
    suite.chosen("shape", [name], SHAPES)
    return SHAPES[name]


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases that the flags ask for; of a divergence's providers only to divergences."""
    tasks = suite.chosen("task", options.task, TASKS)
    providers = suite.chosen("provider", options.provider, PROVIDERS)
    shapes = list(SHAPES) if "all" in options.shape else options.shape
    tokens, device = options.tokens or suite.TOKENS[options.device], options.device
    for shape, task, name in product(shapes, tasks, providers):
        if TASKS[task].beta is not None or not PROVIDERS[name].divergence_only:
            yield Case(name, shape, tokens, *pair_of(shape), options.dtype, task, device)


def reason_not_to(case: Case) -> str | None:
    """Say why this provider cannot run this case here, as far as is known without trying."""
    provider, item = PROVIDERS[case.provider], getattr(torch, case.dtype).itemsize
    student = (case.tokens + case.vocab_size) * case.hidden_size
    teacher = (case.tokens + case.vocab_size) * case.ref_hidden_size
    # Making the teacher holds its two parts beside it; gradients come in their dtype and in fp32.
    weights = item * (student + 2 * teacher) + (item + 4) * student
    a_logit = provider.logit_bytes[0 if TASKS[case.task].beta is not None else 1]
    logits = case.tokens * case.vocab_size * a_logit
    return suite.lack(provider.package, weights + logits + suite.SPARE_BYTES, case.device)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse and check the flags."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    several = {"nargs": "+", "metavar": "NAME"}
    shapes = f"{', '.join(SHAPES)}, all, or such as 64x96x4000 (default: qwen2.5)"
    parser.add_argument("--shape", default=["qwen2.5"], help=shapes, **several)
    parser.add_argument("--task", default=["all"], help="tasks (default: all)", **several)
    parser.add_argument("--provider", default=["all"], help="providers (default: all)", **several)
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    parser.add_argument("--tokens", type=int, help="tokens (default: 512 on a CPU, 8192 on a GPU)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu or cuda")
    parser.add_argument(
        "--results", type=Path, help="file to add to (default: benchmarks/results/<device>.json)"
    )
    options = parser.parse_args(arguments)
    if options.tokens is not None and options.tokens < 1:
        raise BenchError(f"--tokens: {options.tokens} is not positive")
    suite.chosen("dtype", [options.dtype], suite.DTYPES)
    suite.check_device(options.device)
    return options


def main(arguments: list[str]) -> int:
    """Measure; return an exit status, as of suite.exit_status()."""

    def work() -> int:
        options = parse(arguments)
        path = options.results or store.path_of(options.device)
        measured = suite.run(list(cases_of(options)), path, "distillation", reason_not_to)
        print(f"{measured} measured, in {os.path.relpath(path)}")
        return 0

    return suite.exit_status(PROGRAM, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
