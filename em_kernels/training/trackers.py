"""Updates' metrics in TensorBoard, Weights & Biases or Trackio, through accelerate's trackers."""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from rich.console import Console

from .config import TrainConfig, UserError

PROJECT = "em-kernels"


class Tracking:
    """A context in which a run's updates are logged where config.report_to says, if anywhere.

    Files lie in the run's folder, in tensorboard/ or wandb/; Trackio has its own place for all
    runs (TRACKIO_DIR). A resumed run goes on there; what it trains anew is not logged twice. wandb
    offline makes a folder for each process, all of one id.
    """

    def __init__(self, config: TrainConfig, console: Console) -> None:
        """Raises: UserError where the package is missing."""
        self.config, self.console, self.done = config, console, 0
        self.tracker: Any = None
        if (name := config.report_to) == "none":
            return
        try:
            version(name)  # a folder of that name could be imported too
        except PackageNotFoundError:
            raise UserError(f"report_to: {name} is not installed; pip install {name}") from None

    def start(self, done: int) -> None:
        """Begin, or go on after so many updates whose metrics are recorded.

        Raises: UserError where the tracker does not start.
        """
        name, output, self.done = self.config.report_to, self.config.output, done
        if name == "none":
            return
        began = (output / name).exists()
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"logging_dir": output},
            "wandb": {"dir": output, "name": output.name, "id": _wandb_id(output / name)},
            "trackio": {"name": str(output)},
        }
        project = name if name == "tensorboard" else PROJECT  # its folder's name
        again = {} if name == "tensorboard" else {"resume": "allow"}
        try:
            tracker = LOGGER_TYPE_TO_CLASS[name](project, **options[name], **again)
            tracker.start()
            if name != "tensorboard" or not began:  # which would have them twice
                tracker.store_init_configuration(_settings(self.config))
        except Exception as error:  # each raises its own kinds
            why = " ".join(str(error).split())[:300]
            raise UserError(
                f"report_to: {name} does not start: {why}; mend that and --resume {output}, or go "
                "on with --report-to none"
            ) from error
        self.tracker = tracker

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics."""
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "update"}
        if self.tracker is not None and row["update"] > self.done:
            self._or_give_up(lambda: self.tracker.log(numbers, step=row["update"]))

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *error: object) -> None:
        if self.tracker is not None:
            self._or_give_up(self.tracker.finish)

    def _or_give_up(self, work: Callable[[], object]) -> None:
        """A tracker that fails is given up, with a word; the run goes on."""
        try:
            work()
        except Exception as error:  # each raises its own kinds
            self.tracker = None
            line = f"Warning: no more is logged to {self.config.report_to}: {error}"
            self.console.print(line, markup=False, soft_wrap=True)


def _settings(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Flat, of the kinds that trackers take."""
    values = config.model_dump(mode="json")
    values |= {f"sampling.{name}": value for name, value in values.pop("sampling").items()}
    plain = (bool, int, float, str)
    return {k: v if isinstance(v, plain) else json.dumps(v) for k, v in values.items()}


def _wandb_id(folder: Path) -> str | None:
    """Of the run that was begun there, if one was."""
    runs = sorted(folder.glob("*run-*-*"), key=lambda path: path.name.partition("run-")[2])
    return runs[-1].name.rpartition("-")[2] if runs else None
