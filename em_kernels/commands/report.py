"""`em-kernels report`: runs as one HTML page."""

import argparse
from pathlib import Path

from ..training.console import Terminal
from ..training.report.model_logits import EXPLAINED, draw, model_logits, table_of
from ..training.report.page import write_report
from ..training.run_folder import REPORT
from ..training.settings import UserError


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="em-kernels report",
        description="Write one self-contained HTML page about runs of em-kernels train: what "
        "happened, curves over updates, completions before and after training coloured by each "
        "token's entropy, how the logits moved. The plots are saved beside it as PNGs.",
        epilog="Examples: em-kernels report runs/seed15 runs/seed16 --output seeds.html; "
        "em-kernels report --models Qwen/Qwen2.5-Math-1.5B runs/one --prompts math500.jsonl",
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="folder of a run; curves are overlaid"
    )
    figure = "instead of runs: draw the logits of these models, hub ids or folders, into a PNG"
    parser.add_argument("--models", dest="compared", nargs="+", metavar="MODEL", help=figure)
    rows = "with --models: a .jsonl or .parquet file, whose first 20 rows each model continues"
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=rows)
    default = f"the page; default: RUN/{REPORT}, or {REPORT} for several runs"
    parser.add_argument("--output", type=Path, metavar="FILE", help=default)
    fast = "load no model and show only what the runs recorded; takes seconds"
    parser.add_argument("--no-models", dest="models", action="store_false", help=fast)
    known = parser.parse_args(arguments)
    if known.compared:
        if known.runs or known.prompts is None:
            raise UserError("models: goes with --prompts, and without runs")
        output, console = known.output or Path("logits.png"), Terminal()
        found = model_logits(known.compared, known.prompts, Terminal(stderr=True))
        draw(found, output)
        console.print(table_of(found))
        console.print(EXPLAINED)
        print(output)
        return 0
    if known.prompts is not None:
        raise UserError("prompts: goes with --models")
    if not known.runs:
        raise UserError("RUN: missing; name the --output of an em-kernels train, or --models")
    usual = known.runs[0] / REPORT if len(known.runs) == 1 else Path(REPORT)
    print(write_report(known.runs, known.output or usual, models=known.models))
    return 0
