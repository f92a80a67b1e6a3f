"""Write the plans in docs/memory.md, between its markers, anew.

Needs the models' shapes only: folders with a config.json each stand in for the hub's models.
"""

import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch

from em_kernels.cli import main
from em_kernels.commands.plan import open_config
from em_kernels.training.config import TrainConfig
from em_kernels.training.distributed import LaunchSpec
from em_kernels.training.planning.plan import GIB, Plan
from em_kernels.training.planning.planner import Planner

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu_24gb import save_task

PAGE = Path(__file__).with_name("memory.md")
MODEL = "Qwen/Qwen2.5-Math-"
MACHINES = {  # usable GiB of the card and of the host
    "laptop, 8 GB card, 32 GB of RAM": (7.2, 29),
    "laptop, 12 GB card, 32 GB": (11, 29),
    "laptop, 16 GB card, 64 GB": (15, 60),
    "24 GB card, WSL's half of 64 GB": (22.5, 30),
    "24 GB card, 64 GB": (22.5, 60),
    "24 GB card, 96 GB": (22.5, 90),
    "24 GB card, 128 GB": (22.5, 120),
}
SEVERAL = {  # usable GiB of each card and of the host, number of cards
    "2 cards of 24 GB, 128 GB of RAM": (22.5, 120, 2),
    "8 cards of 24 GB, 256 GB": (22.5, 245, 8),
    "8 cards of 48 GB, 512 GB": (46, 490, 8),
    "2 cards of 80 GB, 256 GB": (78, 245, 2),
}
ENGINES = {  # LaunchSpec.engine, and whether the optimizer's state is on the host
    "replicas": ("replicas", False),
    "FSDP2": ("fsdp2", False),
    "ZeRO-2": ("deepspeed", False),
    "ZeRO-2, state on the host": ("deepspeed", True),
}
SIZES = ("7B", "1.5B")
SHOWN = "24 GB card, 64 GB"  # the machine whose plan of the first size is printed in full


class Shared(Planner):
    """A planner whose measurements of a model serve every machine."""

    known: dict[str, dict] = {}

    def model_memory(self, config: TrainConfig):  # noqa: ANN201
        self.models = self.known.setdefault(self.config.model, {})
        return super().model_memory(config)


def command(model: str) -> str:
    """Return a console block: `em-kernels plan` for the machine SHOWN, and its output."""
    gpu, host = MACHINES[SHOWN]
    arguments = f"plan --model {model} --gpu-memory {gpu} --host-memory {host}"
    out = io.StringIO()
    columns = os.environ.get("COLUMNS", "")
    os.environ["COLUMNS"] = "96"
    try:
        with redirect_stdout(out):
            main(arguments.split())
    finally:
        os.environ["COLUMNS"] = columns
    return f"```console\n$ em-kernels {arguments}\n{out.getvalue().rstrip()}\n```"


def cell(plan: Plan, chosen: bool) -> str:
    if not plan.fits:
        return "no"
    text = f"{plan.device_total / GIB:.1f} + {plan.host_total / GIB:.1f}"
    return f"**{text}**" if chosen else text


def table(model: str, machines: Sequence[str]) -> list[str]:
    """Return lines of Markdown: a header and a row for each machine."""
    config = open_config(model)
    rows, header = [], ""
    for name in machines:
        gpu, host = MACHINES[name]
        asked = TrainConfig(model=model, gpu_memory=gpu, host_memory=host)
        planner = Shared(asked, config, 128, torch.device("cuda"))
        modes, chosen = planner.modes(), planner.choose()
        header = f"| | card | host | {' | '.join(f'`{plan.name}`' for plan in modes)} |"
        cells = [cell(plan, plan.name == chosen.name) for plan in modes]
        rows.append(f"| {name} | {gpu:g} | {host} | {' | '.join(cells)} |")
    return [header, "|" + "---|" * (header.count("|") - 1), *rows]


def several(model: str) -> list[str]:
    """Return lines of Markdown: what one of several processes needs, by engine."""
    config = open_config(model)
    rows = [f"| | {' | '.join(ENGINES)} |", "|" + "---|" * (len(ENGINES) + 1)]
    for name, (gpu, host, cards) in SEVERAL.items():
        cells = []
        for engine, on_host in ENGINES.values():
            asked = TrainConfig(model=model, gpu_memory=gpu, host_memory=host)
            launch = LaunchSpec(cards, cards, engine, on_host)
            plan = Shared(asked, config, 128, torch.device("cuda"), launch=launch).choose()
            what = f"`{plan.name}` " if engine == "replicas" and plan.fits else ""
            cells.append(what + cell(plan, False))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


@contextmanager
def folders() -> Iterator[None]:
    """Work in a folder in which the models' names are folders with a config.json."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for size in SIZES:
                save_task(Path(MODEL + size), size, dry_run=False)
            yield
        finally:
            os.chdir(here)


def text() -> str:
    """Return what stands between the markers."""
    lines = ["", command(MODEL + SIZES[0]), ""]
    for size in SIZES:
        lines += [f"{MODEL}{size}:", "", *table(MODEL + size, list(MACHINES)), ""]
    what = f"{MODEL}{SIZES[0]} on several cards, of one process's card + its share of the host:"
    lines += [what, "", *several(MODEL + SIZES[0]), ""]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    begin, end = "<!-- docs/plans.py: begin -->\n", "<!-- end -->"
    with folders():
        new = text()
    before, rest = PAGE.read_text().split(begin)
    PAGE.write_text(before + begin + new + end + rest.split(end)[1])
