"""Time and memory of a whole update of One-shot EM: ours, plain transformers, and the way of the
official train.py. make bench-train runs it.

The programs run in processes of their own and take turns. Each samples for itself, but those in
fp32 then train on our completions: on the same tokens their losses must agree.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers

import em_kernels
from benchmarks import inputs, store, tables
from benchmarks.loops import by_hand, ours
from benchmarks.store import BenchError
from em_kernels.training.config import FULL_LR
from em_kernels.training.presets import preset

OURS, BF16, OFFICIAL = "ours-fp32", "ours-bf16", "official"
PROGRAMS = {
    OURS: "**ours, fp32**",
    BF16: "**ours, bf16**",
    "plain": "plain transformers and eager entropy, fp32",
    OFFICIAL: "the official train.py's way, fp32",
}
# Limit and goal of the ratio, shown but not asserted.
LIMITS = {"plain": (">= 2", ">= 4"), OFFICIAL: (">= 5", ">= 10")}
# Between losses on the same tokens. After an update bf16 weights differ from fp32 ones.
LOSS_RTOL = 0.01
RECIPES = {"demo": "addition, 24 tokens", "one-shot-em": "the paper's prompt and sampling"}


def run_program(program: str, options: argparse.Namespace, folder: Path) -> None:
    """Make an update for each line on stdin; print each update's metrics as a line of JSON."""
    out, sys.stdout = sys.stdout, sys.stderr

    def wait() -> None:
        if not sys.stdin.readline():
            sys.exit()

    def done(row: dict) -> None:
        print(json.dumps(row), file=out, flush=True)
        wait()

    wait()
    config = preset(options.recipe)
    sampling = {"repetition_penalty": 1.0}
    if options.max_new_tokens is not None:
        sampling["max_new_tokens"] = options.max_new_tokens
    config = config.model_copy(
        update={
            "model": options.model,
            "prompt": config.prompt or inputs.PROMPT,
            "sampling": config.sampling.model_copy(update=sampling),
            "lr": config.lr or FULL_LR,
            "save_at": (),
            "rollouts": options.rollouts,
            "steps": 10**6,
            "stop_below": 0.0,
            "device": options.device,
            "output": folder / program,
            "dtype": "bfloat16" if program == BF16 else "float32",
        }
    )
    if program.startswith("ours"):
        ours(config, done)
    else:
        by_hand(config, program == OFFICIAL, folder / options.programs[0], options.rows, done)


class Program:
    """A process that makes an update on request."""

    def __init__(self, program: str, options: argparse.Namespace, folder: Path) -> None:
        self.name, self.errors = program, folder / f"{program}.err"
        command = [sys.executable, "-m", "benchmarks.bench_train", *options.given]
        command += ["--program", program, "--folder", str(folder)]
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def update(self) -> dict:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            said = self.errors.read_text().split("\n")
            last = next((line for line in reversed(said) if line.strip()), "ended silently")
            raise BenchError(f"{self.name}: {last}")
        return json.loads(line)


def take_turns(options: argparse.Namespace) -> dict[str, list[dict]]:
    """Return each program's updates; the first of each includes one-time work."""
    counts = {name: 1 + options.updates for name in options.programs}
    if OFFICIAL in counts:
        counts[OFFICIAL] = options.official_updates
    turns = [(turn, name) for turn in range(max(counts.values())) for name in counts]
    if options.one_at_a_time:
        turns.sort(key=lambda pair: options.programs.index(pair[1]))
    running: dict[str, Program] = {}
    rows: dict[str, list[dict]] = {name: [] for name in counts if counts[name]}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for turn, name in turns:
            if turn >= counts[name]:
                continue
            if name not in running:
                if options.one_at_a_time:
                    stack.close()
                running[name] = Program(name, options, Path(folder))
                stack.callback(running[name].process.wait)
                stack.callback(running[name].process.kill)
            rows[name].append(row := running[name].update())
            seconds = row["sampling_s"] + row["training_s"]
            line = f"update {turn + 1}  {seconds:6.1f} s  {row['entropy']:.4f} nats  {name}"
            print(line, flush=True)
            expected = rows[options.programs[0]][turn]["entropy"]
            if name != BF16 and (turn == 0 or options.programs[0] != BF16):
                check_loss(row["entropy"], expected, name)
    return rows


def check_loss(loss: float, expected: float, name: str) -> None:
    """Raise BenchError if a loss on the first program's completions is not that program's."""
    if abs(loss - expected) > LOSS_RTOL * expected:
        raise BenchError(f"{name}: its loss {loss:.4f} differs from ours, {expected:.4f}")


def summary(rows: dict[str, list[dict]], options: argparse.Namespace) -> dict[str, dict]:
    """Return each program's medians over the updates after its first, if there are any."""
    found: dict[str, dict] = {}
    for name, measured in rows.items():
        measured = measured[1:] or measured
        for row in measured:
            row["total_s"] = row["sampling_s"] + row["training_s"]
        median = {
            key: statistics.median(row[key] for row in measured)
            for key in ("sampling_s", "training_s", "total_s", "tokens")
        }
        found[name] = {
            "program": PROGRAMS[name],
            "model": Path(options.model).name,
            "recipe": options.recipe,
            "rollouts": options.rollouts,
            "new_tokens": options.max_new_tokens or preset(options.recipe).sampling.max_new_tokens,
            "updates": len(measured),
            **{key: round(value, 2) for key, value in median.items()},
            "ratio": round(median["total_s"] / found[options.programs[0]]["total_s"], 2)
            if found
            else 1.0,
            **dict(zip(("must", "aim"), LIMITS.get(name, ()), strict=False)),
            "peak_gib": round(max(row["peak_memory_gib"] for row in measured), 2),
            "versions": {
                "em_kernels": em_kernels.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
    return found


def key_of(program: str, row: dict) -> str:
    """Return the key of a program's results; those of the demo's recipe have its name alone."""
    if row["recipe"] == "demo":
        return program
    return f"{row['model']} {row['rollouts']}x{row['new_tokens']} {program}"


def main(arguments: list[str]) -> int:
    """Run the programs; return 0 when done, 2 for an error that the user can mend."""
    program = "python -m benchmarks.bench_train"
    parser = argparse.ArgumentParser(program, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--updates",
        type=int,
        default=3,
        help="updates to measure, after a first that warms up (default: %(default)s)",
    )
    parser.add_argument(
        "--official-updates",
        type=int,
        default=1,
        help="updates in the official way, its first one included (default: %(default)s)",
    )
    parser.add_argument("--model", default="demo", help='hub id, local folder, or "demo" (default)')
    parser.add_argument(
        "--rollouts", type=int, default=32, help="completions per update (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--results", type=Path, help="file to add to (default: results/<device>.json)"
    )
    recipes = "; ".join(f"{name}: {what}" for name, what in RECIPES.items())
    parser.add_argument("--recipe", choices=RECIPES, default="demo", help=recipes)
    parser.add_argument("--max-new-tokens", type=int, help="tokens of a completion, at most")
    parser.add_argument(
        "--rows",
        type=int,
        default=8,
        help="completions per micro-batch of the others (default: %(default)s); ours chooses",
    )
    parser.add_argument(
        "--programs",
        nargs="+",
        choices=PROGRAMS,
        default=list(PROGRAMS),
        help="programs to measure; the first one's completions are trained on, and its time is "
        "what others are compared with (default: all)",
    )
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="end each program before the next one starts, where memory does not hold them all",
    )
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.given = arguments
    if not options.programs[0].startswith("ours"):
        parser.error("--programs: the first one must be ours, which records its completions")
    if options.official_updates > 1 + options.updates:
        parser.error("--official-updates: the others make fewer; raise --updates")
    if options.program:
        run_program(options.program, options, options.folder)
    path = options.results or store.path_of(options.device)
    try:
        found = summary(take_turns(options), options)
        named = {key_of(name, row): row for name, row in found.items()}
        store.merge(path, options.device, "training", named)
    except BenchError as error:
        print(f"bench_train: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(["", *tables.updates(found), f"written to {path}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
