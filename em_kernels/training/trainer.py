"""One-shot Entropy Minimization: sample, minimise the entropy of what was sampled, repeat."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel

from ..ops.free_memory import peak_memory_gib
from .config import TrainConfig
from .console import Terminal, progress_on, update_line
from .data.grading import Grader
from .distributed import Ranks, find_ranks
from .engines import engine_of
from .engines.step import StepLoss
from .interrupts import Interrupted, StopRequest, doing
from .models.loading import architecture, load_model, tell_attention
from .planning.plan import Plan, cheaper
from .planning.planner import resolve
from .planning.sharded import CONTEXT
from .rollouts.sampling import Rollout, generate
from .run_folder import METRICS, ROLLOUTS, checkpoint_folder
from .runs.checkpoint import defining_settings, newest_state, read_state, save_checkpoint
from .runs.records import (
    Running,
    append,
    check_output,
    cut_off,
    read_metrics,
    repetition,
    replayable,
    trim,
    write_config,
)
from .runs.trackers import Tracking
from .settings import UserError
from .task import Task, as_recorded, as_sampled, load_task

T = TypeVar("T")


@dataclass
class TrainResult:
    """Result of a run: its folder, its last checkpoint, one row of metrics per update."""

    output: Path
    checkpoint: Path | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)


class _Before(NamedTuple):
    """State that a stopped run left on disk."""

    done: int = 0  # updates that the checkpoint holds
    checkpoint: Path | None = None
    is_state: bool = False  # to go on from
    metrics: Sequence[dict[str, Any]] = ()
    completions: dict[int, list[Rollout]] | None = None


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    model: PreTrainedModel | None = None,
    resume: bool = False,
) -> TrainResult:
    """Run One-shot EM; leave config.yaml, metrics.jsonl, rollouts.jsonl, checkpoints/ in output.

    Under `accelerate launch` or torchrun each process calls it alike; rank 0 writes, all return.

    Args:
        console: where progress goes; default stderr.
        model: config.model already loaded; trained in place.
        resume: output holds a run that was stopped; go on where it was. On the same machine, with
            as many threads and processes, losses, norms and weights are bit for bit those of a run
            that never stopped; on a GPU as far as its attention's backward repeats itself. What
            config leaves open is as that run has it.

    Raises:
        UserError: before anything is written, where the settings cannot work; or a full disk.
        Interrupted: after Ctrl-C, with a checkpoint of the last finished update.
    """
    ranks = find_ranks(config.device, config.rollouts)
    console = console or Terminal(stderr=True)
    if not ranks.is_main:
        console = Console(quiet=True)
    held = 0 if model is None else sum(p.nbytes for p in model.parameters())
    config, task, plan = ranks.from_main(lambda: _prepared(config, resume, ranks, held, console))
    run = _Run(config, plan, task, console, ranks)
    try:
        run.load(model)
    except torch.OutOfMemoryError as error:
        raise run.failed(error) from error
    own = config if ranks.is_main else config.model_copy(update={"report_to": "none"})
    with (
        closing(run.engine),
        run.grader,
        ranks.on_main(Running(config.output)) as running,
        StopRequest(patient=ranks.count > 1) as stop,
        Tracking(own, console) as tracking,
    ):
        if running and running.death:
            console.print(running.death, markup=False, soft_wrap=True)
        run.start(resume)
        tracking.start(run.measured)
        try:
            for update in range(run.first, plan.config.steps + 1):
                if reason := run.why_over():
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


def _prepared(
    config: TrainConfig, resume: bool, ranks: Ranks, held: int, console: Console
) -> tuple[TrainConfig, Task, Plan]:
    """Resolve settings, task and plan; nothing is written."""
    if resume:
        config = as_recorded(config)
    else:
        check_output(config.output)
    config.check_complete()
    Tracking(config, console)
    task = load_task(config)
    for run in (config.rollouts_from, config.output if resume else None):
        task = task if run is None else as_sampled(task, config, run)
    if config.chat_template and not task.chat_template:
        no_template = "The tokenizer has no chat template: the prompt is used as it is."
        console.print(no_template, soft_wrap=True)
    what = f"planning memory of {architecture(task.model_config)}"
    with console.status("planning memory"), doing(what):
        plan = resolve(
            config, task.model_config, max(map(len, task.prompts)), ranks.device, held, ranks.world
        )
    plan.config.check_complete()
    return config, task, plan


class _Run:
    """A run's parts, and what its updates do to them."""

    def __init__(
        self, asked: TrainConfig, plan: Plan, task: Task, console: Console, ranks: Ranks
    ) -> None:
        self.asked, self.config, self.plan = asked, plan.config, plan
        self.task, self.console, self.ranks = task, console, ranks
        self.picks = [i % len(task.prompts) for i in range(plan.config.rollouts)]
        self.completions_of = partial(
            replayable,
            prompts=[task.prompts[pick] for pick in self.picks],
            vocab_size=task.model_config.get_text_config().vocab_size,
            longest=plan.config.sampling.max_new_tokens,
        )
        self.result, self.grader = TrainResult(asked.output), Grader()
        self.recorded: dict[int, list[Rollout]] = {}
        self.first, self.written, self.measured = 1, 0, 0  # next; rollouts, metrics on disk
        self.sizes = {name: getattr(plan.config, name) for name in ("micro_batch", "rollout_batch")}
        self.past_sizes: dict[int, dict[str, int]] = {}  # of updates before the stop
        self.is_whole = True  # the weights are those of a finished update
        if ranks.device.type == "cuda":  # rather an error than a desktop's memory, or WSL's detour
            total = torch.cuda.get_device_properties(ranks.device).total_memory
            share = min(1.0, (plan.device_limit - CONTEXT) / total)  # of the allocator
            torch.cuda.set_per_process_memory_fraction(share, ranks.device)

    def load(self, model: PreTrainedModel | None) -> None:
        """Model, head, optimizer; whatever does not suit is refused, and nothing written."""
        config, task, ranks = self.config, self.task, self.ranks
        if config.rollouts_from is not None:
            self.recorded = ranks.from_main(partial(self.completions_of, config.rollouts_from))
            if len(self.recorded) < config.steps:
                raise UserError(
                    f"rollouts_from: {config.rollouts_from} holds {len(self.recorded)} whole "
                    f"updates of {config.steps}; lower steps"
                )
        name = architecture(task.model_config)
        if model is None:
            with doing(f"loading {name}"), self.console.status(escape(f"loading {config.model}")):
                fsdp = ranks.world.engine == "fsdp2"  # takes its parts one after another
                device = torch.device("cpu") if fsdp else ranks.device
                model = load_model(
                    task.source,
                    config.dtype,
                    config.attention,
                    device,
                    four_bit=config.four_bit,
                    named=config.model,
                )
        tell_attention(self.asked.attention, model, self.console)
        with doing(f"preparing {name}"):
            self.engine = engine_of(ranks.world.engine)(model, task.tokenizer, config, ranks)
        if self.engine.config != config:
            why = "The prompt is computed in every row: this model's cache asks it."
            self.console.print(why, soft_wrap=True)
            self.config = self.engine.config

    def start(self, resume: bool) -> None:
        """The folder; of a stopped run its newest whole state, and what it had sampled after it."""
        before = self.ranks.from_main(self._before if resume else self._begin)
        if not resume:
            return
        self.asked = self.asked.model_copy(update=dict.fromkeys(self.sizes, "auto"))  # if it was
        own, metrics, done = before.completions or {}, list(before.metrics), before.done
        self.written, self.measured = len(own), len(metrics)
        self.recorded |= own
        self.result.checkpoint = before.checkpoint
        if before.is_state and before.checkpoint is not None:
            self.engine.load(read_state(before.checkpoint))
        self.first, self.result.metrics = done + 1, metrics[:done]
        self.past_sizes = {
            row["update"]: {name: row[name] for name in self.sizes if name in row}
            for row in metrics
        }
        self.sizes |= self.past_sizes.get(done, {})
        self.console.print(
            f"Going on after update {done}; {self.written - done} more are trained anew on their "
            "recorded completions.",
            soft_wrap=True,
        )

    def _begin(self) -> _Before:
        check_output(self.config.output)  # once more, as no other process starts there any more
        write_config(self.config.output, self.config.located())
        return _Before()

    def _before(self) -> _Before:
        output = self.config.output
        own, metrics = self.completions_of(output), read_metrics(output)
        measured = min(len(own), len(metrics))
        metrics = metrics[:measured]
        last = self.folder(measured)
        state, refused = newest_state(output, self._defining())
        if state is not None and state.update > measured:
            refused.append(
                f"{state.checkpoint} cannot be resumed from: records before it are missing"
            )
            state = None
        for line in refused:
            self.console.print(line, markup=False, soft_wrap=True)
        done, checkpoint = state or (0, None)
        over = measured >= self.config.steps or self.why_over(metrics)
        if state is None and last.exists() and over:  # the end; nothing is left to do
            done, checkpoint = measured, last
        trim(output, rollouts_upto=len(own), metrics_upto=measured)
        write_config(output, self.config)
        return _Before(done, checkpoint, state is not None, metrics, own)

    def _defining(self) -> dict[str, Any]:
        return defining_settings(self.config) | self.ranks.describe()

    def update(self, update: int, stop: StopRequest) -> None:
        """One optimizer update and its records."""
        config, ranks, began = self.config, self.ranks, time.perf_counter()
        own = range(ranks.index, config.rollouts, ranks.count)
        self.sizes |= self.past_sizes.get(update, {})
        with progress_on(self.console) as progress:
            title = f"update {update}/{config.steps}"
            bar = progress.add_task(f"{title} sampling", total=len(own))

            def sample(batch_size: int) -> list[tuple[int, Rollout]]:
                progress.reset(bar)
                found = generate(
                    self.engine.model,
                    self.task.tokenizer,
                    [self.task.prompts[self.picks[i]] for i in own],
                    [(config.seed, update, i) for i in own],
                    config.sampling,
                    batch_size=batch_size,
                    on_done=lambda count: progress.advance(bar, count),
                    check=stop.check,
                )
                return list(zip(own, found, strict=True))

            def learn(micro_batch: int) -> StepLoss:
                return self.engine.forward_backward(rollouts, micro_batch, stop.check)

            rollouts = self.recorded.get(update) or []
            if not rollouts:
                with self.engine.gathered_weights():
                    mine = ranks.together(lambda: self._fitting("rollout_batch", sample, 1))
                shares = [dict(pairs) for pairs in ranks.gather(mine)]
                rollouts = [shares[i % ranks.count][i] for i in range(config.rollouts)]
            sampled = time.perf_counter()
            accuracy = ranks.from_main(lambda: self._record(update, rollouts, stop))
            progress.update(bar, description=f"{title} training", completed=0)
            least = max(len(rollout.response_ids) for rollout in rollouts)
            if config.official_loss or not self.engine.retries:  # it depends on the micro-batches
                least = self.sizes["micro_batch"]
            part = ranks.together(lambda: self._fitting("micro_batch", learn, least))
            loss = StepLoss(*ranks.total(part))
            norm = self.engine.norm()
            if not math.isfinite(norm):
                raise UserError(f"lr: the gradient of update {update} is not finite; lower it")
            self.is_whole = False
            self.engine.step(norm)
        now = time.perf_counter()
        tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        row = {
            "update": update,
            **loss._asdict(),
            "accuracy": accuracy,
            "grad_norm": norm,
            "tokens": tokens,
            "mean_length": tokens / len(rollouts),
            "ended": sum(rollout.ended for rollout in rollouts) / len(rollouts),
            "repetition": sum(repetition(r.response_ids) for r in rollouts) / len(rollouts),
            "tokens_per_s": tokens / (now - began),
            "sampling_s": sampled - began,
            "training_s": now - sampled,
            "peak_memory_gib": max(ranks.gather(peak_memory_gib(ranks.device))),
            "planned_memory_gib": self.plan.allocated / 2**30,
            **self.sizes,
        }
        if update > self.measured:
            ranks.from_main(lambda: append(config.output / METRICS, [row]))
        self.result.metrics.append(row)
        self.is_whole = True
        self.console.print(update_line(row, config.steps), soft_wrap=True)
        if warning := cut_off(rollouts):
            self.console.print(warning, soft_wrap=True)

    def _record(self, update: int, rollouts: Sequence[Rollout], stop: StopRequest) -> float | None:
        """Write the completions down, graded; returns their accuracy."""
        texts = self.task.tokenizer.batch_decode(
            [rollout.response_ids for rollout in rollouts], skip_special_tokens=True
        )
        answers = [self.task.problems[pick].answer for pick in self.picks]
        right = self.grader.grade(list(zip(texts, answers, strict=True)), lambda _: stop.check())
        records = [
            {
                "update": update,
                "index": index,
                "prompt_ids": rollout.prompt_ids,
                "response_ids": rollout.response_ids,
                "ended": rollout.ended,
                "correct": None if answers[index] is None else right[index],
                "text": text,
            }
            for index, (rollout, text) in enumerate(zip(rollouts, texts, strict=True))
        ]
        if update > self.written:
            append(self.config.output / ROLLOUTS, records)
        graded = [right[i] for i, answer in enumerate(answers) if answer is not None]
        return sum(graded) / len(graded) if graded else None

    def _fitting(self, name: str, work: Callable[[int], T], least: int) -> T:
        """work(size), from the start with half the size where memory runs out and the size is not
        the user's.
        """
        while True:
            try:
                return work(self.sizes[name])
            except torch.OutOfMemoryError:
                if getattr(self.asked, name) != "auto" or self.sizes[name] <= least:
                    raise
            torch.cuda.empty_cache()
            self.sizes[name] //= 2
            once_more = f"Out of memory: once more with {name} {self.sizes[name]}."
            self.console.print(once_more, soft_wrap=True)

    def why_over(self, metrics: Sequence[dict[str, Any]] | None = None) -> str:
        """Why the last update was one to stop after, if it was."""
        rows, config = self.result.metrics if metrics is None else metrics, self.config
        if rows and rows[-1]["entropy"] < config.stop_below * rows[0]["entropy"]:
            return f"entropy below {config.stop_below:g} of its start"
        if rows and rows[-1]["repetition"] > config.stop_repetition:
            return f"more than {config.stop_repetition:g} of the 4-grams repeat"
        return ""

    def folder(self, update: int) -> Path:
        """Folder of the checkpoint of an update."""
        return checkpoint_folder(self.config.output, update)

    def save(self) -> None:
        """A checkpoint of the last update, unless there is one."""
        done = len(self.result.metrics)
        if (folder := self.folder(done)) == self.result.checkpoint:
            return
        with self.console.status(escape(f"writing {folder}")):
            state = self.engine.state() if self.config.save_optimizer else None
            facts = {"update": done, "settings": self._defining()}
            write, keep = self.engine.writer(), self.config.keep
            self.ranks.from_main(lambda: save_checkpoint(write, folder, state, facts, keep=keep))
        self.result.checkpoint = folder

    def failed(self, error: BaseException) -> BaseException:
        """Save the last finished update, and return the error to raise."""
        kept = "no update yet"
        if self.result.metrics:
            kept = f"--resume {self.config.output} goes on"
        # that of many processes tells nobody else that it failed, but that all are interrupted
        together = self.ranks.count == 1 or isinstance(error, Interrupted)
        if self.result.metrics and self.is_whole and together:
            try:
                self.save()
                kept = f"{self.result.checkpoint} holds the last update"
            except UserError as full:
                error = full
        if isinstance(error, (Interrupted, UserError)):
            return type(error)(f"{error}; {kept}")
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
            asked = {name: getattr(self.asked, name) for name in self.sizes}  # "auto" stays
            options = cheaper(
                self.config.model_copy(update=asked), self.ranks.device.type == "cuda"
            )
            remedies = ", ".join(flag for flag, _ in options)
            return UserError(f"out of memory with {sizes}; {kept}; use {remedies}")
        return error
