"""The choice of a token against transformers' logits processors."""

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from em_kernels.training.config import Sampling
from em_kernels.training.rollouts.next_tokens import EXTRA, inverse_cdf, next_tokens

PLAIN = Sampling(temperature=1, top_k=0, top_p=1, repetition_penalty=1)
VOCAB_SIZE, DRAWS = 2000, 4096
SEEN = torch.arange(0, VOCAB_SIZE, 7)[None]  # tokens that the repetition penalty counts


def logits_of(kind):
    """Return a row of logits; those in bf16 are the same for many tokens."""
    logits = 3 * torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    return {"fp32": logits, "bf16": logits.bfloat16().float(), "equal": 0 * logits}[kind]


def probabilities(sampling, logits):
    """Return the probabilities (vocabulary,) by transformers' processors."""
    processors = LogitsProcessorList()
    processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors(SEEN, logits.clone())[0].double().softmax(-1)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "equal"])
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.15},
        {"top_k": 50},
        {"top_k": 1},
        {"top_k": 3, "top_p": 0.5},
        {"top_k": 700, "temperature": 2.5},
        {"top_k": VOCAB_SIZE - EXTRA},  # All tokens are candidates.
        {"top_k": 3 * VOCAB_SIZE},
        {"top_p": 0.9},
        {"repetition_penalty": 0.7},
        {"temperature": 0.25},
    ],
    ids=str,
)
def test_evenly_spread_numbers_draw_the_processors_distribution(changes, kind):
    """Of N such numbers, a token is drawn N times its probability, up to one more or less."""
    sampling = PLAIN.model_copy(update=changes)
    logits = logits_of(kind)
    expected = DRAWS * probabilities(sampling, logits)
    uniforms = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    rows = logits.repeat(DRAWS, 1)
    drawn = next_tokens(rows, SEEN.expand(DRAWS, -1), sampling, uniforms)
    counts = torch.bincount(drawn, minlength=VOCAB_SIZE)
    assert (counts - expected).abs().max() <= 1.01
    assert not counts[expected == 0].any()


@pytest.mark.parametrize("ties", [EXTRA - 1, EXTRA, EXTRA + 1, 100])
def test_more_equal_logits_than_candidates(ties):
    """The k-th logit occurs in `ties` more tokens, all of which stay possible."""
    logits = -torch.arange(VOCAB_SIZE, dtype=torch.float32)[None].repeat(DRAWS, 1)
    logits[:, 4 : 5 + ties] = -4.0
    uniforms = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    sampling = PLAIN.model_copy(update={"top_k": 5, "temperature": 4.0})
    drawn = Counter(next_tokens(logits, SEEN, sampling, uniforms).tolist())
    assert set(drawn) == set(range(5 + ties))


def test_a_number_chooses_the_same_token_whatever_else_is_in_the_batch():
    """One row with many equal logits has all rows drawn from the whole vocabulary."""
    uniforms = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits = 3 * torch.randn(64, VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    sampling = PLAIN.model_copy(update={"top_k": 20, "top_p": 0.9})
    alone = next_tokens(logits.clone(), SEEN, sampling, uniforms)
    flat = torch.cat([logits, logits_of("equal")])
    beside = next_tokens(flat, SEEN, sampling, torch.cat([uniforms, uniforms[:1]]))
    assert beside[:64].tolist() == alone.tolist()


@pytest.mark.parametrize("penalty", [1, 1.3, 0.5])
def test_greedy(penalty):
    sampling = PLAIN.model_copy(update={"temperature": 0, "repetition_penalty": penalty})
    logits = logits_of("fp32")
    expected = RepetitionPenaltyLogitsProcessor(float(penalty))(SEEN, logits.clone()).argmax(-1)
    assert torch.equal(next_tokens(logits, SEEN, sampling, torch.zeros(1)), expected)


def test_a_number_never_falls_on_an_impossible_token():
    scores = torch.tensor([-torch.inf, 0, -torch.inf, 0, -torch.inf]).expand(4, -1)
    uniforms = torch.tensor([0, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(scores, uniforms).tolist() == [1, 1, 3, 3]
