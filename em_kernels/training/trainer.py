"""One-shot Entropy Minimization: sample, minimise the entropy of what was sampled, repeat."""

import json
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from ..functional import fused_entropy_loss, gradient_report
from ..hf import Head, check_head, head_of, hidden_states
from .checkpoint import save_checkpoint
from .config import TrainConfig, UserError
from .grading import is_correct
from .rollout import Rollout, check_cache, generate
from .setup import Task, check_output, load_model, load_task, make_accelerator


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised where the weights are those of a finished update."""


@dataclass
class TrainResult:
    """What a run left: its folder, its last checkpoint, a row of metrics for each update."""

    output: Path
    checkpoint: Path | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)


class StopRequest:
    """Turns a first Ctrl-C or SIGTERM into Interrupted at the next check; a second acts at once."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> "StopRequest":
        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
        self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        if self.requested:
            raise Interrupted("interrupted")


def micro_batches(rollouts: Sequence[Rollout], tokens: int) -> Iterator[list[Rollout]]:
    """The rollouts by length, in batches whose padded size stays within a number of tokens."""
    batch: list[Rollout] = []
    for rollout in sorted(rollouts, key=len):
        if batch and len(rollout) * (len(batch) + 1) > tokens:  # the longest so far
            yield batch
            batch = []
        batch.append(rollout)
    if batch:
        yield batch


def padded(batch: Sequence[Rollout], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask, and which positions score a response token; each (B, T)."""
    ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
    attention, scores = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, rollout in enumerate(batch):
        start, end = len(rollout.prompt_ids), len(rollout)
        ids[row, :end] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        attention[row, :end] = 1
        scores[row, start - 1 : end - 1] = True  # the state at t scores token t + 1
    return ids.to(device), attention.to(device), scores.to(device)


class StepLoss(NamedTuple):
    """Of one update, over its response tokens."""

    entropy: float  # mean, in nats
    active_share: float  # of the vocabulary that the head's backward multiplied
    dropped_share: float  # of the mass of the logits' gradient, where any was left out


def _loss(hidden: Tensor, head: Head, config: TrainConfig, mask: Tensor | None = None) -> Tensor:
    """Sum of the tokens' entropies."""
    return fused_entropy_loss(
        hidden,
        head.weight,
        mask=mask,
        temperature=config.temperature,
        reduction="sum",
        grad_tolerance=config.grad_tolerance,
        chunk_bytes=config.chunk_bytes,
        **head.arguments(),
    )


def entropy_step(
    model: PreTrainedModel,
    head: Head,
    rollouts: Sequence[Rollout],
    config: TrainConfig,
    accelerator: Accelerator,
    stop: StopRequest,
) -> StepLoss:
    """Add the gradient of the mean entropy over all response tokens."""
    total = sum(len(rollout.response_ids) for rollout in rollouts)
    mean, reports = 0.0, []
    for batch in micro_batches(rollouts, config.micro_batch_tokens):
        stop.check()
        ids, attention, scores = padded(batch, accelerator.device)
        with accelerator.autocast():
            loss = _loss(hidden_states(model, ids, attention), head, config, scores)
        reports.append(torch.stack(gradient_report(loss)) * (scores.sum() / total))
        loss = loss / total
        accelerator.backward(loss)
        mean += loss.item()
    active, dropped = torch.stack(reports).sum(0).tolist()
    return StepLoss(mean, active, dropped)


def train(
    config: TrainConfig, *, console: Console | None = None, model: PreTrainedModel | None = None
) -> TrainResult:
    """Run One-shot EM; leave config.yaml, metrics.jsonl, rollouts.jsonl, checkpoints/ in output.

    Args:
        console: where progress goes; default stderr.
        model: config.model already loaded, in fp32; trained in place.

    Raises:
        UserError: before anything is written, where the settings cannot work; or a full disk.
        Interrupted: after Ctrl-C, with a checkpoint of the last finished update.
    """
    console = console or Console(stderr=True)
    config.check_complete()
    accelerator = make_accelerator(config)
    check_output(config.output)
    task = load_task(config)
    if config.chat_template and not task.chat_template:
        console.print("The tokenizer has no chat template: the prompt is used as it is.")
    if model is None:
        with console.status(escape(f"loading {config.model}")):
            model = load_model(task.source, config, accelerator.device)
    try:
        head = head_of(model)
        with accelerator.autocast():
            check_head(model, head)
        check_cache(model)
    except TypeError as error:
        raise UserError(str(error)) from error
    try:
        with accelerator.autocast():
            token = head.weight.new_zeros(1, head.weight.shape[1], requires_grad=True)
            _loss(token, head._replace(weight=head.weight.detach()), config)
    except ValueError as error:  # chunk_bytes, most likely
        raise UserError(str(error)) from error
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output: cannot write: {error}") from error
    result = TrainResult(config.output)
    run = _Run(config, task, model, head, optimizer, accelerator, console, result)

    def save() -> None:
        folder = config.output / "checkpoints" / f"step-{len(result.metrics):05d}"
        if folder != result.checkpoint:
            with console.status(escape(f"writing {folder}")):
                result.checkpoint = save_checkpoint(model, task.tokenizer, folder)

    with StopRequest() as stop:
        try:
            for update in range(1, config.steps + 1):
                _update(run, update, stop)
                entropies = [row["entropy"] for row in result.metrics]
                if entropies[-1] < config.stop_below * entropies[0]:
                    console.print(
                        f"Stopped early: entropy below {config.stop_below:g} of its start."
                    )
                    break
                if update in config.save_at:
                    save()
            save()
            stop.check()
        except (Exception, Interrupted) as error:
            if result.metrics:
                save()
            kept = (
                f"{result.checkpoint} holds the last update" if result.metrics else "no update yet"
            )
            if isinstance(error, (Interrupted, UserError)):
                raise type(error)(f"{error}; {kept}") from None
            if isinstance(error, torch.OutOfMemoryError):
                raise UserError(
                    f"out of memory; {kept}; lower micro_batch_tokens (training) or rollout_batch "
                    "(sampling), or use gradient_checkpointing"
                ) from error
            raise
    return result


class _Run(NamedTuple):
    """What the updates of a run share."""

    config: TrainConfig
    task: Task
    model: PreTrainedModel
    head: Head
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    console: Console
    result: TrainResult


def _update(run: _Run, update: int, stop: StopRequest) -> None:
    """One optimizer update and its records."""
    config, task, model, head, optimizer, accelerator, console, result = run
    picks = [i % len(task.prompts) for i in range(config.rollouts)]
    began = time.perf_counter()
    with progress_on(console) as progress:
        name = f"update {update}/{config.steps}"
        bar = progress.add_task(f"{name} sampling", total=config.rollouts)
        with accelerator.autocast():
            rollouts = generate(
                model,
                task.tokenizer,
                [task.prompts[pick] for pick in picks],
                [(config.seed, update, i) for i in range(config.rollouts)],
                config.sampling,
                batch_size=config.rollout_batch,
                on_done=lambda count: progress.advance(bar, count),
                check=stop.check,
            )
        sampled = time.perf_counter()
        progress.update(bar, description=f"{name} training")
        loss = entropy_step(model, head, rollouts, config, accelerator, stop)
        norm = float(accelerator.clip_grad_norm_(model.parameters(), config.clip))
        if not math.isfinite(norm):
            raise UserError(f"lr: the gradient of update {update} is not finite; lower it")
        optimizer.step()
        optimizer.zero_grad()
    now = time.perf_counter()
    texts = task.tokenizer.batch_decode(
        [rollout.response_ids for rollout in rollouts], skip_special_tokens=True
    )
    answers = [task.problems[pick].answer for pick in picks]
    right = [a if a is None else is_correct(t, a) for t, a in zip(texts, answers, strict=True)]
    graded = [r for r in right if r is not None]
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
        "tokens_per_s": tokens / (now - began),
        "sampling_s": sampled - began,
        "training_s": now - sampled,
        "peak_memory_gib": peak_memory_gib(accelerator.device),
    }
    records = [
        {
            "update": update,
            "index": index,
            "prompt_ids": rollout.prompt_ids,
            "response_ids": rollout.response_ids,
            "ended": rollout.ended,
            "correct": right[index],
            "text": texts[index],
        }
        for index, rollout in enumerate(rollouts)
    ]
    result.metrics.append(row)
    _append(config.output / "rollouts.jsonl", records)
    _append(config.output / "metrics.jsonl", [row])
    console.print(_line(row, config.steps), soft_wrap=True)


def progress_on(console: Console) -> Progress:
    """A bar while something runs; where nobody watches, the lines of results are enough."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"output: cannot write {path}: {error}") from error


def _line(row: dict[str, Any], steps: int) -> str:
    accuracy = "" if row["accuracy"] is None else f"  accuracy {row['accuracy']:.2f}"
    seconds = row["sampling_s"] + row["training_s"]
    return (
        f"update {row['update']:>2}/{steps}  loss = entropy {row['entropy']:.4f} nats{accuracy}"
        f"  length {row['mean_length']:.1f}  ended {row['ended']:.0%}"
        f"  {row['tokens_per_s']:.0f} tokens/s  peak {row['peak_memory_gib']:.2f} GiB"
        f"  {seconds:.1f} s"
    )


def peak_memory_gib(device: torch.device) -> float:
    """The device allocator's peak, or on a CPU the process's peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
