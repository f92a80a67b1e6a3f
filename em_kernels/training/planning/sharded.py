"""Settings and bytes of one rank where FSDP2 or DeepSpeed shard the model."""

from typing import Any

from ..config import TrainConfig
from ..distributed import LaunchSpec
from ..settings import UserError
from .activations import Sketch
from .plan import GIB

CONTEXT = GIB // 2  # of CUDA, libraries' workspaces included
PROCESS = GIB  # of the host beside a GPU: torch, CUDA's libraries
SMALL_STATE = 8 * GIB  # of the optimizer, that save_optimizer auto saves
BUCKETS = 2 * 500_000_000  # elements that DeepSpeed adds up at a time, and the next


def settings_of(config: TrainConfig, engine: str) -> TrainConfig:
    """With what these engines do in one way.

    Raises: UserError where the settings ask for another.
    """
    only: dict[str, Any] = {"mode": "full", "moments": "fp32", "gradients": "fp32"}
    for name, value in only.items():
        if (asked := getattr(config, name)) not in ("auto", value):
            raise UserError(
                f"{name}: {asked} does not go with {engine}, which has {value}; launch without it"
            )
    for name in ("four_bit", "offload_dir"):
        if getattr(config, name):
            raise UserError(f"{name}: does not go with {engine}; launch without it")
    # a prompt computed once would have a backward through every layer of its own
    return config.model_copy(update={**only, "share_prefix": False})


def divided(
    config: TrainConfig, world: LaunchSpec, sketch: Sketch, device: dict[str, int], cuda: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that stay, on the device and on the host. Weights are whole, as sampling has them."""
    count, trained = world.ranks, sketch.sizes.trained
    state = {
        "master": 4 * trained // count,
        "moments": 8 * trained // count,
        "gradients": 4 * trained // count,
    }
    head = sketch.words * sketch.width * (4 + sketch.itemsize)
    device = {**device, "head's gradient": head}
    if world.engine == "deepspeed":
        device["buckets"] = min(BUCKETS, 2 * trained) * sketch.itemsize
    # rank 0 has the masters, and rounds them; before that the optimizer's state, where it is saved
    keeps = config.save_optimizer
    keeps = 12 * trained <= SMALL_STATE if keeps == "auto" else keeps
    saving = (18 if keeps else 6) * trained // world.on_machine
    if not cuda:
        return {**device, **state, "saving": saving}, {}
    host = {"process": PROCESS, "saving": saving}
    if world.on_host:
        return {**device, "context": CONTEXT}, {**host, **state}
    return {**device, **state, "context": CONTEXT}, host
