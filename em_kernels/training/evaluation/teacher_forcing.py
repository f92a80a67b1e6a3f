"""Scores of given completions under a model: entropy, probability, whether greedy gives them."""

from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...functional import fused_token_stats
from ...hf import head_of
from ..console import progress_on
from ..data.problems import tokenised
from ..engines.shared_prefix import SharedPrefix, can_share_prefix
from ..engines.step import micro_batches, scored_states
from ..rollouts.sampling import Rollout, check_overflow
from ..settings import UserError
from ..task import check_context

TOKENS_AT_ONCE = 8192


@torch.no_grad()
def response_states(
    model: PreTrainedModel, rollouts: Sequence[Rollout]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches of rollouts' indices and the states (n, D) that predict their responses."""
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i]))
    same = len(commonprefix([rollout.prompt_ids[:-1] for rollout in rollouts]))
    shares = same > 0 and can_share_prefix(model)
    prompt = SharedPrefix(model, rollouts[0].prompt_ids[:same]) if shares else None
    for batch in micro_batches([rollouts[i] for i in order], TOKENS_AT_ONCE, same if prompt else 0):
        members, order = order[: len(batch)], order[len(batch) :]
        states = scored_states(model, batch, prompt)
        check_overflow(states, model.dtype)
        yield members, states


def mean_entropies(
    model: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float
) -> list[float]:
    """Return the mean entropy of each rollout's response tokens, in nats."""
    head, found = head_of(model), [0.0] * len(rollouts)
    given: Any = {"temperature": temperature, **head.arguments()}
    for members, states in response_states(model, rollouts):
        stats = fused_token_stats(states, head.weight.detach(), **given)
        assert stats.entropy is not None
        parts = stats.entropy.split([len(rollouts[i].response_ids) for i in members])
        for i, part in zip(members, parts, strict=True):
            found[i] = part.mean().item()
    return found


def known_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> list[Rollout]:
    """Return few-shot prompts with their known completions as rollouts."""
    rollouts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        # Tokenized with the next question after it, as in a worked example, because some tokenizers
        # merge the line breaks.
        ids, text = tokenised(tokenizer, prompt), prompt + completion
        count = len(tokenised(tokenizer, f"{text}\nQ:"))  # without an EOS
        found = tokenizer(f"{text}\nQ:", return_offsets_mapping=True)
        pairs = zip(found.input_ids[:count], found.offset_mapping[:count], strict=True)
        whole = [token for token, (start, _) in pairs if start < len(text)]
        if whole[: len(ids)] != ids:
            why = f"the tokenizer joins the end of the prompt with {completion!r}"
            raise UserError(f"teacher_forced: {why}; sample instead")
        rollouts.append(Rollout(ids, whole[len(ids) :], True))
    return rollouts


def score_answers(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    temperatures: Sequence[float],
    console: Console,
    title: str = "scoring",
) -> tuple[np.ndarray, np.ndarray]:
    """Return (n,) bools, True where each token of a known answer is the most probable one, and
    (temperatures, n) log-probabilities of the answers, in nats.
    """
    head, longest = head_of(model), max(map(len, rollouts))
    check_context(model.config, longest, 0, "data: a problem with its answer has", "leave it out")
    greedy = np.zeros(len(rollouts), dtype=bool)
    logprob = np.zeros((len(temperatures), len(rollouts)))
    with progress_on(console) as progress, torch.no_grad():
        bar = progress.add_task(title, total=len(rollouts))
        for members, states in response_states(model, rollouts):
            tokens = [rollouts[i].response_ids for i in members]
            targets = torch.tensor(sum(tokens, []), device=states.device)
            lengths = list(map(len, tokens))
            for row, temperature in enumerate(temperatures):
                given: Any = {"temperature": temperature, "stats": ("logprob", "argmax")}
                stats = fused_token_stats(states, head.weight, targets, **given, **head.arguments())
                assert stats.argmax is not None and stats.logprob is not None
                right = (stats.argmax == targets).cpu().split(lengths)
                parts = stats.logprob.double().cpu().split(lengths)
                for i, hits, part in zip(members, right, parts, strict=True):
                    greedy[i], logprob[row, i] = hits.all().item(), part.sum().item()
            progress.advance(bar, len(members))
    return greedy, logprob
