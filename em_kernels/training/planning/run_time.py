"""How long a run takes, from a few rates."""

from typing import NamedTuple

from ..config import TrainConfig
from .activations import Sketch


class Rates(NamedTuple):
    """Speeds of a machine; all per second."""

    flops: float  # of matrix products, sustained
    bandwidth: float  # bytes of the device's memory
    pcie: float  # bytes between host and device
    host: float  # bytes of host memory in AdamW
    disk: float  # bytes
    download: float  # bytes
    layers: float  # of a model that Python starts when it samples


RATES = {  # a 24 GB card of the RTX 3090 and 4090's class; two cores of a processor
    "cuda": Rates(60e12, 800e9, 20e9, 20e9, 2e9, 50e6, 3000),
    "cpu": Rates(0.15e12, 15e9, 15e9, 10e9, 1e9, 50e6, 3000),
}


class Work(NamedTuple):
    """Amounts of work in one update that the settings alone do not give."""

    prompt_tokens: int  # that are computed
    micro_batches: int
    prompts: int  # whose backward is apart
    cache: int  # bytes of a completion
    checkpoints: int  # bytes of the run's


def seconds_of(
    config: TrainConfig, sketch: Sketch, work: Work, rates: Rates, download: int
) -> tuple[dict[str, float], dict[str, float]]:
    """At most, as completions have full length: of one update by phase; of the rest of the run."""
    new, lora = config.sampling.max_new_tokens, config.mode == "lora"
    sizes, itemsize = sketch.sizes, sketch.itemsize
    multiplied, trained, head = sizes.multiplied, sizes.trained, sketch.words * sketch.width
    read = multiplied * itemsize
    if config.four_bit:  # half a byte each, unpacked to memory and read again
        read += sizes.linear * 5 // 2
    steps = new * -(-config.rollouts // int(config.rollout_batch))
    fetched = steps * read + config.rollouts * new * work.cache * 3 // 4
    produced = config.rollouts * new * 2 * multiplied
    seconds = {
        "sampling": max(
            fetched / rates.bandwidth,
            produced / rates.flops,
            steps * sketch.layers / rates.layers,
        )
    }
    tokens = config.rollouts * new + work.prompt_tokens
    flops = (4 if lora else 6) * multiplied
    flops += 2 * (multiplied - head) if config.gradient_checkpointing else 0
    seconds["training"] = tokens * flops / rates.flops
    gradient = 2 if config.gradients == "bf16" else 4
    kept = 4 + 2 * (2 if config.moments == "bf16" else 4)
    offload = config.mode == "offload"
    if offload:
        backwards = work.micro_batches + work.prompts
        seconds["gradients to host"] = backwards * max(
            trained * itemsize / rates.pcie, trained * (itemsize + 2 * gradient) / rates.host
        )
    through = rates.host if offload else rates.bandwidth
    seconds["AdamW"] = trained * (2 * kept + gradient) / through
    if offload:
        seconds["AdamW"] += trained * itemsize / rates.pcie
    if config.offload_dir is not None:
        seconds["AdamW"] += trained * 2 * kept / rates.disk
    once = {
        "download": download / rates.download,
        "loading": sizes.weights / rates.disk,
        "checkpoints": work.checkpoints / rates.disk,
    }
    return seconds, once
