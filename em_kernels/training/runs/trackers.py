"""Updates' metrics in TensorBoard, Weights & Biases or Trackio, through accelerate's trackers."""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from rich.console import Console

from ..config import TrainConfig
from ..settings import UserError, in_one_line


class Tracking:
    """A context in which a run's updates are logged where config.report_to says, if anywhere.

    Files lie in the run's folder, in tensorboard/ or wandb/; Trackio has its own place for all
    runs (TRACKIO_DIR). A resumed run goes on there; what it trains anew is not logged twice. wandb
    offline makes a folder for each process, all of one id.
    """

    def __init__(self, config: TrainConfig, console: Console) -> None:
        """Raises: UserError where the package is missing."""
        self.config, self.console = config, console
        self.tracker: Any = None
        try:
            if (name := config.report_to) != "none":
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
        settings = self.config.model_dump(mode="json")
        settings |= {f"sampling.{key}": value for key, value in settings.pop("sampling").items()}
        plain = (int, float, str)
        settings = {k: v if isinstance(v, plain) else json.dumps(v) for k, v in settings.items()}
        again = name == "tensorboard" and (output / name).exists()  # which would have them twice
        common = {"run_name": "em-kernels", "resume": "allow"}
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": name, "logging_dir": output},  # its folder
            "wandb": {"name": output.name, "dir": output, "id": _wandb_id(output / name), **common},
            "trackio": {"name": str(output), **common},
        }
        try:
            tracker = LOGGER_TYPE_TO_CLASS[name](**options[name])
            tracker.start()
            if not again:
                tracker.store_init_configuration(settings)
        except Exception as error:  # each raises its own kinds
            why = in_one_line(error)[:300]
            raise UserError(
                f"report_to: {name} does not start: {why}; mend that and --resume {output}, or go "
                "on with --report-to none"
            ) from error
        self.tracker = tracker

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics."""
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "update"}
        if row["update"] > self.done:
            self._or_give_up(lambda tracker: tracker.log(numbers, step=row["update"]))

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *error: object) -> None:
        self._or_give_up(lambda tracker: tracker.finish())

    def _or_give_up(self, work: Callable[[Any], object]) -> None:
        """A tracker that fails is given up, with a word; the run goes on."""
        try:
            if self.tracker is not None:
                work(self.tracker)
        except Exception as error:  # each raises its own kinds
            self.tracker = None
            line = f"Warning: no more is logged to {self.config.report_to}: {error}"
            self.console.print(line, markup=False, soft_wrap=True)


def _wandb_id(folder: Path) -> str | None:
    """Id of the wandb run to continue, if one was begun."""
    runs = sorted(folder.glob("*run-*-*"), key=lambda path: path.name.partition("run-")[2])
    return runs[-1].name.rpartition("-")[2] if runs else None
