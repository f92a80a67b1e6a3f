"""One run: sample, minimise the entropy of what was sampled, record it; resume, save, fail."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel

from ..ops.free_memory import peak_memory_gib
from .config import Sampling, TrainConfig
from .console import progress_on, update_line
from .data.grading import Grader
from .device_memory import halve_until_it_fits, is_out_of_memory
from .distributed import LaunchSpec, Ranks
from .engines import engine_of
from .engines.step import StepLoss
from .interrupts import Interrupted, StopRequest, doing
from .models.loading import architecture, load_model, tell_attention
from .planning.plan import Plan, cheaper
from .rollouts.sampling import Rollout, check_overflow, generate
from .run_folder import HELD_OUT, METRICS, ROLLOUTS, checkpoint_folder, update_of
from .runs import records
from .runs.checkpoint import defining_settings, newest_state, read_state, save_checkpoint
from .settings import UserError
from .stopping import doubts, held_out_metrics, why_stop_early
from .task import Task, prompt_indices

T = TypeVar("T")


@dataclass
class TrainResult:
    """Result of a run: its folder, its last checkpoint, one row of metrics per update."""

    output: Path
    checkpoint: Path | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)


class StoppedRun(NamedTuple):
    """State of a stopped run on disk."""

    update: int = 0  # the last one whose weights are in the checkpoint
    checkpoint: Path | None = None
    has_state: bool = False  # the checkpoint holds the optimizer's state
    metrics: Sequence[dict[str, Any]] = ()
    completions: Mapping[int, list[Rollout]] = {}


class Run:
    """A run in progress: its engine, its records, its checkpoints."""

    def __init__(
        self, asked: TrainConfig, plan: Plan, task: Task, console: Console, ranks: Ranks
    ) -> None:
        self.asked, self.config, self.plan = asked, plan.config, plan
        self.task, self.console, self.ranks = task, console, ranks
        self.result, self.grader = TrainResult(asked.output), Grader()
        self.recorded: dict[int, list[Rollout]] = {}  # completions to replay, by update
        self.stopped = StoppedRun()  # where this run resumes
        self.sizes = {name: getattr(plan.config, name) for name in ("micro_batch", "rollout_batch")}
        self.is_whole = True  # the weights are those of a finished update

    def load(self, model: PreTrainedModel | None) -> None:
        """Load model and engine; refuse what does not suit before anything is written."""
        config, task, ranks = self.config, self.task, self.ranks
        if (source := config.rollouts_from) is not None:
            self.recorded = ranks.from_main(lambda: self._completions_in(source))
            if len(self.recorded) < config.steps:
                found = f"{len(self.recorded)} whole updates of {config.steps}"
                raise UserError(f"rollouts_from: {source} holds {found}; lower steps")
        name = architecture(task.model_config)
        if model is None:
            # FSDP2 moves its parts to the device one after another.
            device = torch.device("cpu") if ranks.launch.engine == "fsdp2" else ranks.device
            with doing(f"loading {name}"), self.console.status(escape(f"loading {config.model}")):
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
            self.engine = engine_of(ranks.launch.engine)(model, task.tokenizer, config, ranks)
        if self.engine.config != config:
            why = "The prompt is computed for every row: this model's KV cache cannot share it."
            self.console.print(why, soft_wrap=True)
            self.config = self.engine.config

    def _prompts(self, update: int) -> list[list[int]]:
        """Return the prompt of each of an update's completions."""
        return [self.task.prompts[i] for i in prompt_indices(self.config, update)]

    def _completions_in(self, run: Path) -> dict[int, list[Rollout]]:
        """Read a run's completions of this task's prompts, by update."""
        vocab_size = self.task.model_config.get_text_config().vocab_size
        new = self.config.sampling.max_new_tokens
        return records.replayable(run, self.config.rollouts, self._prompts, vocab_size, new)

    def start(self, resume: bool) -> None:
        """Begin the run's folder; or restore its newest state, and completions sampled after it."""
        if not resume:
            self.ranks.from_main(self._begin)
            return
        self.stopped = stopped = self.ranks.from_main(self._find_stopped_run)
        # The recorded sizes may have been "auto", and may be halved again.
        self.asked = self.asked.model_copy(update=dict.fromkeys(self.sizes, "auto"))
        self.recorded |= stopped.completions
        self.result.checkpoint = stopped.checkpoint
        self.result.metrics = list(stopped.metrics[: stopped.update])
        if stopped.has_state and stopped.checkpoint is not None:
            self.engine.load(read_state(stopped.checkpoint))
        self._take_recorded_sizes(stopped.update)
        more = f"{len(stopped.completions) - stopped.update} more are trained again on their"
        told = f"Resuming after update {stopped.update}; {more} recorded completions."
        self.console.print(told, soft_wrap=True)

    def _find_stopped_run(self) -> StoppedRun:
        """Find where to resume, and cut off what the stopped run left half-written."""
        config, output = self.config, self.config.output
        completions = self._completions_in(output)
        metrics = records.read_metrics(output)[: len(completions)]
        state, refused = newest_state(output, self._defining())
        if state is not None and update_of(state) > len(metrics):
            refused.append(f"{state} cannot be resumed from: records before it are missing")
            state = None
        for line in refused:
            self.console.print(line, markup=False, soft_wrap=True)
        update, checkpoint = (0, None) if state is None else (update_of(state), state)
        has_ended = len(metrics) >= config.steps or why_stop_early(config, metrics)
        last = checkpoint_folder(output, len(metrics))
        if state is None and last.exists() and has_ended:
            update, checkpoint = len(metrics), last
        records.trim(output, rollouts_upto=len(completions), metrics_upto=len(metrics))
        records.write_config(output, config)
        return StoppedRun(update, checkpoint, state is not None, metrics, completions)

    def _take_recorded_sizes(self, update: int) -> None:
        """Use the batch sizes with which this update was trained before the stop."""
        for row in self.stopped.metrics:
            if row["update"] == update:
                self.sizes |= {name: row[name] for name in self.sizes if name in row}

    def _begin(self) -> None:
        # Again: only now is the folder locked to other processes.
        records.check_output(self.config.output)
        records.write_config(self.config.output, self.config.located())

    def _defining(self) -> dict[str, Any]:
        """Return the settings with which a checkpoint must have been made, to resume from it."""
        launch = self.ranks.launch
        several = {"ranks": launch.ranks, "engine": launch.engine}  # they change the last digits
        return defining_settings(self.config) | (several if launch != LaunchSpec() else {})

    def update(self, update: int, stop: StopRequest) -> None:
        """Sample completions and record them; compute the gradient; step; record the metrics."""
        config, ranks, start = self.config, self.ranks, time.perf_counter()
        self._take_recorded_sizes(update)
        with progress_on(self.console) as progress:
            title = f"update {update}/{config.steps}"
            bar = progress.add_task(f"{title} sampling", total=config.rollouts // ranks.count)
            prompts = self._prompts(update)
            seeds = [(config.seed, update, i) for i in range(config.rollouts)]
            rollouts = self.recorded.get(update)
            if rollouts is None:
                on_one = partial(progress.advance, bar)
                rollouts = self._sample(prompts, seeds, config.sampling, stop, on_one)
            sampled = time.perf_counter()
            accuracy = ranks.from_main(lambda: self._record(update, rollouts, stop))
            progress.update(bar, description=f"{title} training", completed=0)
            loss, norm = self._gradient(update, rollouts, stop)
            if update == 1 and not self.stopped.metrics:
                for doubt in doubts(config, accuracy, loss.entropy):
                    self.console.print(doubt, markup=False, soft_wrap=True)
            self.is_whole = False
            self.engine.step(norm)
        end = time.perf_counter()
        tokens, count = sum(len(r.response_ids) for r in rollouts), len(rollouts)
        row = {
            "update": update,
            **{k: x for k, x in loss._asdict().items() if k != "divergence" or config.kl_weight},
            "accuracy": accuracy,
            "grad_norm": norm,
            "tokens": tokens,
            "mean_length": tokens / count,
            "ended": sum(rollout.ended for rollout in rollouts) / count,
            "repetition": sum(records.repetition(r.response_ids) for r in rollouts) / count,
            "tokens_per_s": tokens / (end - start),
            "sampling_s": sampled - start,
            "training_s": end - sampled,
            "peak_memory_gib": max(ranks.gather(peak_memory_gib(ranks.device))),
            "planned_memory_gib": self.plan.allocated / 2**30,
            **self.sizes,
            **self.score_held_out(update, stop),
        }
        if update > len(self.stopped.metrics):
            ranks.from_main(lambda: records.append(config.output / METRICS, [row]))
        self.result.metrics.append(row)
        self.is_whole = True
        self.console.print(update_line(row, config.steps), soft_wrap=True)
        if warning := records.cut_off(rollouts):
            self.console.print(warning, soft_wrap=True)

    def score_held_out(self, update: int, stop: StopRequest) -> dict[str, float]:
        """Ask the problems of stop_on greedily, once after each update; return held_out_metrics."""
        problems, ranks, path = self.task.held_out, self.ranks, self.config.output / HELD_OUT
        if not problems:
            return {}
        rows = ranks.from_main(lambda: records.read_lines(path, "update"))
        known = {row["update"]: np.array(row["right"]) for row in rows}
        if update not in known:
            changes = {"temperature": 0.0, "repetition_penalty": 1.0}
            greedy = self.config.sampling.model_copy(update=changes)
            seeds = [(0, 0, 0)] * len(problems)
            with progress_on(self.console) as progress:
                bar = progress.add_task("held-out problems", total=len(problems) // ranks.count)
                on_one = partial(progress.advance, bar)
                rollouts = self._sample(self.task.held_out_prompts, seeds, greedy, stop, on_one)

            def grade() -> list[bool]:
                answers = [problem.answer for problem in problems]
                right = self._grade(self._texts(rollouts), answers, stop)
                records.append(path, [{"update": update, "right": right}])
                return right

            known[update] = np.array(ranks.from_main(grade))
        return held_out_metrics(known[0], known[update])

    def _texts(self, rollouts: Sequence[Rollout]) -> list[str]:
        responses = [rollout.response_ids for rollout in rollouts]
        return self.task.tokenizer.batch_decode(responses, skip_special_tokens=True)

    def _grade(
        self, texts: Sequence[str], answers: Sequence[str | None], stop: StopRequest
    ) -> list[bool]:
        pairs = list(zip(texts, answers, strict=True))
        return self.grader.grade(pairs, lambda _: stop.check())

    def _sample(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[tuple[int, ...]],
        sampling: Sampling,
        stop: StopRequest,
        on_one: Callable[[], object],
    ) -> list[Rollout]:
        """Sample a completion of each prompt, each rank its share; on_one is called for each."""
        ranks = self.ranks
        indices = range(ranks.index, len(prompts), ranks.count)
        done: dict[int, Rollout] = {}  # also of a batch that then ran out of memory

        def sample(batch_size: int) -> None:
            left = [i for i in indices if i not in done]

            def on_done(position: int, rollout: Rollout) -> None:
                done[left[position]] = rollout
                on_one()

            generate(
                self.engine.model,
                self.task.tokenizer,
                [prompts[i] for i in left],
                [seeds[i] for i in left],
                sampling,
                batch_size=batch_size,
                on_done=on_done,
                check=stop.check,
            )

        with self.engine.gathered_weights():
            ranks.together(lambda: self._fitting("rollout_batch", sample, 1))
        shares = ranks.gather([done[i] for i in indices])
        return [shares[i % ranks.count][i // ranks.count] for i in range(len(prompts))]

    def _gradient(
        self, update: int, rollouts: Sequence[Rollout], stop: StopRequest
    ) -> tuple[StepLoss, float]:
        """Compute the gradient of all ranks; return the loss and the gradient's norm.

        A gradient that overflows fp16 is computed anew with half its scale.
        """
        while True:
            loss = self._forward_backward(rollouts, stop)
            norm = self.engine.norm()
            if math.isfinite(norm):
                return loss, norm
            check_overflow(torch.tensor(loss.entropy), self.engine.model.dtype)
            if not self.engine.halve_scale():
                raise UserError(f"lr: the gradient of update {update} is not finite; lower it")
            told = "The gradient overflowed float16: trying again with half its scale."
            self.console.print(told, soft_wrap=True)

    def _forward_backward(self, rollouts: Sequence[Rollout], stop: StopRequest) -> StepLoss:
        """Compute the gradient and the loss of all ranks."""
        work = partial(self.engine.forward_backward, rollouts, check=stop.check)
        smallest = max(len(rollout.response_ids) for rollout in rollouts)
        if self.config.official_loss or not self.engine.retries:
            smallest = self.sizes["micro_batch"]  # no retry: it would change the loss, or fail
        part = self.ranks.together(lambda: self._fitting("micro_batch", work, smallest))
        return StepLoss(*self.ranks.total(part))

    def _fitting(self, name: str, work: Callable[[int], T], smallest: int) -> T:
        """Return work(size); halve a size that the user left "auto" where memory runs out."""

        def on_retry(size: int) -> None:
            self.sizes[name] = size
            self.console.print(f"Out of memory: trying again with {name} {size}.", soft_wrap=True)

        size = self.sizes[name]
        smallest = smallest if getattr(self.asked, name) == "auto" else size
        return halve_until_it_fits(work, size, smallest, on_retry)

    def _record(self, update: int, rollouts: Sequence[Rollout], stop: StopRequest) -> float | None:
        """Grade the completions and write them down; return their accuracy."""
        texts = self._texts(rollouts)
        answers = [self.task.problems[i].answer for i in prompt_indices(self.config, update)]
        right = self._grade(texts, answers, stop)
        rows = [
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
        if update > len(self.stopped.completions):
            records.append(self.config.output / ROLLOUTS, rows)
        graded = [r for r, a in zip(right, answers, strict=True) if a is not None]
        return sum(graded) / len(graded) if graded else None

    def save(self) -> None:
        """Save a checkpoint of the last update, unless there is one."""
        update = len(self.result.metrics)
        folder = checkpoint_folder(self.config.output, update)
        if folder == self.result.checkpoint:
            return
        with self.console.status(escape(f"writing {folder}")):
            state = self.engine.state() if self.config.save_optimizer else None
            facts = {"update": update, "settings": self._defining()}
            write, keep = self.engine.writer(), self.config.keep
            self.ranks.from_main(lambda: save_checkpoint(write, folder, state, facts, keep=keep))
        self.result.checkpoint = folder

    def failed(self, error: BaseException) -> BaseException:
        """Save the last finished update; return the error to raise, which says what was saved."""
        kept = "no update is finished"
        if self.result.metrics:
            kept = f"--resume {self.config.output} continues it"
        # Saving needs all ranks; only an interruption is known to have reached every one.
        together = self.ranks.count == 1 or isinstance(error, Interrupted)
        if self.result.metrics and self.is_whole and together:
            try:
                self.save()
                kept = f"{self.result.checkpoint} holds the last update"
            except UserError as full:
                error = full
        if isinstance(error, (Interrupted, UserError)):
            return type(error)(f"{error}; {kept}")
        if is_out_of_memory(error):
            sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
            asked = {name: getattr(self.asked, name) for name in self.sizes}
            on_cuda, engine = self.ranks.device.type == "cuda", self.ranks.launch.engine
            remedies = cheaper(self.config.model_copy(update=asked), on_cuda, engine)
            return UserError(f"out of memory with {sizes}; {kept}; use {', '.join(remedies)}")
        return error
