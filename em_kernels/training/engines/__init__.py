"""Engines: who holds a model's weights and its optimizer's state, and adds gradients up."""

from .base import Engine


def engine_of(kind: str) -> type[Engine]:
    """The engine that a LaunchSpec names."""
    if kind == "fsdp2":  # torch's part of it takes a second to import
        from .fsdp2 import Fsdp2

        return Fsdp2
    if kind == "deepspeed":
        from .deepspeed import DeepSpeed

        return DeepSpeed
    from .replicas import Replicas

    return Replicas
