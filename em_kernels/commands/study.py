"""`em-kernels study`: many runs of one prompt each, compared."""

from ..training.console import Terminal
from ..training.evaluation.study import run_study
from ..training.evaluation.study_analysis import StudyConfig, table_of
from .flags import parse_settings

HELP = """Three arms of prompts from one pool: those whose correctness varies most, random ones, and
ones that no sample answers correctly. As a control a fourth arm raises the entropy of the first
arm's prompts. The model is trained on each prompt alone, with one seed, for
a number of updates fixed beforehand; all are scored on the same held-out problems, teacher-forced.
Run the same command again to continue where it was stopped. A prompt takes one to two minutes on
two cores. The default learning rate was tuned on addition.

Examples:
  em-kernels study
  em-kernels study --data gym:letter_counting --output runs/study-letters"""


def run(arguments: list[str]) -> int:
    config = parse_settings(StudyConfig(), "study", arguments, HELP)
    report = run_study(config, Terminal(stderr=True))
    console = Terminal()
    console.print(table_of(report))
    console.print(report["reading"], markup=False)
    print(config.output / "study.json")
    return 0
