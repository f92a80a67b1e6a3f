"""`em-kernels report`: runs as one HTML page."""

import argparse
from pathlib import Path

from ..training.report.page import write_report


def run(arguments: list[str]) -> int:
    """Write the page, and print where it is."""
    parser = argparse.ArgumentParser(
        prog="em-kernels report",
        description="Write one self-contained HTML page about runs of em-kernels train: what "
        "happened, curves over updates, completions before and after coloured by each token's "
        "entropy, how the logits moved. Its plots lie beside it as PNGs.",
        epilog="Example: em-kernels report runs/seed15 runs/seed16 --output seeds.html",
    )
    several, only = "run folders; several share the same plots", "show only what the run recorded"
    default = "default: RUN/report.html; report.html for several runs"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=several)
    parser.add_argument("--output", type=Path, metavar="FILE", help=default)
    parser.add_argument(
        "--no-models", action="store_true", help=f"load no model, {only}; takes seconds"
    )
    known = parser.parse_args(arguments)
    alone = known.runs[0] / "report.html" if len(known.runs) == 1 else Path("report.html")
    print(write_report(known.runs, known.output or alone, models=not known.no_models))
    return 0
