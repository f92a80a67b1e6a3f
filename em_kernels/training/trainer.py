"""One-shot Entropy Minimization: sample, minimise the entropy of what was sampled, repeat."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel

from ..functional import entropy_loss_into
from ..hf import check_head, head_of
from .checkpoint import defining_settings, newest_state, read_state, save_checkpoint, write_model
from .config import TrainConfig, UserError
from .grading import Grader
from .memory import CONTEXT, resolve
from .optimizer import MasterAdamW
from .plan import Plan, cheaper
from .records import (
    Running,
    append,
    check_output,
    cut_off,
    read_metrics,
    read_rollouts,
    repetition,
    trim,
    write_config,
)
from .rollout import Rollout, check_cache, generate
from .session import Interrupted, StopRequest, line_of, peak_memory_gib, progress_on
from .setup import Task, as_recorded, find_device, load_model, load_task
from .step import StepLoss, can_share_prefix, entropy_step
from .trackers import Tracking

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class TrainResult:
    """What a run left: its folder, its last checkpoint, a row of metrics for each update."""

    output: Path
    checkpoint: Path | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    model: PreTrainedModel | None = None,
    resume: bool = False,
) -> TrainResult:
    """Run One-shot EM; leave config.yaml, metrics.jsonl, rollouts.jsonl, checkpoints/ in output.

    Args:
        console: where progress goes; default stderr.
        model: config.model already loaded; trained in place.
        resume: output holds a run that was stopped; go on where it was. On the same machine, with
            as many threads, losses, norms and weights are bit for bit those of a run that never
            stopped; on a GPU as far as its attention's backward repeats itself. What config leaves
            open is as that run has it.

    Raises:
        UserError: before anything is written, where the settings cannot work; or a full disk.
        Interrupted: after Ctrl-C, with a checkpoint of the last finished update.
    """
    console = console or Console(stderr=True)
    if resume:
        config = as_recorded(config)
    else:
        check_output(config.output)
    config.check_complete()
    tracking = Tracking(config, console)
    device = find_device(config)
    task = load_task(config)
    if config.chat_template and not task.chat_template:
        console.print("The tokenizer has no chat template: the prompt is used as it is.")
    with console.status("planning memory"):
        held = 0 if model is None else sum(p.nbytes for p in model.parameters())
        plan = resolve(config, task.model_config, max(map(len, task.prompts)), device, held)
    plan.config.check_complete()
    run = _Run(config, plan, task, console, device)
    try:
        run.load(model)
    except torch.OutOfMemoryError as error:
        raise run.failed(error) from error
    with (
        closing(run.optimizer),
        run.grader,
        Running(config.output) as running,
        StopRequest() as stop,
        tracking,
    ):
        if running.death:
            console.print(running.death, markup=False, soft_wrap=True)
        run.start(resume)
        tracking.start(run.measured)
        try:
            for update in range(run.first, plan.config.steps + 1):
                if reason := run.why_over():
                    console.print(f"Stopped early: {reason}.")
                    break
                running.phase(f"update {update}")
                run.update(update, stop)
                tracking.log(run.result.metrics[-1])
                if update in plan.config.save_at:
                    run.save()
            run.save()
            stop.check()
        except (Exception, Interrupted) as error:
            raise run.failed(error) from (None if isinstance(error, UserError) else error)
    return run.result


class _Run:
    """A run's parts, and what its updates do to them."""

    def __init__(
        self, asked: TrainConfig, plan: Plan, task: Task, console: Console, device: torch.device
    ) -> None:
        self.asked, self.config, self.plan = asked, plan.config, plan
        self.task, self.console, self.device = task, console, device
        self.picks = [i % len(task.prompts) for i in range(plan.config.rollouts)]
        self.result, self.grader = TrainResult(asked.output), Grader()
        self.recorded: dict[int, list[Rollout]] = {}
        self.first, self.written, self.measured = 1, 0, 0  # next; rollouts, metrics on disk
        self.sizes = {name: getattr(plan.config, name) for name in ("micro_batch", "rollout_batch")}
        self.past_sizes: dict[int, dict[str, int]] = {}  # of updates before the stop
        self.is_whole = True  # the weights are those of a finished update
        if device.type == "cuda":  # rather an error than a desktop's memory, or WSL's detour
            total = torch.cuda.get_device_properties(device).total_memory
            share = min(1.0, (plan.device_limit - CONTEXT) / total)  # of the allocator
            torch.cuda.set_per_process_memory_fraction(share, device)

    def load(self, model: PreTrainedModel | None) -> None:
        """Model, head, optimizer; whatever does not suit is refused, and nothing written."""
        config, task = self.config, self.task
        if config.rollouts_from is not None:
            self.recorded = self.completions_in(config.rollouts_from)
            if len(self.recorded) < config.steps:
                raise UserError(
                    f"rollouts_from: {config.rollouts_from} holds {len(self.recorded)} whole "
                    f"updates of {config.steps}; lower steps"
                )
        if model is None:
            with self.console.status(escape(f"loading {config.model}")):
                model = load_model(task.source, config, self.device)
        if config.mode == "lora":  # before any forward, see there
            from .lora import add_adapters, write_adapter  # peft takes seconds

            self.write = write_adapter(add_adapters(model, config), task.tokenizer)
        else:
            self.write = write_model(model.requires_grad_(True), task.tokenizer)
        try:
            self.head = head_of(model)
            check_head(model, self.head)
            check_cache(model)
            token = self.head.weight.new_zeros(1, self.head.weight.shape[1])
            entropy_loss_into(  # chunk_bytes
                None, token, self.head.weight.detach(), chunk_bytes=config.chunk_bytes
            )
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        self.model = model.eval()  # no dropout
        if config.share_prefix and not can_share_prefix(model):
            self.console.print("The prompt is computed in every row: this model's cache asks it.")
            self.config = config = config.model_copy(update={"share_prefix": False})
        assert config.lr is not None
        self.optimizer = MasterAdamW(
            model.named_parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            clip=config.clip,
            device=torch.device("cpu") if config.mode == "offload" else self.device,
            moments=DTYPES[config.moments],
            gradients=DTYPES[config.gradients],
            folder=config.offload_dir if config.mode == "offload" else None,
        )

    def completions_in(self, run: Path) -> dict[int, list[Rollout]]:
        """Of each whole update of a run of the same prompts."""
        config, prompts = self.config, [self.task.prompts[pick] for pick in self.picks]
        words = self.task.model_config.get_text_config().vocab_size
        found = read_rollouts(run, config.rollouts)
        for rollouts in found.values():
            responses = [rollout.response_ids for rollout in rollouts]
            if [r.prompt_ids for r in rollouts] != prompts or max(map(max, responses)) >= words:
                raise UserError(
                    f"prompt: the completions in {run} are of another prompt, or another tokenizer"
                )
            if (longest := max(map(len, responses))) > config.sampling.max_new_tokens:
                raise UserError(
                    f"sampling.max_new_tokens: completions in {run} have {longest}; give as many"
                )
        return found

    def start(self, resume: bool) -> None:
        """The folder; of a stopped run its newest whole state, and what it had sampled after it."""
        config, output, done = self.config, self.config.output, 0
        if not resume:
            check_output(output)  # once more, as no other process starts there any more
            write_config(output, config)
            return
        self.asked = self.asked.model_copy(update=dict.fromkeys(self.sizes, "auto"))  # if it was
        own, metrics = self.completions_in(output), read_metrics(output)
        self.written, self.measured = len(own), min(len(own), len(metrics))
        self.recorded |= own
        self.result.metrics = metrics[: self.measured]
        last = self.folder(self.measured)
        state, refused = newest_state(output, defining_settings(config))
        if state is not None and state[0] > self.measured:
            refused.append(f"{state[1]} cannot be resumed from: records before it are missing")
            state = None
        for line in refused:
            self.console.print(line, markup=False, soft_wrap=True)
        if state is not None:
            done, self.result.checkpoint = state
            self.optimizer.load(read_state(self.result.checkpoint))
        elif last.exists() and (self.measured >= config.steps or self.why_over()):
            done, self.result.checkpoint = self.measured, last  # the end; nothing is left to do
        self.first, self.result.metrics = done + 1, metrics[:done]
        self.past_sizes = {
            row["update"]: {name: row[name] for name in self.sizes if name in row}
            for row in metrics
        }
        self.sizes |= self.past_sizes.get(done, {})
        trim(output, rollouts_upto=self.written, metrics_upto=self.measured)
        write_config(output, config)
        self.console.print(
            f"Going on after update {done}; {self.written - done} more are trained anew on their "
            "recorded completions."
        )

    def update(self, update: int, stop: StopRequest) -> None:
        """One optimizer update and its records."""
        config, task, began = self.config, self.task, time.perf_counter()
        self.sizes |= self.past_sizes.get(update, {})
        with progress_on(self.console) as progress:
            title = f"update {update}/{config.steps}"
            bar = progress.add_task(f"{title} sampling", total=config.rollouts)

            def sample(batch_size: int) -> list[Rollout]:
                progress.reset(bar)
                return generate(
                    self.model,
                    task.tokenizer,
                    [task.prompts[pick] for pick in self.picks],
                    [(config.seed, update, i) for i in range(config.rollouts)],
                    config.sampling,
                    batch_size=batch_size,
                    on_done=lambda count: progress.advance(bar, count),
                    check=stop.check,
                )

            rollouts = self.recorded.get(update) or self._fitting("rollout_batch", sample, 1)
            sampled = time.perf_counter()
            records = self._records(update, rollouts, stop)
            if update > self.written:
                append(config.output / "rollouts.jsonl", records)
            progress.update(bar, description=f"{title} training", completed=0)

            def learn(micro_batch: int) -> StepLoss:
                self.optimizer.clear()
                return entropy_step(
                    self.model,
                    self.head,
                    rollouts,
                    config,
                    self.optimizer,
                    micro_batch,
                    stop.check,
                )

            longest = max(len(rollout.response_ids) for rollout in rollouts)
            if config.official_loss:  # which depends on the micro-batches
                longest = self.sizes["micro_batch"]
            loss = self._fitting("micro_batch", learn, longest)
            norm = self.optimizer.norm()
            if not math.isfinite(norm):
                raise UserError(f"lr: the gradient of update {update} is not finite; lower it")
            self.is_whole = False
            self.optimizer.step(norm)
        now = time.perf_counter()
        graded = [record["correct"] for record in records if record["correct"] is not None]
        tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        row = {
            "update": update,
            "entropy": loss.entropy,
            "accuracy": sum(graded) / len(graded) if graded else None,
            "grad_norm": norm,
            "active_share": loss.active_share,
            "dropped_share": loss.dropped_share,
            "tokens": tokens,
            "mean_length": tokens / len(rollouts),
            "ended": sum(rollout.ended for rollout in rollouts) / len(rollouts),
            "repetition": sum(repetition(r.response_ids) for r in rollouts) / len(rollouts),
            "tokens_per_s": tokens / (now - began),
            "sampling_s": sampled - began,
            "training_s": now - sampled,
            "peak_memory_gib": peak_memory_gib(self.device),
            "planned_memory_gib": self.plan.allocated / 2**30,
            **self.sizes,
        }
        if update > self.measured:
            append(config.output / "metrics.jsonl", [row])
        self.result.metrics.append(row)
        self.is_whole = True
        self.console.print(line_of(row, config.steps), soft_wrap=True)
        if warning := cut_off(rollouts):
            self.console.print(warning, soft_wrap=True)

    def _records(
        self, update: int, rollouts: Sequence[Rollout], stop: StopRequest
    ) -> list[dict[str, Any]]:
        texts = self.task.tokenizer.batch_decode(
            [rollout.response_ids for rollout in rollouts], skip_special_tokens=True
        )
        answers = [self.task.problems[pick].answer for pick in self.picks]
        right = self.grader.grade(list(zip(texts, answers, strict=True)), lambda _: stop.check())
        return [
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
            self.console.print(f"Out of memory: once more with {name} {self.sizes[name]}.")

    def why_over(self) -> str:
        """Why the last update was one to stop after, if it was."""
        rows, config = self.result.metrics, self.config
        if rows and rows[-1]["entropy"] < config.stop_below * rows[0]["entropy"]:
            return f"entropy below {config.stop_below:g} of its start"
        if rows and rows[-1]["repetition"] > config.stop_repetition:
            return f"more than {config.stop_repetition:g} of the 4-grams repeat"
        return ""

    def folder(self, update: int) -> Path:
        """Of a checkpoint."""
        return self.config.output / "checkpoints" / f"step-{update:05d}"

    def save(self) -> None:
        """A checkpoint of the last update, unless there is one."""
        done = len(self.result.metrics)
        if (folder := self.folder(done)) == self.result.checkpoint:
            return
        with self.console.status(escape(f"writing {folder}")):
            state = self.optimizer.state() if self.config.save_optimizer else None
            facts = {"update": done, "settings": defining_settings(self.config)}
            save_checkpoint(self.write, folder, state, facts, keep=self.config.keep)
        self.result.checkpoint = folder

    def failed(self, error: BaseException) -> BaseException:
        """What to tell, after the last finished update is saved."""
        kept = "no update yet"
        if self.result.metrics:
            kept = f"--resume {self.config.output} goes on"
        if self.result.metrics and self.is_whole:
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
            options = cheaper(self.config.model_copy(update=asked), self.device.type == "cuda")
            remedies = ", ".join(flag for flag, _ in options)
            return UserError(f"out of memory with {sizes}; {kept}; use {remedies}")
        return error
