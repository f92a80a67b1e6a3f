"""Names of what lies in a run's folder."""

from pathlib import Path

CONFIG, METRICS, ROLLOUTS = "config.yaml", "metrics.jsonl", "rollouts.jsonl"
CHECKPOINTS = "checkpoints"


def checkpoint_folder(run: Path, update: int) -> Path:
    """Where a run keeps the checkpoint of an update."""
    return run / CHECKPOINTS / f"step-{update:05d}"


def newest_checkpoint(run: Path) -> Path | None:
    """The last checkpoint of a run, if it has any."""
    return next(reversed(steps_in(run / CHECKPOINTS)), None)


def steps_in(checkpoints: Path) -> list[Path]:
    """Folders of checkpoints, the oldest first."""
    found = [path for path in checkpoints.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))
