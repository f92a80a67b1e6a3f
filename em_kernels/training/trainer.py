"""Train a model by One-shot Entropy Minimization."""

from contextlib import closing

import torch
from rich.console import Console
from transformers import PreTrainedModel

from .config import TrainConfig
from .console import Terminal
from .distributed import Ranks, find_ranks
from .interrupts import Interrupted, StopRequest, doing
from .models.loading import architecture
from .planning.plan import Plan
from .planning.planner import Planner
from .resume import recorded_prompts, recorded_settings, why_stop_early
from .run import Run, TrainResult
from .runs.records import Running, check_output
from .runs.trackers import Tracking
from .settings import UserError
from .task import Task, load_task


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
        model: config.model already loaded; trained in place.
        resume: continue the stopped run in output; what config leaves "auto" or None is as that run
            has it.
            On the same machine, with as many threads and processes, losses, norms and weights are
            bit for bit those of a run that never stopped; on a GPU as far as its attention's
            backward is deterministic.

    Raises:
        UserError: for settings that cannot work, before anything is written; for a full disk.
        Interrupted: after Ctrl-C, with a checkpoint of the last finished update.
    """
    ranks = find_ranks(config.device, config.rollouts)
    console = console or Terminal(stderr=True)
    if not ranks.is_main:
        console = Console(quiet=True)
    config, task, plan = ranks.from_main(lambda: _prepare(config, model, resume, ranks, console))
    run = Run(config, plan, task, console, ranks)
    try:
        run.load(model)
    except torch.OutOfMemoryError as error:
        raise run.failed(error) from error
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
            for update in range(run.stopped.update + 1, plan.config.steps + 1):
                if reason := why_stop_early(run.config, run.result.metrics):
                    console.print(f"Stopped early: {reason}.", soft_wrap=True)
                    break
                if running:
                    running.phase(f"update {update}")
                with doing(f"update {update} of {architecture(task.model_config)}"):
                    run.update(update, stop)
                tracking.log(run.result.metrics[-1])
                if update in plan.config.save_at:
                    run.save()
            run.save()
            ranks.together(stop.check)
        except (Exception, Interrupted) as error:
            raise run.failed(error) from (None if isinstance(error, UserError) else error)
    return run.result


def _prepare(
    config: TrainConfig, model: PreTrainedModel | None, resume: bool, ranks: Ranks, console: Console
) -> tuple[TrainConfig, Task, Plan]:
    """Return settings as asked, task, and a plan with nothing left "auto"; write nothing."""
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
    longest = max(map(len, task.prompts))
    loaded_bytes = 0 if model is None else sum(p.nbytes for p in model.parameters())
    what = f"planning memory of {architecture(task.model_config)}"
    with console.status("planning memory"), doing(what):
        planner = Planner(
            config, task.model_config, longest, ranks.device, 0, loaded_bytes, ranks.launch
        )
        plan = planner.resolve()
    plan.config.check_complete()
    return config, task, plan
