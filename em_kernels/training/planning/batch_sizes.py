"""Choose one rank's batch sizes: micro-batch, completions sampled side by side, logits chunk."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..config import TrainConfig
from .activations import ModelMemory
from .components import completion_bytes, head_bytes
from .plan import peak, phases

# Estimates, not yet measured on a GPU.
TARGET_TOKENS = {"cuda": 16384, "cpu": 1024}  # a larger micro-batch is no more efficient
ENOUGH_TOKENS = 4096  # recompute only where a micro-batch of this size would not fit without
EFFICIENT_TOKENS, EFFICIENT_ROWS = 2048, 16  # of a micro-batch; sampled side by side
MAX_SAMPLED_ROWS = 256  # a step of more rows takes a GPU as long per token, and a CPU longer
# Cap: short completions may pack up to 8x as many rows into a micro-batch.
SHORT_ROWS = 8


class BatchSizes(NamedTuple):
    """Batch sizes of one rank, and an update's work with them."""

    settings: dict[str, Any]  # the settings that they complete
    passing: dict[str, int]  # bytes by component that come and go
    efficient: bool
    completions: int
    prompt_tokens: int  # computed in an update
    micro_batches: int
    shared_prompts: int  # each has a backward of its own
    cache_bytes: int  # of a completion's keys and values


@dataclass
class BatchSizer:
    """Chooses the batch sizes that a config leaves "auto", for one of so many ranks."""

    config: TrainConfig
    model: ModelMemory
    prompt_tokens: int
    ranks: int
    cuda: bool
    chunk_bytes: int  # of logits that are held at a time

    def __post_init__(self) -> None:
        config = self.config
        self.new_tokens = config.sampling.max_new_tokens
        self.completions = -(-config.rollouts // self.ranks)
        self.prompts = 1 if config.prompt_from is None else len(config.prompt_rows)
        per_prompt = -(-self.completions // self.prompts)
        self.shared = config.share_prefix and self.model.can_share_prefix and per_prompt > 1
        together = per_prompt if self.shared else self.completions
        self.max_rows = min(together, config.micro_batch_rows or self.completions)
        self.row_tokens = self.new_tokens + (0 if self.shared else self.prompt_tokens)

    def choose(self, room: int) -> BatchSizes:
        """Choose the largest sizes with which what comes and goes fits into so many bytes."""
        config, settings, target = self.config, dict[str, Any](), self.config.micro_batch
        if target == "auto":
            target = TARGET_TOKENS["cuda" if self.cuda else "cpu"]
        target_rows = rows = max(1, min(self.max_rows, target // self.row_tokens))
        recompute = config.gradient_checkpointing
        if recompute == "auto":
            enough = min(target_rows, -(-ENOUGH_TOKENS // self.row_tokens))
            recompute = room <= 0 or peak(self._most(enough, False)) > room
        if config.micro_batch == "auto":
            rows = self._fitting_rows(target_rows, recompute, room)
            settings["micro_batch"] = rows * self.row_tokens
        if SHORT_ROWS * rows < self.max_rows:
            settings["micro_batch_rows"] = SHORT_ROWS * rows
        each = completion_bytes(config, self.model, self.prompt_tokens, self.cuda)
        if config.rollout_batch == "auto":
            limit = min(self.completions, MAX_SAMPLED_ROWS, room // sum(each.values()))
            sampled = settings["rollout_batch"] = _even(self.completions, max(1, limit))
        else:
            sampled = min(self.completions, config.rollout_batch)
        passing = {name: size * sampled for name, size in each.items()}
        passing |= self._most(rows, recompute)
        if config.chunk_bytes is None and config.mode == "offload" and self.cuda:
            # Each chunk may send a gradient of the whole head to the host: chunks are as large as
            # the memory that the backward needs later allows.
            spare = self.chunk_bytes + phases(passing)["backward"] - phases(passing)["head"]
            self.chunk_bytes = max(self.chunk_bytes, 1 << max(0, spare.bit_length() - 1))
            passing |= self._most(rows, recompute)
        settings |= {"gradient_checkpointing": recompute, "chunk_bytes": self.chunk_bytes}
        enough_tokens = min(target_rows * self.row_tokens, EFFICIENT_TOKENS)
        efficient = rows * self.row_tokens >= enough_tokens
        efficient = efficient and sampled >= min(self.completions, EFFICIENT_ROWS)
        prompts, micro_batches = self.completions, -(-self.completions // rows)
        if self.shared:
            prompts, micro_batches = self.prompts, -(-self.max_rows // rows) * self.prompts
        return BatchSizes(
            settings,
            passing,
            efficient,
            self.completions,
            self.prompt_tokens * prompts,
            micro_batches,
            self.prompts if self.shared else 0,
            each["KV cache"],
        )

    def _fitting_rows(self, target_rows: int, recompute: bool, room: int) -> int:
        def full_length(rows: int) -> int:
            return peak(self._passing(rows, self.new_tokens, recompute))

        def most(rows: int) -> int:
            return peak(self._most(rows, recompute))

        rows = _largest(full_length, target_rows, room)
        if most(rows) > room:
            rows = _largest(most, rows, room)
        while rows > 1 and most(rows) > room:
            rows = rows * 3 // 4
        return _even(self.max_rows, rows)

    def _passing(self, rows: int, new_tokens: int, recompute: bool) -> dict[str, int]:
        """Return the bytes of a micro-batch by component."""
        config, model = self.config, self.model
        found = model.activations(rows, self.prompt_tokens, new_tokens, self.shared, recompute)
        head = head_bytes(config, model, found.head_rows, self.chunk_bytes, self.cuda)
        unpacked = 2 * model.largest_linear if config.four_bit else 0  # a layer in 16 bits
        return {
            "activations": found.after_forward,
            "logits chunk": head,
            "recompute, gradients": found.peak - found.after_forward + unpacked,
        }

    def _most(self, rows: int, recompute: bool) -> dict[str, int]:
        """Return the bytes of the micro-batch that needs most: of full-length completions, or of
        short ones, which are more rows, each with the shared prompt's keys and values.
        """
        shapes = [(rows, self.new_tokens)]
        widest = min(self.max_rows, SHORT_ROWS * rows)
        short = max(2, rows * self.new_tokens // widest)
        if self.shared and short < self.new_tokens:
            shapes.append((widest, short))
        return max((self._passing(*shape, recompute) for shape in shapes), key=peak)


def _even(total: int, size: int) -> int:
    """Return the size of as many batches as `size` makes of a total, all of them alike."""
    return -(-total // -(-total // size))


def _largest(need: Callable[[int], int], most: int, room: int) -> int:
    """Return up to `most` rows, at least 1, that need no more than the room. Interpolates between 1
    row and `most`: activations are convex in the rows, so the result is seldom too large.
    """
    if most == 1 or room <= 0:
        return 1
    if need(most) <= room:
        return most
    if need(1) >= room:
        return 1
    slope = (need(most) - need(1)) / (most - 1)
    return max(1, min(most - 1, 1 + int((room - need(1)) / slope)))
