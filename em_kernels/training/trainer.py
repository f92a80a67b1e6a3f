"""Train a model by One-shot Entropy Minimization."""

from contextlib import closing
from pathlib import Path
from weakref import WeakSet

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from .config import TrainConfig, read_yaml
from .console import Terminal
from .data.columns import texts_of
from .device_memory import let_segments_grow, limited_memory
from .distributed import Ranks, find_ranks
from .interrupts import Interrupted, StopRequest, doing
from .models.loading import architecture
from .planning.components import CONTEXT_BYTES
from .planning.plan import Plan
from .planning.planner import Planner
from .run import Run, TrainResult
from .run_folder import CONFIG
from .runs.checkpoint import defining_settings
from .runs.records import Running, check_output, differing, read_rollouts
from .runs.trackers import Tracking
from .settings import UserError
from .stopping import why_stop_early
from .task import Task, load_task

TRAINED: WeakSet[nn.Module] = WeakSet()  # models that train() was given


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    model: PreTrainedModel | None = None,
    resume: bool = False,
) -> TrainResult:
    """Run One-shot EM; leave config.yaml, metrics.jsonl, rollouts.jsonl, checkpoints/ in output.

    Under `accelerate launch` or torchrun every process makes the same call and gets the result;
    rank 0 writes.

    Args:
        console: where progress goes; default stderr.
        model: config.model already loaded; trained in place. A resumed run takes one that no run
            has trained.
        resume: continue the stopped run in output; settings that config leaves "auto" or None are
            taken from that run.
            On the same machine, with as many threads and processes, losses, norms and weights are
            bit for bit those of a run that never stopped; on a GPU as far as its attention's
            backward is deterministic.

    Raises:
        UserError: for settings that cannot work, before anything is written; for a full disk.
        Interrupted: after Ctrl-C, with a checkpoint of the last finished update.
    """
    let_segments_grow()
    ranks = find_ranks(config.device, config.rollouts)
    console = (console or Terminal(stderr=True)) if ranks.is_main else Console(quiet=True)
    config, task, plan = ranks.from_main(lambda: _prepare(config, model, resume, ranks, console))
    run = Run(config, plan, task, console, ranks)
    with limited_memory(ranks.device, plan.device_limit - CONTEXT_BYTES):
        try:
            if model is not None:
                TRAINED.add(model)
            run.load(model)
        except torch.OutOfMemoryError as error:
            raise run.failed(error) from error
        _carry_out(run, resume)
    return run.result


def _carry_out(run: Run, resume: bool) -> None:
    """Train a loaded run to its end."""
    config, console, ranks = run.asked, run.console, run.ranks
    tracked = config if ranks.is_main else config.model_copy(update={"report_to": "none"})
    with (
        closing(run.engine),
        run.grader,
        ranks.on_main(Running(config.output)) as running,
        StopRequest(patient=ranks.count > 1) as stop,
        Tracking(tracked, console) as tracking,
    ):
        if running and running.death:
            console.print(running.death, markup=False, soft_wrap=True)
        run.start(resume)
        tracking.start(len(run.stopped.metrics))
        try:
            if run.stopped.update == 0:
                run.score_held_out(0, stop)
            for update in range(run.stopped.update + 1, config.steps + 1):
                if reason := why_stop_early(run.config, run.result.metrics):
                    console.print(f"Stopped early: {reason}.", soft_wrap=True)
                    break
                if running:
                    running.phase(f"update {update}")
                with doing(f"update {update} of {architecture(run.task.model_config)}"):
                    run.update(update, stop)
                tracking.log(run.result.metrics[-1])
                if update in config.save_at:
                    run.save()
            run.save()
            ranks.together(stop.check)
        except (Exception, Interrupted) as error:
            raise run.failed(error) from (None if isinstance(error, UserError) else error)


def _prepare(
    config: TrainConfig, model: PreTrainedModel | None, resume: bool, ranks: Ranks, console: Console
) -> tuple[TrainConfig, Task, Plan]:
    """Return settings as asked, task, and a plan with nothing left "auto"; write nothing."""
    if resume and model in TRAINED:
        why = "a run in this process has trained it; leave it out, and it is loaded again"
        raise UserError(f"model: {why}")
    if resume:
        config = recorded_settings(config)
    else:
        check_output(config.output)
    config.check_complete()
    Tracking(config, console)  # raises if the tracker's package is missing
    task = load_task(config)
    for run in (config.rollouts_from, config.output if resume else None):
        task = task if run is None else recorded_prompts(task, config, run)
    if config.chat_template and not task.chat_template:
        no_template = "The tokenizer has no chat template: the prompt is used as it is."
        console.print(no_template, soft_wrap=True)
    longest = max(map(len, task.prompts + task.held_out_prompts))
    loaded_bytes = 0 if model is None else sum(p.nbytes for p in model.parameters())
    what = f"planning memory of {architecture(task.model_config)}"
    with console.status("planning memory"), doing(what):
        device, launch = ranks.device, ranks.launch
        planner = Planner(config, task.model_config, longest, device, 0, loaded_bytes, launch)
        plan = planner.resolve()
    plan.config.check_complete()
    return config, task, plan


def recorded_settings(config: TrainConfig) -> TrainConfig:
    """Return config, with settings that are "auto" or None taken from the run in its output.

    Raises: UserError if the other settings would change the run's numbers.
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
    same_prompts = config.fresh_prompts is None  # in every update
    recorded = read_rollouts(run, config.rollouts) if has_date and same_prompts else {}
    if not recorded:
        return task
    prompts = [rollout.prompt_ids for rollout in recorded[1][: len(task.prompts)]]
    texts = task.tokenizer.batch_decode(prompts)
    pairs = zip(task.problems, texts, strict=True)
    same = all(part.strip() in text for p, text in pairs for part in texts_of(p.prompt))
    return task._replace(prompts=prompts) if same else task  # other prompts are refused later
