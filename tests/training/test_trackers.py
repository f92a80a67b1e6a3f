"""TensorBoard gets what metrics.jsonl has, and a resumed run continues the same log."""

from importlib.metadata import PackageNotFoundError
from io import StringIO

import pytest
from accelerate import PartialState
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.tiny import read, run, settings

from em_kernels.cli import main
from em_kernels.training.config import TrainConfig, read_yaml
from em_kernels.training.runs import trackers
from em_kernels.training.runs.checkpoint import defining_settings
from em_kernels.training.runs.trackers import Tracking
from em_kernels.training.settings import UserError
from em_kernels.training.trainer import train


def logged(output):
    """Return the scalars by update, as TensorBoard reads them."""
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    rows = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            rows.setdefault(event.step, {})[name] = event.value
        steps = [event.step for event in events.Scalars(name)]
        assert len(set(steps)) == len(steps)
    return rows


def written(output):
    """Return metrics.jsonl's rows by update."""
    rows = {row.pop("update"): row for row in read(output / "metrics.jsonl")}
    return {update: {k: v for k, v in row.items() if v is not None} for update, row in rows.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for update, row in expected.items():
        assert found[update] == pytest.approx(row, rel=1e-6)  # TensorBoard keeps fp32


@pytest.mark.parametrize("answer", [None, "5"])
def test_tensorboard_has_what_metrics_have(answer, folder, tmp_path):
    output = tmp_path / "run"
    run(settings(folder, output, steps=3, answer=answer, report_to="tensorboard"))
    expected = written(output)
    assert ("accuracy" in expected[1]) == (answer is not None)
    assert_same(logged(output), expected)
    (hparams,) = (output / "tensorboard").glob("*/hparams.yml")
    text = hparams.read_text()
    assert "prompt: What is 2 + 3?" in text and "sampling.temperature: 1.0" in text


@pytest.mark.parametrize("save_optimizer", [True, False], ids=["from its state", "replayed"])
def test_a_resumed_run_goes_on_in_the_same_place(save_optimizer, folder, tmp_path):
    output = tmp_path / "run"
    changes = {"report_to": "tensorboard", "save_optimizer": save_optimizer}
    config = settings(folder, output, steps=2, **changes)
    run(config)
    first = written(output)
    train(config.model_copy(update={"steps": 4}), console=Console(file=StringIO()), resume=True)
    expected = written(output)
    assert list(expected) == [1, 2, 3, 4] and [expected[1], expected[2]] == list(first.values())
    assert_same(logged(output), expected)
    assert len(list((output / "tensorboard").glob("*/hparams.yml"))) == 1


def test_it_changes_no_number(folder, tmp_path):
    """The tracker may change when a run is resumed; an older run without the setting has none."""
    for name in ("none", "tensorboard"):
        run(settings(folder, tmp_path / name, report_to=name))
    plain, tracked = (tmp_path / name / "rollouts.jsonl" for name in ("none", "tensorboard"))
    assert plain.read_bytes() == tracked.read_bytes()
    assert not (tmp_path / "none" / "tensorboard").exists()
    configs = [TrainConfig(report_to=name) for name in ("none", "tensorboard")]
    assert defining_settings(configs[0]) == defining_settings(configs[1])
    output = tmp_path / "tensorboard"
    more = ["train", "--resume", str(output), "--steps", "3", "--report-to", "none"]
    assert main(more) == 0
    assert read_yaml(output / "config.yaml").report_to == "none"
    assert list(logged(output)) == [1, 2] and list(written(output)) == [1, 2, 3]
    path = output / "config.yaml"
    path.write_text(path.read_text().replace("report_to: none\n", ""))
    assert read_yaml(path).report_to == "none"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_refused_at_once(name, folder, tmp_path, monkeypatch, capfd):
    """The package is hidden if it is installed."""

    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(trackers, "version", version)
    output = tmp_path / "run"
    arguments = ["train", "--model", str(folder), "--prompt", "a", "--output", str(output)]
    assert main([*arguments, "--report-to", name]) == 2
    line = f"error: report_to: {name} is not installed; pip install {name}\n"
    assert capfd.readouterr().err.endswith(line) and not output.exists()


def test_one_that_does_not_start_is_told(folder, tmp_path):
    """The run can continue without it."""
    output = tmp_path / "run"
    config = settings(folder, output, steps=1)
    run(config)
    (output / "tensorboard").write_text("in the way")
    more = config.model_copy(update={"steps": 2, "report_to": "tensorboard"})
    with pytest.raises(UserError, match="report_to: tensorboard does not start: .* none$"):
        train(more, console=Console(file=StringIO()), resume=True)
    more = more.model_copy(update={"report_to": "none"})
    train(more, console=Console(file=StringIO()), resume=True)
    assert list(written(output)) == [1, 2]


def test_one_that_fails_later_is_given_up(tmp_path):
    said = StringIO()
    config = TrainConfig(output=tmp_path, report_to="tensorboard")
    PartialState()  # which find_ranks creates
    with Tracking(config, Console(file=said)) as tracking:
        tracking.start(0)
        tracking.log({"update": 1, "entropy": 0.5, "accuracy": None})
        tracking.log({"update": 2, "entropy": 10**400})
        tracking.log({"update": 3, "entropy": 0.25})
    assert said.getvalue().startswith("Warning: no more is logged to tensorboard: ")
    assert logged(tmp_path) == {1: {"entropy": 0.5}}
