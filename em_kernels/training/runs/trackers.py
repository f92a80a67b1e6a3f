"""Logging of metrics to TensorBoard, Weights & Biases or Trackio, by accelerate's trackers."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from rich.console import Console

from ..config import TrainConfig
from ..settings import UserError, in_one_line


class Tracking(AbstractContextManager["Tracking"]):
    """A context in which metrics are logged to config.report_to, if any, in a folder of the run's
    (Trackio: in TRACKIO_DIR). A resumed run continues the same log, and repeats no update.
    """

    def __init__(self, config: TrainConfig, console: Console) -> None:
        """Raises: UserError if the tracker's package is not installed."""
        self.config, self.console = config, console
        self.tracker: Any = None
        try:
            if (name := config.report_to) != "none":
                version(name)  # An import could find a folder of that name.
        except PackageNotFoundError:
            raise UserError(f"report_to: {name} is not installed; pip install {name}") from None

    def start(self, done: int) -> None:
        """Start the log, or continue it after `done` updates; UserError if that fails."""
        name, output, self.done = self.config.report_to, self.config.output, done
        if name == "none":
            return
        settings, plain = self.config.flat(), (int, float, str)
        settings |= {k: json.dumps(v) for k, v in settings.items() if not isinstance(v, plain)}
        # TensorBoard would list the settings of a resumed run twice.
        listed = name == "tensorboard" and (output / name).exists()
        common = {"run_name": "em-kernels", "resume": "allow"}
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": name, "logging_dir": output},
            "wandb": {"name": output.name, "dir": output, "id": _wandb_id(output / name), **common},
            "trackio": {"name": str(output), **common},
        }
        try:
            tracker = LOGGER_TYPE_TO_CLASS[name](**options[name])
            tracker.start()
            if not listed:
                tracker.store_init_configuration(settings)
        except Exception as error:  # Each tracker raises its own kinds.
            why = f"{name} does not start: {in_one_line(error)[:300]}"
            remedy = f"fix that and --resume {output}, or go on with --report-to none"
            raise UserError(f"report_to: {why}; {remedy}") from error
        self.tracker = tracker

    def log(self, row: dict[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "update"}
        if row["update"] > self.done:
            self._or_give_up(lambda tracker: tracker.log(numbers, step=row["update"]))

    def __exit__(self, *error: object) -> None:
        self._or_give_up(lambda tracker: tracker.finish())

    def _or_give_up(self, work: Callable[[Any], object]) -> None:
        """Use the tracker; one that fails is given up with a warning, and the run goes on."""
        try:
            if self.tracker is not None:
                work(self.tracker)
        except Exception as error:  # Each tracker raises its own kinds.
            self.tracker = None
            line = f"Warning: no more is logged to {self.config.report_to}: {error}"
            self.console.print(line, markup=False, soft_wrap=True)


def _wandb_id(folder: Path) -> str | None:
    """Return the id of the wandb run to continue, if there is one."""
    runs = sorted(folder.glob("*run-*-*"), key=lambda path: path.name.partition("run-")[2])
    return runs[-1].name.rpartition("-")[2] if runs else None
