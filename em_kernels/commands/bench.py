"""`em-kernels bench`: the benchmark suite of a checkout, or the GPU kernels' compiled code."""

import argparse
import sys
from pathlib import Path


def run(arguments: list[str]) -> int:
    """The benchmark suite of the checkout, or what the GPU kernels cost, from their code."""
    if any(argument.startswith("--compile-report") for argument in arguments):
        return compile_report(arguments)
    folder = Path(__file__).parents[2] / "benchmarks"
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
    """Print the cost of the GPU kernels, from their compiled code."""
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
        from .. import compile_report as report
    except ModuleNotFoundError as error:
        print(f"em-kernels bench: error: {error.name} is not installed", file=sys.stderr)
        return 2
    unknown = set(known.arch or ()) - set(report.ARCHS)
    if unknown:
        parser.error(f"--arch: {unknown.pop()} is none of {', '.join(map(str, report.ARCHS))}")
    return report.main(known.arch or list(report.ARCHS))
