"""Files of a run besides its checkpoints: settings, metrics, completions, a running marker."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from ..rollouts.sampling import Rollout
from ..run_folder import CONFIG, INPUTS, MARKER, METRICS, ROLLOUTS
from ..settings import Settings, UserError

# Settings that may differ when an evaluation, a selection or a study is continued.
MAY_CHANGE = ("output", "batch_size", "device", "server", "parallel", "grader")
# Files of a process that was killed before it wrote any result.
OF_A_START = {MARKER, INPUTS, f".{INPUTS}.partial", f".{CONFIG}.partial"}


def check_output(output: Path, remedy: str = "choose another, or --resume it") -> None:
    """Raise UserError unless the folder is new, empty or what a killed start left."""
    if output.exists() and (not output.is_dir() or {*os.listdir(output)} - OF_A_START):
        raise UserError(f"output: {output} already holds a run or other files; {remedy}")


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append lines of JSON to a file, synced to disk."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with _writing(path), open(path, "ab") as file:
        file.write(data)


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically, synced to disk."""
    partial = path.parent / f".{path.name}.partial"
    try:
        with _writing(path):
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def write_config(run: Path, config: Settings) -> None:
    write_whole(run / CONFIG, config.to_yaml())


@contextmanager
def resumable(output: Path, config: Settings, **facts: str) -> Iterator[None]:
    """A context that writes in a new folder, or continues a stopped command in its own.

    UserError if that command had other settings or `facts`, texts that identify its inputs.
    """
    if not (output / CONFIG).exists():
        check_output(output, "choose another")
    with Running(output):
        if (output / CONFIG).exists():
            # A setting that is younger than the folder had its default's effect.
            before = type(config)().model_dump(mode="json")
            before |= yaml.safe_load((output / CONFIG).read_text(encoding="utf-8"))
            if what := differing(before, config.model_dump(mode="json"), ignored=MAY_CHANGE):
                why = f"was made with {what}; go on with that, or name another"
                raise UserError(f"output: {output} {why}")
            recorded = json.loads((output / INPUTS).read_text(encoding="utf-8"))
            for name in facts:
                if facts[name] != recorded.get(name):
                    why = f"is not what it was when {output} was begun; name another output"
                    raise UserError(f"{name}: {why}")
        else:
            write_whole(output / INPUTS, json.dumps(facts) + "\n")
            write_config(output, config)
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; the same command continues {output}") from None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a torn last line is left out, a missing file is empty."""
    return [row for row, _ in _rows(run / METRICS, "update")]


def read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """Return the rows of a file that will be appended to; a torn last line is cut off."""
    rows = _rows(path, key)
    _truncate(path, max((end for _, end in rows), default=0))
    return [row for row, _ in rows]


def read_rollouts(run: Path, rollouts: int) -> dict[int, list[Rollout]]:
    """Return the recorded completions by update; an update with fewer than all is left out."""
    path, completions = run / ROLLOUTS, list[Rollout]()
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
            place = f"completion {index} (of {rollouts}) of update {update}"
            why = f"line {number + 1} of {path} is not {place}"
            raise UserError(f"rollouts: {why}; set rollouts to as many as were sampled") from None
        completions.append(rollout)
    updates = len(completions) // rollouts
    return {i + 1: completions[i * rollouts :][:rollouts] for i in range(updates)}


def replayable(
    run: Path,
    count: int,
    prompts_of: Callable[[int], list[list[int]]],
    vocab_size: int,
    longest: int,
) -> dict[int, list[Rollout]]:
    """Return the recorded completions by update, `count` of each; refuse those of other prompts or
    settings.
    """
    recorded = read_rollouts(run, count)
    for update, rollouts in recorded.items():
        responses = [rollout.response_ids for rollout in rollouts]
        same_prompts = [rollout.prompt_ids for rollout in rollouts] == prompts_of(update)
        if not same_prompts or max(map(max, responses)) >= vocab_size:
            why = f"the completions in {run} are of another prompt, or another tokenizer"
            raise UserError(f"prompt: {why}; give the run's own")
        if (length := max(map(len, responses))) > longest:
            why = f"{longest} is less than the {length} tokens of a completion in {run}"
            raise UserError(f"sampling.max_new_tokens: {why}; give at least as many")
    return recorded


def trim(run: Path, *, rollouts_upto: int, metrics_upto: int) -> None:
    """Cut off the lines of later updates, and torn last lines."""
    for path, upto in ((run / ROLLOUTS, rollouts_upto), (run / METRICS, metrics_upto)):
        end = max((end for row, end in _rows(path, "update") if row["update"] <= upto), default=0)
        _truncate(path, end)


class Running:
    """A context that marks a run's folder as in use; `death` says if a process was killed there."""

    def __init__(self, run: Path) -> None:
        self.path = run / MARKER

    def __enter__(self) -> "Running":
        """Raises: UserError if another process works there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        except OSError as error:
            raise UserError(f"output: cannot write {self.path}: {error}") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lasts as long as the process
            if os.fstat(self.file.fileno()).st_nlink == 0:  # Another process has just removed it.
                raise BlockingIOError
        except BlockingIOError:
            self.file.close()
            why = f"another process works in {self.path.parent} now"
            raise UserError(f"output: {why}; wait, or name another") from None
        except OSError:  # The file system has no locks.
            pass
        self.death, self.kills = self._previous_death(), _oom_kills()
        self.phase("starting")
        return self

    def phase(self, name: str) -> None:
        """Record what the process is doing."""
        facts = {"pid": os.getpid(), "phase": name, "since": f"{datetime.now():%F %T}"}
        line = json.dumps({**facts, "kills": self.kills}).ljust(400)  # overwrites the previous line
        with suppress(OSError):  # A full disk is reported by the next write that matters.
            os.pwrite(self.file.fileno(), line.encode(), 0)

    def __exit__(self, *error: object) -> None:
        self.path.unlink(missing_ok=True)
        self.file.close()

    def _previous_death(self) -> str | None:
        if not (text := self.file.read()):
            return None
        facts = dict[str, Any]()
        with suppress(ValueError):  # A power failure may leave anything.
            facts = json.loads(text)
        cause = "most likely the kernel killed it for memory, or the machine went down"
        if (kills := (_oom_kills() or 0) - (facts.get("kills") or 0)) > 0:
            cause = f"the kernel has since killed {kills} for memory, most likely this one"
        return (
            f"Process {facts.get('pid')} died here without a message, in {facts.get('phase')} "
            f"since {facts.get('since')}: {cause}; if memory is short, a lower --host-memory, "
            "--moments bf16 or --offload-dir help"
        )


def differing(
    before: Mapping[str, Any], now: Mapping[str, Any], *, ignored: Sequence[str] = ()
) -> str | None:
    """Describe the first setting that changed; None if none did."""
    for name in [*now, *before]:
        old, new = before.get(name), now.get(name)
        if old != new and name not in ignored:
            return f"{name} {json.dumps(old)}, not {json.dumps(new)}"
    return None


def repetition(ids: Sequence[int]) -> float:
    """Return the fraction of 4-grams that occurred before."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def cut_off(rollouts: Sequence[Rollout]) -> str | None:
    """Return a warning if most completions did not end by themselves."""
    if (cut := sum(not rollout.ended for rollout in rollouts)) <= len(rollouts) / 2:
        return None
    advice = "raise sampling.max_new_tokens, or check sampling.stop"
    return f"Warning: {cut} of {len(rollouts)} completions were cut off; {advice}."


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _truncate(path: Path, end: int) -> None:
    if path.exists() and end < path.stat().st_size:
        with _writing(path):
            os.truncate(path, end)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
        sync(path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"output: cannot write {path}: {error}") from error


def _rows(path: Path, key: str) -> list[tuple[dict[str, Any], int]]:
    """Return each whole line's row, which needs a number at `key`, and the line's end in bytes."""
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


def _oom_kills() -> int | None:
    """Return how many processes this kernel has killed for memory; None if it does not say."""
    with suppress(OSError, ValueError):
        counters = Path("/proc/vmstat").read_text().split()
        return int(counters[counters.index("oom_kill") + 1])
    return None
