"""`em-kernels report`: runs as one HTML page."""

import argparse
from pathlib import Path

from ..training.report.page import write_report
from ..training.run_folder import REPORT


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="em-kernels report",
        description="Write one self-contained HTML page about runs of em-kernels train: what "
        "happened, curves over updates, completions before and after training coloured by each "
        "token's entropy, how the logits moved. The plots are saved beside it as PNGs.",
        epilog="Example: em-kernels report runs/seed15 runs/seed16 --output seeds.html",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; curves are overlaid"
    )
    default = f"the page; default: RUN/{REPORT}, or {REPORT} for several runs"
    parser.add_argument("--output", type=Path, metavar="FILE", help=default)
    fast = "load no model and show only what the runs recorded; takes seconds"
    parser.add_argument("--no-models", dest="models", action="store_false", help=fast)
    known = parser.parse_args(arguments)
    usual = known.runs[0] / REPORT if len(known.runs) == 1 else Path(REPORT)
    print(write_report(known.runs, known.output or usual, models=known.models))
    return 0
