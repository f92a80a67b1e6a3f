"""`em-kernels select`: rank a pool's prompts, to choose the one to train on."""

import shlex
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..training.config import TrainConfig
from ..training.console import Terminal
from ..training.data.columns import texts_of
from ..training.evaluation.select import SELECTION, Candidate, SelectConfig, select
from ..training.evaluation.task import open_model
from .flags import as_flags, parse_settings

SHOWN = 10  # prompts
HELP = """Run the same command again to continue where it was stopped.

Examples:
  em-kernels select --model Qwen/Qwen2.5-Math-1.5B --data math500.jsonl --count 100
  em-kernels select --model demo --data addition --count 24 --template few-shot \\
    --temperature 1 --top-k 0 --top-p 1 --repetition-penalty 1 --max-new-tokens 24"""


def run(arguments: list[str]) -> int:
    config = parse_settings(SelectConfig(), "select", arguments, HELP)
    pool, shots, left_out = config.problems()
    console = Terminal(stderr=True)
    if left_out:
        console.print(left_out, markup=False, soft_wrap=True)
    ranked = select(config, pool, shots, open_model(config, console), console)
    show_ranking(config, ranked, Terminal())
    print(config.output / SELECTION)
    return 0


def show_ranking(config: SelectConfig, ranked: Sequence[Candidate], console: Console) -> None:
    """Print the best prompts, and the command that trains on the first."""
    title = f"The first {min(SHOWN, len(ranked))} of {len(ranked)}"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title)
    table.add_column("row", justify="right", min_width=3)
    table.add_column("the prompt's end", no_wrap=True)
    for name in ("right", "disagree", "entropy", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, c in enumerate(ranked[:SHOWN]):
        end = " ".join(texts_of(c.prompt)[-1].split())[-32:]
        right = "-" if c.pass_rate is None else f"{c.pass_rate:.0%}"
        cells = (right, f"{c.disagreement:.0%}", f"{c.entropy:.3f}", str(c.samples))
        table.add_row(str(row), escape(end), *cells)
    console.print(table)
    if (ended := np.mean([c.ended for c in ranked])) < 0.5:
        console.print(f"{1 - ended:.0%} of the completions were cut off: raise max_new_tokens.")
    best = ranked[0]
    if best.pass_rate in (0.0, 1.0, None) and best.disagreement == 0:
        console.print("No prompt's samples vary; raise sampling.temperature, or take another pool.")
    train = TrainConfig(
        model=config.model,
        prompt_from=config.output / SELECTION,
        chat_template=config.template == "chat",
        template_kwargs=config.template_kwargs,
        sampling=config.sampled(),
    )
    command = shlex.join(["em-kernels", "train", *as_flags(train)])
    console.print(f"Train on the first: {command}", markup=False, soft_wrap=True)
