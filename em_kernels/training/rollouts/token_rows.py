"""Rows of tokens that grow together: one batch of prompts, its padding and its KV cache."""

import inspect
from collections.abc import Sequence
from os.path import commonprefix

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .kv_cache import new_cache


def takes_positions(model: PreTrainedModel) -> bool:
    """Return True if the model is told where each token stands."""
    return "position_ids" in inspect.signature(model.forward).parameters


class TokenRows:
    """A batch of prompts and the tokens added to them.

    Prompts are padded after their common prefix, with each row's own first token, which a
    repetition penalty counts anyway. The prefix is computed once, for all rows.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[list[int]], new_tokens: int
    ) -> None:
        longest = max(map(len, prompts))
        # The last token stays out of the prefix: its logits are the first to be asked for.
        prefix = len(commonprefix([ids[:-1] for ids in prompts]))
        capacity, gaps = longest + new_tokens, [longest - len(ids) for ids in prompts]
        padded = zip(prompts, gaps, strict=True)
        ids = [ids[:prefix] + ids[:1] * gap + ids[prefix:] for ids, gap in padded]
        self.model, self.device = model, model.device
        self.length, self.known = longest, 0  # tokens of a row, and those in the cache
        self.ids = torch.zeros(len(ids), capacity, dtype=torch.int64, device=self.device)
        self.ids[:, :longest] = torch.tensor(ids, device=self.device)
        mask = torch.ones(len(ids), capacity, dtype=torch.int64)
        for row, gap in zip(mask, gaps, strict=True):
            row[prefix : prefix + gap] = 0
        self.positions = (mask.cumsum(-1) - 1).clamp(min=0).to(self.device)
        self.mask = mask.to(self.device) if any(gaps) else None
        self.takes_positions = takes_positions(model)
        self.cache = new_cache(model, capacity)
        if prefix:
            self._feed(slice(0, 1), prefix)
            self.cache.batch_repeat_interleave(len(ids))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> Tensor:
        """Token ids so far, (rows, length), padding included."""
        return self.ids[:, : self.length]

    def logits(self) -> Tensor:
        """Return the logits (rows, vocabulary) of each row's next token."""
        return self._feed(slice(None), self.length)

    def append(self, tokens: Tensor) -> None:
        """Add a token (rows,) to each row."""
        self.ids[:, self.length] = tokens
        self.length += 1

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these indices."""
        self.ids, self.positions = self.ids[rows], self.positions[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)

    def _feed(self, rows: slice, end: int) -> Tensor:
        """Compute the tokens up to `end` that the cache lacks; return the last one's logits."""
        start, self.known = self.known, end
        inputs = {"input_ids": self.ids[rows, start:end], "past_key_values": self.cache}
        if self.mask is not None:
            inputs["attention_mask"] = self.mask[rows, :end]
        if self.takes_positions:
            inputs["position_ids"] = self.positions[rows, start:end]
        # FSDP requires a call of the root module, not of its decoder.
        return self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
