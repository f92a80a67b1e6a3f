"""Resume a stopped run: its settings, its prompts, and what it left on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from .config import TrainConfig, read_yaml
from .data.problems import texts_of
from .rollouts.sampling import Rollout
from .run_folder import CONFIG, checkpoint_folder, update_of
from .runs.checkpoint import defining_settings, newest_state
from .runs.records import differing, read_metrics, read_rollouts, trim, write_config
from .settings import UserError
from .task import Task


class StoppedRun(NamedTuple):
    """What a stopped run left on disk."""

    update: int = 0  # the last one whose weights are in the checkpoint
    checkpoint: Path | None = None
    has_state: bool = False  # the checkpoint holds the optimizer's state
    metrics: Sequence[dict[str, Any]] = ()
    completions: Mapping[int, list[Rollout]] = {}


def recorded_settings(config: TrainConfig) -> TrainConfig:
    """Return config, with what it leaves "auto" or None as the run in config.output has it.

    Raises: UserError where there is no run, or a setting would change its numbers.
    """
    recorded = read_yaml(config.output / CONFIG)
    kept = {name: value for name, value in recorded if getattr(config, name) in ("auto", None)}
    kept["share_prefix"] = config.share_prefix and recorded.share_prefix
    config = config.model_copy(update=kept)
    if what := differing(defining_settings(recorded), defining_settings(config)):
        raise UserError(f"resume: the run was made with {what}; go on with that, or start another")
    return config


def recorded_prompts(task: Task, config: TrainConfig, run: Path) -> Task:
    """Return the task with the prompts of a run's completions, where they differ only by the date.

    Some chat templates, such as Llama's, write today's date into the prompt.
    """
    has_date = task.chat_template and "strftime_now" in str(task.tokenizer.chat_template)
    recorded = read_rollouts(run, config.rollouts) if has_date else {}
    if not recorded:
        return task
    prompts = [rollout.prompt_ids for rollout in recorded[1][: len(task.prompts)]]
    texts = task.tokenizer.batch_decode(prompts)
    pairs = zip(task.problems, texts, strict=True)
    same = all(part.strip() in text for p, text in pairs for part in texts_of(p.prompt))
    return task._replace(prompts=prompts) if same else task  # other prompts are refused later


def find_stopped_run(
    config: TrainConfig,
    completions: Mapping[int, list[Rollout]],
    settings: Mapping[str, Any],
    console: Console,
) -> StoppedRun:
    """Find where to resume the run in config.output, and cut off what it left half-written.

    Args:
        completions: the run's own, by update.
        settings: those that a checkpoint must have been made with.
    """
    output = config.output
    metrics = read_metrics(output)[: len(completions)]
    state, refused = newest_state(output, settings)
    if state is not None and update_of(state) > len(metrics):
        refused.append(f"{state} cannot be resumed from: records before it are missing")
        state = None
    for line in refused:
        console.print(line, markup=False, soft_wrap=True)
    update, checkpoint = (0, None) if state is None else (update_of(state), state)
    has_ended = len(metrics) >= config.steps or why_stop_early(config, metrics)
    last = checkpoint_folder(output, len(metrics))
    if state is None and last.exists() and has_ended:
        update, checkpoint = len(metrics), last
    trim(output, rollouts_upto=len(completions), metrics_upto=len(metrics))
    write_config(output, config)
    return StoppedRun(update, checkpoint, state is not None, metrics, completions)


def why_stop_early(config: TrainConfig, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return the reason to stop after the last of these updates, or an empty string."""
    if metrics and metrics[-1]["entropy"] < config.stop_below * metrics[0]["entropy"]:
        return f"entropy below {config.stop_below:g} of its start"
    if metrics and metrics[-1]["repetition"] > config.stop_repetition:
        return f"more than {config.stop_repetition:g} of the 4-grams repeat"
    return ""
