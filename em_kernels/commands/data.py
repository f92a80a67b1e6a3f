"""`em-kernels data`: how the first rows of a data file are read."""

import argparse
import json
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..training.console import Terminal
from ..training.data.columns import (
    ANSWER_COLUMNS,
    CHOICE_COLUMNS,
    PROMPT_COLUMNS,
    Columns,
    Problem,
    UnusableRow,
    messages_of,
)
from ..training.data.problems import read_problems
from ..training.settings import UserError

HELP = f"""Show how train, select and eval read the first rows of a file or a hub
dataset: the messages that the model gets and the answer, then how many rows
were read, and why others were not. Rows beyond --count are not read.

The prompt is the first of these columns that a row has, capitals or not:
  {", ".join(PROMPT_COLUMNS[:5])},
  {", ".join(PROMPT_COLUMNS[5:])}
A text is one user message; a list is a conversation ("role" and "content", or
"from" and "value"). "body" is put before "question", "input" behind
"instruction". {" or ".join(CHOICE_COLUMNS).capitalize()} are lettered below the prompt, and the
answer is then a letter. The answer is the first of
  {", ".join(ANSWER_COLUMNS)}
of the row or of its "reward_model", else what "solution" has in its last box.
A worked answer is cut to its last box, or to what follows "####" or
"The answer is"."""
EXAMPLES = """examples:
  em-kernels data math500.jsonl
  em-kernels data openai/gsm8k --subset main --split train --count 2
  em-kernels data rows.parquet --prompt-column text --answer-column label"""


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="em-kernels data",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = "a .jsonl, .json or .parquet file, a hub dataset (owner/name), addition, or gym:TASK"
    parser.add_argument("data", metavar="FILE", help=source)
    parser.add_argument("--count", type=int, default=5, help="rows to read (default: 5)")
    parser.add_argument("--prompt-column", metavar="C", help="column that holds the prompt")
    parser.add_argument("--answer-column", metavar="C", help="column that holds the answer")
    own = "system message, in place of the data's own; empty: none"
    parser.add_argument("--system", metavar="TEXT", help=own)
    parser.add_argument("--subset", help="configuration of the hub dataset, if it has several")
    parser.add_argument("--split", default="test", help="of the hub dataset (default: test)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    known = parser.parse_args(arguments)
    if known.count < 1:
        raise UserError(f"count: {known.count} is less than 1")
    rows = read_problems(
        known.data,
        subset=known.subset,
        split=known.split,
        count=known.count,
        columns=Columns(known.prompt_column, known.answer_column),
        system=known.system,
        fewer=True,
    )
    if known.json:
        print(json.dumps(_as_json(rows), ensure_ascii=False, indent=1))
    else:
        show_rows(rows, Terminal())
    return 0


def show_rows(rows: list[Problem | UnusableRow], console: Console) -> None:
    """Print each row's messages and answer, and the counts."""
    for i, row in enumerate(rows):
        console.print(f"row {i}", style="bold")
        table = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
        if isinstance(row, Problem):
            for message in messages_of(row.prompt):
                table.add_row(message["role"], Text(message["content"].strip("\n")))
            table.add_row("answer", Text("none" if row.answer is None else row.answer))
        else:
            table.add_row("skipped", Text(str(row)))
        console.print(table)
        console.print()
    counts, table = _as_json(rows), Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    console.print(f"{len(rows)} rows: {counts['read']} read, {len(rows) - counts['read']} skipped")
    for reason, n in counts["skipped"].items():
        table.add_row(f"{n} skipped", Text(reason))
    if n := counts["unanswered"]:
        told = "select and eval leave these out where other rows have answers"
        table.add_row(f"{n} without an answer", told)
    console.print(table)


def _as_json(rows: list[Problem | UnusableRow]) -> dict[str, Any]:
    """Return rows and counts as JSON values."""
    problems = [row for row in rows if isinstance(row, Problem)]
    told: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        if isinstance(row, Problem):
            told.append({"row": i, "messages": messages_of(row.prompt), "answer": row.answer})
        else:
            told.append({"row": i, "skipped": str(row)})
    return {
        "rows": told,
        "read": len(problems),
        "unanswered": sum(problem.answer is None for problem in problems),
        "skipped": Counter(str(row) for row in rows if isinstance(row, UnusableRow)),
    }
