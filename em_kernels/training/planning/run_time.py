"""Estimate an update's seconds from the rates of a machine."""

from ..config import TrainConfig
from ..engines.optimizer import PRECISIONS
from .activations import ModelMemory
from .batch_sizes import BatchSizes
from .plan import Rates


def update_seconds(
    config: TrainConfig, model: ModelMemory, batches: BatchSizes, rates: Rates
) -> dict[str, float]:
    """Return an update's seconds by phase, an upper bound: each completion has full length."""
    new, sizes, itemsize = config.sampling.max_new_tokens, model.sizes, model.itemsize
    matrices, trained = sizes.matrix_parameters, sizes.trained_parameters
    read = matrices * itemsize
    if config.four_bit:  # read half a byte each, write 2 bytes; `read` has these read again
        read += sizes.linear_parameters * 5 // 2
    steps = new * -(-batches.completions // int(config.rollout_batch))
    # A cache grows from nothing, and its rows end at different times: three quarters on average.
    fetched = steps * read + batches.completions * new * batches.cache_bytes * 3 // 4
    produced = batches.completions * new * 2 * matrices
    seconds = {
        "sampling": max(
            fetched / rates.bandwidth, produced / rates.flops, steps * model.layers / rates.layers
        )
    }
    flops = (4 if config.mode == "lora" else 6) * matrices
    if config.gradient_checkpointing:
        flops += 2 * (matrices - model.vocab_size * model.hidden_size)
    tokens = batches.completions * new + batches.prompt_tokens * batches.computed_prompts
    seconds["training"] = tokens * flops / rates.flops
    gradient_bytes = PRECISIONS[config.gradients].itemsize
    state_bytes = 4 + 2 * PRECISIONS[config.moments].itemsize  # master and both moments
    adamw_bytes = trained * (2 * state_bytes + gradient_bytes)
    if config.mode == "offload":
        backwards = batches.micro_batches + batches.shared_prompts
        added_up = trained * (itemsize + 2 * gradient_bytes)
        seconds["gradients to host"] = backwards * max(
            trained * itemsize / rates.pcie, added_up / rates.host
        )
        seconds["AdamW"] = adamw_bytes / rates.host + trained * itemsize / rates.pcie
    else:
        seconds["AdamW"] = adamw_bytes / rates.bandwidth
    if config.offload_dir is not None:
        seconds["AdamW"] += trained * 2 * state_bytes / rates.disk
    return seconds
