"""Choice of the next token by logits and a given random number."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import generation

from ..config import Sampling

EXTRA = 14  # candidates beyond top-k: logits that equal the k-th stay in, as transformers has it


def next_tokens(
    scores: Tensor,
    ids: Any,
    sampling: Sampling,
    uniforms: Tensor,
    processors: Sequence[generation.LogitsProcessor] = (),
) -> Tensor:
    """Choose a token for each row, from the distribution of transformers' processors.

    With top-k only the candidates are sorted and summed up, not the vocabulary, unless more than
    `EXTRA` others have the k-th logit. The same uniform number chooses the same token either way.

    Args:
        scores: (rows, vocabulary) fp32 logits; changed.
        ids: (rows, tokens) tokens so far, which the repetition penalty counts.
        uniforms: (rows,) fp64 random numbers in [0, 1); not used at temperature 0.
        processors: change the logits after the repetition penalty, before the temperature.

    Returns: (rows,) tokens.
    """
    if (penalty := sampling.repetition_penalty) != 1:
        seen = scores.gather(1, ids)
        scores.scatter_(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
    for processor in processors:
        scores = processor(ids, scores)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    warpers, top_k = _warpers(sampling), sampling.top_k
    if has_candidates(sampling, scores.shape[1]):
        candidates = scores.topk(top_k + EXTRA, sorted=False).indices.sort(-1).values
        narrow = scores.gather(1, candidates)
        ordered = (narrow / sampling.temperature).sort(-1, descending=True).values
        if (ordered[:, top_k - 1] > ordered[:, -1]).all():
            index = inverse_cdf(warpers(ids, narrow), uniforms)
            return candidates.gather(1, index[:, None])[:, 0]
    return inverse_cdf(warpers(ids, scores), uniforms)


def has_candidates(sampling: Sampling, vocab_size: int) -> bool:
    """Return True if top-k leaves a part of the vocabulary out of what is sorted and summed up."""
    return 0 < sampling.top_k < vocab_size - EXTRA


def inverse_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Draw an index from each row's softmax: where its cumulative sum passes the uniform number."""
    cdf = torch.softmax(scores, dim=-1, dtype=torch.float64).cumsum(dim=-1)
    index = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    return index[:, 0].clamp_(max=scores.shape[1] - 1)


def _warpers(sampling: Sampling) -> generation.LogitsProcessorList:
    """Return transformers' processors that rule tokens out."""
    warpers = generation.LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(generation.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(generation.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(generation.TopPLogitsWarper(sampling.top_p))
    return warpers
