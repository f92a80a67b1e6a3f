"""One rank's batch sizes (micro-batch, completions sampled at once, logits), and their speed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...ops.memory import MAX_CHUNK_BYTES
from ..config import TrainConfig
from ..engines.optimizer import PRECISIONS
from .activations import ModelMemory
from .components import completion_bytes, head_bytes
from .plan import Rates, peak, phases

# Estimates, not yet measured on a GPU.
GPU_TOKENS, CPU_TOKENS = 16384, 1024  # a larger micro-batch is no more efficient
ENOUGH_TOKENS = 4096  # recompute only where a micro-batch of this size would not fit without
EFFICIENT_TOKENS = 2048  # of a micro-batch; a larger one is hardly faster
EFFICIENT_ROWS = 16  # sampled side by side; more are hardly faster
MAX_SAMPLED_ROWS = 256  # a step of more rows takes a GPU as long per token, and a CPU longer
# Of the head's backward, what a tolerance leaves at temperature 0.5 (Qwen2.5: 0.002; at 1: 0.16).
HEAD_SHARE = 0.02
CHOICE_LAUNCHES = 60  # operations beside the model's in a sampling step; next_tokens has most
# Cap: short completions may pack up to 8x as many rows into a micro-batch.
SHORT_ROWS = 8


@dataclass
class BatchSizes:
    """One rank's batch sizes: the largest whose passing memory, which comes and goes, fits into
    `room` bytes.

    settings: the sizes, for the config. passing: their bytes by component. efficient: larger ones
    would hardly be faster.
    """

    config: TrainConfig
    model: ModelMemory
    prompt_tokens: int
    ranks: int
    cuda: bool
    chunk_bytes: int  # of logits that are held at a time
    room: int

    def __post_init__(self) -> None:
        config = self.config
        auto = GPU_TOKENS if self.cuda else CPU_TOKENS
        self.target_tokens = auto if config.micro_batch == "auto" else config.micro_batch
        self.new_tokens = config.sampling.max_new_tokens
        self.completions = -(-config.rollouts // self.ranks)
        prompts = config.prompts_at_once
        per_prompt = -(-self.completions // prompts)
        can_share = self.model.can_share_prefix and per_prompt > 1
        self.shared = config.share_prefix is not False and can_share
        together = per_prompt if self.shared else self.completions
        self.max_rows = min(together, config.micro_batch_rows or self.completions)
        self.row_tokens = self.new_tokens + (0 if self.shared else self.prompt_tokens)
        self.settings: dict[str, Any] = {"share_prefix": config.share_prefix is not False}
        self.passing: dict[str, int] = {}
        rows, target_rows = self._choose_micro_batch()
        sampled = self._choose_rollout_batch()
        self.passing |= self._worst_case(rows)
        if config.chunk_bytes is None:
            self._enlarge_chunks(rows)
        self.settings["chunk_bytes"] = self.chunk_bytes
        enough_tokens = min(target_rows * self.row_tokens, EFFICIENT_TOKENS)
        enough_sampled = min(self.completions, EFFICIENT_ROWS)
        self.efficient = rows * self.row_tokens >= enough_tokens and sampled >= enough_sampled
        self.micro_batches = -(-self.completions // rows)
        self.shared_prompts, self.computed_prompts = 0, self.completions
        if self.shared:  # each shared prompt has a backward of its own
            self.micro_batches = -(-self.max_rows // rows) * prompts
            self.shared_prompts = self.computed_prompts = prompts

    def cost(self, rates: Rates) -> tuple[bool, float]:
        """Return whether memory is short, and the seconds of an update; less is better."""
        config = self.config.model_copy(update=self.settings)
        return peak(self.passing) > self.room, sum(self.update_seconds(config, rates).values())

    def may_be_faster_alone(self, rates: Rates) -> bool:
        """Return True if rows that each compute their prompt could be faster: in the fewest
        micro-batches that there can be, as nothing is measured for them.
        """
        tokens, alone = self.new_tokens + self.prompt_tokens, copy.copy(self)
        alone.micro_batches = -(-self.completions * tokens // self.target_tokens)
        alone.shared_prompts, alone.computed_prompts = 0, self.completions
        return self.shared and alone.cost(rates) < self.cost(rates)

    def _enlarge_chunks(self, rows: int) -> None:
        """Make chunks of logits as large as the later peak of the layers' backward allows.

        Each reads the head's weight again; with offload it may also send a gradient of the whole
        head to the host.
        """
        least, before = self.chunk_bytes, peak(self.passing)
        spare = least + phases(self.passing)["backward"] - phases(self.passing)["head"]
        larger = 1 << (max(1, spare).bit_length() - 1)
        if not (self.cuda and self.config.mode == "offload"):
            larger = min(larger, MAX_CHUNK_BYTES)
        while larger > least:
            self.chunk_bytes = larger
            found = self._worst_case(rows)
            if peak({**self.passing, **found}) <= before:
                self.passing |= found
                return
            larger //= 2
        self.chunk_bytes = least

    def _choose_micro_batch(self) -> tuple[int, int]:
        """Choose the rows of a micro-batch; return them and the rows that would be efficient."""
        config = self.config
        target_rows = rows = max(1, min(self.max_rows, self.target_tokens // self.row_tokens))
        self.recompute = config.gradient_checkpointing is True
        if config.gradient_checkpointing == "auto":
            enough = min(target_rows, -(-ENOUGH_TOKENS // self.row_tokens))
            self.recompute = self.room <= 0 or peak(self._worst_case(enough)) > self.room
        if config.micro_batch == "auto":
            rows = self._largest(lambda n: self._passing(n, self.new_tokens), target_rows)
            if peak(self._worst_case(rows)) > self.room:
                rows = self._largest(self._worst_case, rows)
            while rows > 1 and peak(self._worst_case(rows)) > self.room:
                rows = rows * 3 // 4
            rows = _even(self.max_rows, rows)
            self.settings["micro_batch"] = rows * self.row_tokens
        if SHORT_ROWS * rows < self.max_rows:
            self.settings["micro_batch_rows"] = SHORT_ROWS * rows
        self.settings["gradient_checkpointing"] = self.recompute
        return rows, target_rows

    def _choose_rollout_batch(self) -> int:
        """Choose and return how many completions are sampled side by side."""
        each = completion_bytes(self.config, self.model, self.prompt_tokens, self.cuda)
        if self.config.rollout_batch == "auto":
            limit = min(self.completions, MAX_SAMPLED_ROWS, self.room // sum(each.values()))
            sampled = self.settings["rollout_batch"] = _even(self.completions, max(1, limit))
        else:
            sampled = min(self.completions, self.config.rollout_batch)
        self.cache_bytes = each["KV cache"]
        self.passing = {name: size * sampled for name, size in each.items()}
        return sampled

    def _passing(self, rows: int, new_tokens: int) -> dict[str, int]:
        """Return the bytes of a micro-batch by component."""
        config, model = self.config, self.model
        found = model.activations(rows, self.prompt_tokens, new_tokens, self.shared, self.recompute)
        of_base = model.cache_bytes(self.prompt_tokens) if config.kl_weight and self.shared else 0
        head = head_bytes(config, model, found.head_rows, self.chunk_bytes, self.cuda)
        unpacked = 2 * model.sizes.largest_linear if config.four_bit else 0  # a layer in 16 bits
        return {
            "activations": found.after_forward + of_base,
            "logits chunk": head,
            "recompute, gradients": found.peak - found.after_forward + unpacked,
        }

    def _worst_case(self, rows: int) -> dict[str, int]:
        """Return the bytes of the micro-batch that needs most: of long completions, or of short
        ones, which are more rows, each with the shared prompt's keys and values.
        """
        shapes = [(rows, self.new_tokens)]
        widest = min(self.max_rows, SHORT_ROWS * rows)
        short = max(2, rows * self.new_tokens // widest)
        if self.shared and short < self.new_tokens:
            shapes.append((widest, short))
        return max((self._passing(*shape) for shape in shapes), key=peak)

    def _largest(self, components: Callable[[int], dict[str, int]], max_rows: int) -> int:
        """Return how many rows, 1 to `max_rows`, fit into the room. Interpolates: activations are
        convex in the rows, so it is seldom too many.
        """
        if max_rows == 1 or self.room <= 0:
            return 1
        last = peak(components(max_rows))
        if last <= self.room:
            return max_rows
        first = peak(components(1))
        if first >= self.room:
            return 1
        slope = (last - first) / (max_rows - 1)
        return max(1, min(max_rows - 1, 1 + int((self.room - first) / slope)))

    def update_seconds(self, config: TrainConfig, rates: Rates) -> dict[str, float]:
        """Return an update's seconds by phase, at most: each completion has full length."""
        model, sizes, new, completions = (
            self.model,
            self.model.sizes,
            self.new_tokens,
            self.completions,
        )
        matrices, trained = sizes.matrix_parameters, sizes.trained_parameters
        head = model.vocab_size * model.hidden_size
        products = 4 if config.mode == "lora" else 6
        head_products = 2 + (products - 2) * (HEAD_SHARE if config.grad_tolerance else 1)
        flops = products * (matrices - head) + head_products * head
        if config.kl_weight:  # the base model's forward, both heads', and the gradients of one
            flops += 2 * (matrices - head) + (products + 2) * head
        if config.gradient_checkpointing:
            flops += 2 * (matrices - head)
        tokens = completions * new + self.prompt_tokens * self.computed_prompts
        sampling = self._sampling_seconds(config, rates)
        seconds = {"sampling": sampling, "training": tokens * flops / rates.flops}
        gradient_bytes = PRECISIONS[config.gradients].itemsize
        state_bytes = 4 + 2 * PRECISIONS[config.moments].itemsize  # master and both moments
        adamw_bytes = trained * (2 * state_bytes + gradient_bytes)
        backwards = self.micro_batches + self.shared_prompts
        added_up = backwards * trained * (model.itemsize + 2 * gradient_bytes)
        weights_to_device = trained * model.itemsize / rates.pcie if self.cuda else 0.0
        if config.mode == "offload" and self.cuda:
            to_host = max(backwards * weights_to_device, added_up / rates.host)
            if config.kl_weight:  # each chunk of both models' logits has a dweight of its own
                pairs = tokens * model.vocab_size * (8 + model.itemsize)
                to_host += pairs / self.chunk_bytes * head * 4 / rates.pcie
            seconds["gradients to host"] = to_host
        else:
            seconds["training"] += added_up / rates.bandwidth
        on_device = self.cuda and config.mode != "offload"
        seconds["AdamW"] = adamw_bytes / (rates.bandwidth if on_device else rates.host)
        if config.mode == "offload":
            seconds["AdamW"] += weights_to_device
        if config.offload_dir is not None:
            seconds["AdamW"] += trained * 2 * state_bytes / rates.disk
        return seconds

    def _sampling_seconds(self, config: TrainConfig, rates: Rates) -> float:
        """Return an update's seconds of sampling, at most."""
        model, sizes, produced = self.model, self.model.sizes, self.completions * self.new_tokens
        read = sizes.matrix_parameters * model.itemsize
        if config.four_bit:  # half a byte read, 2 bytes written; `read` has these read again
            read += sizes.linear_parameters * 5 // 2
        steps = self.new_tokens * -(-self.completions // int(config.rollout_batch))
        reading = steps * read / rates.read
        computing = produced * 2 * sizes.matrix_parameters / rates.sampled_flops
        choosing = produced * model.vocab_size / rates.entries if config.sampling.temperature else 0
        if not self.cuda:
            # A cache grows from nothing, its rows end at different times: 3/4 on average.
            cached = produced * self.cache_bytes * 3 // 4
            return reading + cached / rates.bandwidth + computing + choosing
        # At full length all rows stay to the end: each token reads the keys and values of a cache
        # that is half grown on average, and each of these is written once.
        half_grown = model.cache_bytes(self.prompt_tokens + self.new_tokens // 2)
        cached = produced * half_grown + self.completions * self.cache_bytes
        # A GPU multiplies while it reads the weights; attention and the choice wait for that. All
        # of it overlaps with Python, which launches ahead.
        on_device = max(reading, computing) + cached / rates.bandwidth + choosing
        return max(on_device, steps * (model.launches + CHOICE_LAUNCHES) / rates.launches)


def _even(total: int, size: int) -> int:
    """Return a batch size that needs no more batches than `size` does, but splits evenly."""
    return -(-total // -(-total // size))
