"""Sampling of completions. Each draws from its own row of uniform random numbers, so it does not
depend on what is sampled beside it; finished rows leave the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, generation

from ...hf import OVERFLOW
from ..config import Sampling
from ..settings import UserError
from .cuda_graph import rows_for
from .next_tokens import next_tokens
from .padding import can_pad, ready_to_generate

LEAVE_SHARE = 8  # The batch is rebuilt once 1/8 of its rows have finished.


@dataclass
class Rollout:
    """A completion; response_ids include the token that ended it, if it ended by itself."""

    prompt_ids: list[int]
    response_ids: list[int]
    ended: bool

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    processors: Sequence[generation.LogitsProcessor] = (),
    batch_size: int = 64,
    on_done: Callable[[int, Rollout], object] = lambda index, rollout: None,
    check: Callable[[], object] = lambda: None,
) -> list[Rollout]:
    """Sample a completion for each prompt, until an end-of-sequence id of model or tokenizer.

    Args:
        prompts: token ids; those of similar length are sampled together.
        seeds: the integers that each completion's randomness depends on.
        processors: change the logits after the repetition penalty, before the temperature.
        on_done: called with each completion and its index, some time after it has ended.
        check: called after every token; may raise to abandon the work.

    Raises: UserError where activations overflow fp16.
    """
    results: dict[int, Rollout] = {}
    eos = model.generation_config.eos_token_id if model.generation_config else None
    ends = sorted({*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None})
    lengths, new = [len(ids) for ids in prompts], sampling.max_new_tokens
    pad = len(set(lengths)) > 1 and can_pad(model, max(lengths) + new)
    choose = partial(next_tokens, sampling=sampling, processors=processors)
    sample = partial(_generate_batch, model, tokenizer, sampling, ends, check, choose)
    with ready_to_generate(model):
        for batch in _batches(lengths, new, batch_size, pad):
            uniforms = np.stack([np.random.default_rng(seeds[i]).random(new) for i in batch])
            rows = [prompts[i] for i in batch], torch.tensor(uniforms, device=model.device)
            for row, rollout in sample(*rows):
                results[batch[row]] = rollout
                on_done(batch[row], rollout)
    return [results[i] for i in range(len(prompts))]


def _batches(lengths: Sequence[int], new: int, size: int, pad: bool) -> Iterator[list[int]]:
    """Batch indices by length: with padding, no row is over half padding once it has `new` tokens;
    without, lengths are equal.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch:
            shortest = lengths[batch[0]]
            longest = 2 * shortest + new if pad else shortest
            if len(batch) == size or lengths[i] > longest:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def _generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    ends: list[int],
    check: Callable[[], object],
    choose: Callable[..., Tensor],
    prompts: Sequence[list[int]],
    uniforms: Tensor,
) -> Iterator[tuple[int, Rollout]]:
    """Sample one batch, and yield its rows; those that have finished leave it, an eighth of them at
    a time.
    """
    batch = rows_for(model)(model, prompts, sampling.max_new_tokens)
    start = batch.length
    endings: list[Any] = [generation.EosTokenCriteria(eos_token_id=ends)] if ends else []
    if sampling.stop:
        endings.append(generation.StopStringCriteria(tokenizer, list(sampling.stop)))
    rows = torch.arange(len(batch), device=batch.device)  # each one's index in prompts
    length = torch.zeros_like(rows)  # of each completion; 0 while it goes on
    scores: Tensor | None = None
    for count in range(1, sampling.max_new_tokens + 1):
        logits = batch.logits()
        if scores is None:  # Each step's fp32 logits are in the same memory.
            scores = logits.new_empty(logits.shape, dtype=torch.float32)
        scores = scores[: len(batch)].copy_(logits)
        del logits
        if count == 1:
            check_overflow(scores[:, 0], model.dtype)
        batch.append(choose(scores, batch.tokens, uniforms=uniforms[rows, count - 1]))
        check()
        ended = torch.zeros_like(rows, dtype=torch.bool)
        for ending in endings:  # Stop strings that begin in the prompt do not count.
            ended |= ending(batch.tokens[:, start:], scores)
        length = torch.where(ended & (length == 0), count, length)
        last = count == sampling.max_new_tokens
        if not last and LEAVE_SHARE * int((length > 0).sum()) < len(batch):
            continue
        check_overflow(scores[:, 0], model.dtype)  # NaN stays in a row, through its cache
        columns = rows.tolist(), length.tolist(), batch.tokens[:, start:].tolist()
        for row, end, response in zip(*columns, strict=True):
            if end > 0 or last:
                yield row, Rollout(prompts[row], response[: end or count], end > 0)
        going = (length == 0).nonzero()[:, 0]
        if last or not len(going):
            return
        rows, length = rows[going], length[going]
        batch.keep(going)


def check_overflow(values: Tensor, computed_in: torch.dtype) -> None:
    """Raise UserError if values that a model has computed in fp16 have a NaN."""
    if computed_in == torch.float16 and values.isnan().any():
        raise UserError(OVERFLOW)
