"""File names in a run's folder."""

from pathlib import Path

CONFIG, METRICS, ROLLOUTS = "config.yaml", "metrics.jsonl", "rollouts.jsonl"
HELD_OUT = "held-out.jsonl"  # which problems of stop_on are right after each update
CHECKPOINTS, STEP = "checkpoints", "step-"
# In a checkpoint. STATE: the optimizer's state. FACTS: its update, settings and checksum.
STATE, FACTS = "training_state.safetensors", "training_state.json"
# MARKER: exists while a process works in the folder. INPUTS: fingerprints of the model and the data
# of an evaluation, a selection or a study.
MARKER, INPUTS = "running.json", "asked.json"
REPORT = "report.html"
SUITES, SUITE = "suite", "suite.json"  # folder of a run's evaluation on a suite, and its results


def checkpoint_folder(run: Path, update: int) -> Path:
    """Return the folder of the checkpoint after an update."""
    return run / CHECKPOINTS / f"{STEP}{update:05d}"


def update_of(checkpoint: Path) -> int:
    """Return the update after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(STEP))


def newest_checkpoint(run: Path) -> Path | None:
    """Return a run's last checkpoint, if it has any."""
    return next(reversed(steps_in(run / CHECKPOINTS)), None)


def steps_in(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first."""
    folders = checkpoints.glob(f"{STEP}*")
    return sorted((f for f in folders if f.name.removeprefix(STEP).isdecimal()), key=update_of)
