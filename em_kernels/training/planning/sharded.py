"""Settings and memory of one rank where FSDP2 or DeepSpeed shard the model."""

from typing import Any

from ..config import TrainConfig
from ..distributed import LaunchSpec
from ..settings import UserError
from .activations import ModelMemory
from .components import CONTEXT_BYTES, PROCESS_BYTES, SMALL_STATE_BYTES, FixedBytes

BUCKET_ELEMENTS = 2 * 500_000_000  # two buckets of DeepSpeed's default reduce_bucket_size


def sharded_settings(config: TrainConfig, engine: str) -> TrainConfig:
    """Return the settings with mode, precisions and share_prefix as these engines need them.

    Raises: UserError where the settings ask for something else.
    """
    only: dict[str, Any] = {"mode": "full", "moments": "fp32", "gradients": "fp32"}
    for name, value in only.items():
        if (asked := getattr(config, name)) not in ("auto", value):
            raise UserError(
                f"{name}: {asked} does not go with {engine}, which has {value}; launch without "
                f"{engine}"
            )
    for name in ("four_bit", "offload_dir"):
        if getattr(config, name):
            raise UserError(f"{name}: does not go with {engine}; launch without {engine}")
    # A shared prompt would need a backward of its own through every layer.
    return config.model_copy(update={**only, "share_prefix": False})


def sharded_bytes(
    config: TrainConfig, model: ModelMemory, launch: LaunchSpec, cuda: bool
) -> FixedBytes:
    """Return what stays in the memory of one rank. Its weights are whole, for sampling."""
    sizes, trained = model.sizes, model.sizes.trained_parameters
    state = {
        "master": 4 * trained // launch.ranks,
        "moments": 8 * trained // launch.ranks,
        "gradients": 4 * trained // launch.ranks,
    }
    device = {
        "weights": sizes.weight_bytes,
        "buffers": sizes.buffer_bytes,
        "head's gradient": model.vocab_size * model.hidden_size * (4 + model.itemsize),
    }
    if launch.engine == "deepspeed":
        device["buckets"] = min(BUCKET_ELEMENTS, 2 * trained) * model.itemsize
    # Rank 0 gathers the fp32 masters, makes a bf16 copy, and may gather the optimizer's state.
    saves_state = config.save_optimizer
    if saves_state == "auto":
        saves_state = 12 * trained <= SMALL_STATE_BYTES
    saving = (18 if saves_state else 6) * trained // launch.on_machine
    if not cuda:
        return FixedBytes({**device, **state, "saving": saving}, {}, {})
    host = {"process": PROCESS_BYTES, "saving": saving}
    if launch.on_host:
        return FixedBytes({**device, "context": CONTEXT_BYTES}, {**host, **state}, {})
    return FixedBytes({**device, **state, "context": CONTEXT_BYTES}, host, {})
