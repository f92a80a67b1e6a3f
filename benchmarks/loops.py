"""The training loops that bench_train.py compares: ours, and one in plain transformers."""

import io
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.ops.free_memory import peak_memory_gib
from em_kernels.training.config import TrainConfig
from em_kernels.training.rollouts.sampling import Rollout
from em_kernels.training.runs.records import read_metrics, read_rollouts
from em_kernels.training.task import load_task
from em_kernels.training.trainer import train


class EachUpdate(io.StringIO):
    """A file for a Console; calls done(metrics) when train has printed an update's line."""

    def __init__(self, run: Path, done: Callable[[dict], None]) -> None:
        super().__init__()
        self.run, self.done, self.seen = run, done, 0

    def write(self, text: str) -> int:
        for row in read_metrics(self.run)[self.seen :]:
            self.seen += 1
            self.done(row)
        return len(text)


def ours(config: TrainConfig, done: Callable[[dict], None]) -> None:
    """Train, passing each update's metrics to done."""
    train(config, console=Console(file=EachUpdate(config.output, done)))


def by_hand(
    config: TrainConfig, official: bool, run: Path, rows: int, done: Callable[[dict], None]
) -> None:
    """Train as one writes it with transformers and torch, in fp32.

    Args:
        official: as in One-shot EM's train.py: no KV cache in sampling, all logits in training.
        run: folder whose completions are trained on.
        rows: completions per micro-batch; ours chooses its own.
    """
    device = torch.device(config.device)
    source = load_task(config).source
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    loss_of = official_loss if official else plain_loss
    prompt_ids = read_rollouts(run, config.rollouts)[1][0].prompt_ids
    prompt = torch.tensor([prompt_ids] * config.rollouts, device=device)
    torch.manual_seed(config.seed)
    for update in count(1):
        began = time.perf_counter()
        model.eval()
        sampled = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=config.sampling.temperature,
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
            repetition_penalty=config.sampling.repetition_penalty,
            max_new_tokens=config.sampling.max_new_tokens,
            stop_strings=list(config.sampling.stop) or None,
            tokenizer=tokenizer,
            pad_token_id=0,
            use_cache=not official,
        )
        tokens = int((sampled[:, prompt.shape[1] :] != 0).sum())
        between = time.perf_counter()
        model.train()
        rollouts = read_rollouts(run, config.rollouts)[update]
        total = torch.zeros((), device=device)
        scored = sum(len(rollout.response_ids) for rollout in rollouts)
        for start in range(0, len(rollouts), rows):
            batch = padded(rollouts[start : start + rows], device)
            loss = loss_of(model, *batch, prompt.shape[1], config.temperature) / scored
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        entropy, now = total.item(), time.perf_counter()
        done(
            {
                "entropy": entropy,
                "tokens": tokens,
                "sampling_s": between - began,
                "training_s": now - between,
                "peak_memory_gib": peak_memory_gib(device),
            }
        )


def padded(rollouts: list[Rollout], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, T), and a mask that is 0 on padding."""
    ids = torch.zeros(len(rollouts), max(map(len, rollouts)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, rollout in enumerate(rollouts):
        ids[row, : len(rollout)] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        mask[row, : len(rollout)] = 1
    return ids.to(device), mask.to(device)


def plain_loss(model, ids, mask, prompt_length, temperature):
    """Sum the entropies, from logits of the response alone, by a stable formula."""
    kept = ids.shape[1] - prompt_length + 1
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept).logits[:, :-1]
    logp = (logits.float() / temperature).log_softmax(-1)
    return (-(logp.exp() * logp).sum(-1) * mask[:, prompt_length:]).sum()


def official_loss(model, ids, mask, prompt_length, temperature):
    """Sum the entropies, from logits of all positions, by the official formula."""
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    probs = torch.softmax(logits / temperature, dim=-1)
    entropy = -(probs * torch.log(probs + 1e-12)).sum(-1)
    return (entropy[:, prompt_length - 1 : -1] * mask[:, prompt_length:]).sum()
