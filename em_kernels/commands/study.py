"""`em-kernels study`: many runs of one prompt each, compared."""

from ..training.console import Terminal
from ..training.evaluation.study import run_study
from ..training.evaluation.study_analysis import table_of
from ..training.evaluation.study_config import StudyConfig
from .flags import parse_settings

HELP = """Prompts of a pool form three arms: those of highest variance of correctness, random ones,
and ones that no sample gets right. Each prompt is trained on alone, with one seed, for a number of
updates that is fixed beforehand; all are scored on the same held-out problems, teacher-forced. The
same command again resumes one that was stopped; a prompt takes one to two minutes on two cores. The
default learning rate was found on addition.

Examples: em-kernels study; em-kernels study --data gym:letter_counting --output
runs/study-letters"""


def run(arguments: list[str]) -> int:
    """Run it, show the table and what it says."""
    config = parse_settings(StudyConfig, "study", arguments, HELP)
    report = run_study(config, Terminal(stderr=True))
    console = Terminal()
    console.print(table_of(report))
    console.print(report["reading"], markup=False)
    print(config.output / "study.json")
    return 0
