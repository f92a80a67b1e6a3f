"""Sampling of completions with transformers' generate. Each draws from its own row of uniform
random numbers, so it does not depend on what is sampled beside it; finished rows leave the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, generation

from ..config import Sampling
from .padding import can_pad, pad_prompts, ready_to_generate, run_generate

LEAVE_SHARE = 8  # The batch is rebuilt once 1/8 of its rows have finished.


@dataclass
class Rollout:
    """A completion; response_ids include the token that ended it, if it ended by itself."""

    prompt_ids: list[int]
    response_ids: list[int]
    ended: bool

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class _InverseCdf(generation.LogitsProcessor):
    """The last processor: draws a token by a given random number, and rules out all others."""

    def __init__(self, uniforms: Tensor, start: int):
        self.uniforms, self.start = uniforms, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cdf = torch.softmax(scores, dim=-1, dtype=torch.float64).cumsum(dim=-1)
        u = self.uniforms[:, input_ids.shape[1] - self.start, None] * cdf[:, -1:]
        token = torch.searchsorted(cdf, u, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0)


class _SegmentEnd(generation.StoppingCriteria):
    """Records the length at which each row ends; stops generate once enough rows have ended."""

    def __init__(
        self, ends: Sequence[Any], rows: int, start: int, check: Callable[[], object]
    ) -> None:
        self.ends, self.start, self.check = ends, start, check
        self.enough = -(-rows // LEAVE_SHARE)
        self.length = torch.zeros(rows, dtype=torch.int64)  # 0 while a row goes on

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: object) -> Tensor:
        self.check()
        self.length = self.length.to(input_ids.device)
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.ends:  # Stop strings that begin in the prompt do not count.
            ended |= criterion(input_ids[:, self.start :], scores)
        now = ended & (self.length == 0)
        self.length = torch.where(now, input_ids.shape[1], self.length)
        return torch.full_like(ended, int((self.length > 0).sum()) >= self.enough)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 64,
    on_done: Callable[[int], object] = lambda count: None,
    check: Callable[[], object] = lambda: None,
) -> list[Rollout]:
    """Sample a completion for each prompt, until an end-of-sequence id of model or tokenizer.

    Args:
        prompts: token ids; those of similar length are sampled together.
        seeds: the integers that each completion's randomness depends on.
        on_done: called with the number of completions just finished.
        check: called after every token; may raise to abandon the work.
    """
    results: dict[int, Rollout] = {}
    eos = model.generation_config.eos_token_id if model.generation_config else None
    ends = sorted({*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None})
    lengths, new = [len(ids) for ids in prompts], sampling.max_new_tokens
    pad = len(set(lengths)) > 1 and can_pad(model, max(lengths) + new)
    sample = partial(_generate_batch, model, tokenizer, sampling, ends, on_done, check)
    with ready_to_generate(model):
        for batch in _batches(lengths, batch_size, pad):
            uniforms = np.stack([np.random.default_rng(seeds[i]).random(new) for i in batch])
            done = sample([prompts[i] for i in batch], torch.tensor(uniforms, device=model.device))
            results.update(zip(batch, done, strict=True))
    return [results[i] for i in range(len(prompts))]


def processors_of(
    sampling: Sampling, uniforms: Tensor, start: int
) -> generation.LogitsProcessorList:
    """Return what turns logits into ones of which the largest is the sampled token.

    Args:
        uniforms: (rows, new tokens) random numbers that decide.
        start: length of the prompt.
    """
    processors = generation.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(generation.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            processors.append(generation.TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(generation.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(generation.TopPLogitsWarper(sampling.top_p))
        processors.append(_InverseCdf(uniforms, start))
    return processors


def _batches(lengths: Sequence[int], size: int, pad: bool) -> Iterator[list[int]]:
    """Batch indices by length: at most twice the batch's shortest, or all equal without padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) == size or lengths[i] > lengths[batch[0]] * (1 + pad)):
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
    on_done: Callable[[int], object],
    check: Callable[[], object],
    prompts: Sequence[list[int]],
    uniforms: Tensor,
) -> list[Rollout]:
    """Sample one batch in segments, between which finished rows leave."""
    ids, mask, cache = pad_prompts(model, prompts)
    prompt_length = ids.shape[1]
    longest = prompt_length + sampling.max_new_tokens
    endings: list[Any] = [generation.EosTokenCriteria(eos_token_id=ends)] if ends else []
    if sampling.stop:
        endings.append(generation.StopStringCriteria(tokenizer, list(sampling.stop)))
    results: dict[int, Rollout] = {}
    rows = torch.arange(len(ids), device=ids.device)  # each row's index in prompts
    while len(rows):
        processors = processors_of(sampling, uniforms[rows], prompt_length)
        segment_end = _SegmentEnd(endings, len(rows), prompt_length, check)
        config = {"max_length": longest, "pad_token_id": ends[0] if ends else 0}
        stop = {"stopping_criteria": generation.StoppingCriteriaList([segment_end])}
        output = run_generate(model, ids, mask, cache, config, logits_processor=processors, **stop)
        ids, cache = output.sequences, output.past_key_values
        length = segment_end.length
        ended = (length > 0) & (length <= ids.shape[1])
        finished = torch.ones_like(ended) if ids.shape[1] >= longest else ended
        stop_at = torch.where(ended, length, ids.shape[1]).tolist()
        for i in finished.nonzero()[:, 0].tolist():
            response = ids[i, prompt_length : stop_at[i]].tolist()
            row = int(rows[i])
            results[row] = Rollout(prompts[row], response, bool(ended[i]))
        on_done(int(finished.sum()))
        going = (~finished).nonzero()[:, 0]
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        ids, rows, mask = ids[going], rows[going], mask[going]
        if len(rows):
            cache.batch_select_indices(going)
    return [results[row] for row in range(len(prompts))]
