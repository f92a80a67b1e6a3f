"""Engines: they hold a model's weights and optimizer, and compute its updates."""

from .base import Engine


def engine_of(kind: str) -> type[Engine]:
    """Return the class of the engine that a LaunchSpec names."""
    if kind == "fsdp2":  # FSDP2 and DeepSpeed take seconds to import
        from .fsdp2 import Fsdp2

        return Fsdp2
    if kind == "deepspeed":
        from .deepspeed import DeepSpeed

        return DeepSpeed
    return Engine
