"""Records of a run beside its checkpoints: settings, metrics, completions, a running marker."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from ..rollouts.sampling import Rollout
from ..run_folder import CONFIG, METRICS, ROLLOUTS
from ..settings import Settings, UserError

ASKED = "asked.json"
FREE = ("output", "batch_size", "device", "server", "parallel")  # settings that may change
MARKER, PARTIAL = "running.json", f".{CONFIG}.partial"


def check_output(output: Path, remedy: str = "choose another, or --resume it") -> None:
    """Raise UserError unless the folder is new or empty, but for a start that was killed."""
    if output.exists() and (
        not output.is_dir() or {*os.listdir(output)} - {MARKER, PARTIAL, ASKED, f".{ASKED}.partial"}
    ):
        raise UserError(f"output: {output} already holds a run or other files; {remedy}")


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add lines of JSON, and have the disk hold them."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with _writing(path), open(path, "ab") as file:
        file.write(data)


def write_whole(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    partial = path.parent / f".{path.name}.partial"
    try:
        with _writing(path):
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            partial.replace(path)
    except UserError:
        with suppress(OSError):
            partial.unlink()
        raise


def write_config(run: Path, config: Settings) -> None:
    """config.yaml."""
    write_whole(run / CONFIG, config.to_yaml())


@contextmanager
def resumable(output: Path, config: Settings, **facts: str) -> Iterator[None]:
    """Works in a new folder, or in that of the same command which was stopped.

    Args:
        facts: what a setting stood for; must be as they were.

    Raises: UserError where the folder holds anything else, or another process works there.
    """
    if not (output / CONFIG).exists():
        check_output(output, "choose another")
    with Running(output):
        if (output / CONFIG).exists():
            before = yaml.safe_load((output / CONFIG).read_text(encoding="utf-8"))
            both = [
                {name: value for name, value in settings.items() if name not in FREE}
                for settings in (before, config.model_dump(mode="json"))
            ]
            if what := differing(*both):
                raise UserError(
                    f"output: {output} was made with {what}; go on with that, or name another"
                )
            was = json.loads((output / ASKED).read_text(encoding="utf-8"))
            if changed := [name for name in facts if facts[name] != was.get(name)]:
                raise UserError(
                    f"{changed[0]}: is not what it was when {output} was begun; name another output"
                )
        else:
            write_whole(output / ASKED, json.dumps(facts) + "\n")
            write_config(output, config)
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; the same command goes on in {output}") from None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl; none where there is no file."""
    return [row for row, _ in _rows(run / METRICS, "update")]


def read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """Whole lines of a file to which more will be added; a torn last one is cut off."""
    rows = _rows(path, key)
    end = rows[-1][1] if rows else 0
    if path.exists() and end < path.stat().st_size:
        with _writing(path):
            os.truncate(path, end)
    return [row for row, _ in rows]


def read_rollouts(run: Path, rollouts: int) -> dict[int, list[Rollout]]:
    """So many completions of each whole update of a run.

    Raises: UserError where the folder is no run's, or a line is not the one that comes next.
    """
    path, found = run / ROLLOUTS, list[Rollout]()
    if not path.exists() and not (run / CONFIG).exists():
        raise UserError(f"rollouts_from: {run} has no {ROLLOUTS}; name the folder of a run")
    for number, (row, _) in enumerate(_rows(path, "update")):
        update, index = number // rollouts + 1, number % rollouts
        try:
            rollout = Rollout(row["prompt_ids"], row["response_ids"], bool(row["ended"]))
            if (row["update"], row["index"]) != (update, index):
                raise ValueError
            for ids in (rollout.prompt_ids, rollout.response_ids):
                if not ids or not all(type(i) is int and i >= 0 for i in ids):
                    raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"rollouts: line {number + 1} of {path} is not completion {index} (of {rollouts}) "
                f"of update {update}; ask for as many as were sampled"
            ) from None
        found.append(rollout)
    return {i + 1: found[i * rollouts :][:rollouts] for i in range(len(found) // rollouts)}


def replayable(
    run: Path, prompts: Sequence[list[int]], words: int, longest: int
) -> dict[int, list[Rollout]]:
    """Completions of each whole update of a run of the same prompts.

    Raises: UserError for ones of other prompts, beyond the model's words, or too long.
    """
    found = read_rollouts(run, len(prompts))
    for rollouts in found.values():
        responses = [rollout.response_ids for rollout in rollouts]
        if [r.prompt_ids for r in rollouts] != prompts or max(map(max, responses)) >= words:
            raise UserError(
                f"prompt: the completions in {run} are of another prompt, or another tokenizer"
            )
        if (most := max(map(len, responses))) > longest:
            raise UserError(
                f"sampling.max_new_tokens: completions in {run} have {most}; give as many"
            )
    return found


def trim(run: Path, *, rollouts_upto: int, metrics_upto: int) -> None:
    """Cut off the lines of later updates, and a torn last one."""
    for path, upto in ((run / ROLLOUTS, rollouts_upto), (run / METRICS, metrics_upto)):
        end = max((end for row, end in _rows(path, "update") if row["update"] <= upto), default=0)
        if path.exists() and end < path.stat().st_size:
            with _writing(path):
                os.truncate(path, end)


class Running:
    """A context that marks a folder, made where there is none, as one that a process works in.

    `death` is a line about the last process there, where it did not end by itself.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / MARKER

    def __enter__(self) -> "Running":
        """Raises: UserError where another process works there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        except OSError as error:
            raise UserError(f"output: cannot write {self.path}: {error}") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
            if os.fstat(self.file.fileno()).st_nlink == 0:  # another's, removed since it was opened
                raise BlockingIOError
        except BlockingIOError:
            self.file.close()
            raise UserError(f"output: another process works in {self.path.parent} now") from None
        except OSError:  # a file system without locks
            pass
        self.death, self.kills = self._death(), _kills()
        self.phase("starting")
        return self

    def phase(self, name: str) -> None:
        """Note what the process is at."""
        facts = {"pid": os.getpid(), "phase": name, "since": f"{datetime.now():%F %T}"}
        line = json.dumps({**facts, "kills": self.kills}).ljust(400)  # covers the one before
        with suppress(OSError):  # a full disk, which the next write of what matters will tell
            os.pwrite(self.file.fileno(), line.encode(), 0)

    def __exit__(self, *error: object) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()

    def _death(self) -> str | None:
        if not (text := self.file.read()):
            return None
        facts = dict[str, Any]()
        with suppress(ValueError):  # a loss of power may leave anything
            facts = json.loads(text)
        cause = "most likely the kernel killed it for memory, or the machine went down"
        if (kills := (_kills() or 0) - (facts.get("kills") or 0)) > 0:
            cause = f"the kernel has since killed {kills} for memory, most likely this one"
        return (
            f"Process {facts.get('pid')} died here without a word, in {facts.get('phase')} since "
            f"{facts.get('since')}: {cause}; where memory is short, a lower --host-memory, "
            "--moments bf16 or --offload-dir help"
        )


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting that is not as it was, if there is one."""
    for name in [*now, *before]:
        if (was := before.get(name)) != (given := now.get(name)):
            return f"{name} {json.dumps(was)}, not {json.dumps(given)}"
    return None


def repetition(ids: Sequence[int]) -> float:
    """Share of the 4-grams that occurred before."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def cut_off(rollouts: Sequence[Rollout]) -> str | None:
    """A warning where most did not end by themselves."""
    cut = sum(not rollout.ended for rollout in rollouts)
    advice = "raise sampling.max_new_tokens, or check sampling.stop"
    warning = f"Warning: {cut} of {len(rollouts)} completions were cut off; {advice}."
    return warning if cut > len(rollouts) / 2 else None


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
        sync(path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"output: cannot write {path}: {error}") from error


def _rows(path: Path, key: str) -> list[tuple[dict[str, Any], int]]:
    """Each whole line of a file, if there is one, and where the line ends; each has a number."""
    rows, end = list[tuple[dict[str, Any], int]](), 0
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        end += len(line) + 1
        try:
            row = json.loads(line)
            row[key] + 1
        except (ValueError, KeyError, TypeError):
            where = f"line {len(rows) + 1} of {path}"
            raise UserError(f"output: {where} is damaged; remove it and what follows") from None
        rows.append((row, end))
    return rows


def _kills() -> int | None:
    """How many processes this machine's kernel has killed for memory, where it says so."""
    with suppress(OSError, ValueError):
        words = Path("/proc/vmstat").read_text().split()
        return int(words[words.index("oom_kill") + 1])
    return None
