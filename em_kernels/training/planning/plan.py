"""A run's plan: what it needs where, what is missing, and what saves memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import TrainConfig
from .run_time import Rates

GIB, MIB = 1 << 30, 1 << 20
PHASES = {  # what is in memory beside what always is
    "sampling": ("KV cache", "next tokens"),
    "head": ("activations", "logits chunk"),
    "backward": ("activations", "recompute, gradients"),
    "optimizer": ("rounding",),
    "saving": ("bf16 copy",),
}


@dataclass(frozen=True)
class Plan:
    """A run's settings with nothing left "auto", and what they need."""

    config: TrainConfig
    device: Mapping[str, int]  # bytes by component; on a CPU all are here
    host: Mapping[str, int]
    device_limit: int
    host_limit: int
    disk: Mapping[str, int]
    download: int
    seconds: Mapping[str, float]  # of an update whose completions are as long as they may be
    once: Mapping[str, float]  # seconds of the run's other parts
    rates: Rates
    pays: bool  # batches are large enough
    remedies: tuple[str, ...] = ()  # where it does not fit

    @property
    def name(self) -> str:
        folder, four_bit = self.config.offload_dir is not None, self.config.four_bit
        return self.config.mode + (" to disk" if folder else " 4bit" if four_bit else "")

    @property
    def device_total(self) -> int:
        """At the phase that needs most."""
        moving = {part for parts in PHASES.values() for part in parts}
        always = sum(size for name, size in self.device.items() if name not in moving)
        return always + peak(self.device)

    @property
    def allocated(self) -> int:
        """Bytes that torch.cuda.max_memory_allocated should report."""
        return self.device_total - sum(self.device.get(n, 0) for n in ("context", "fragments"))

    @property
    def host_total(self) -> int:
        return sum(self.host.values())

    @property
    def missing(self) -> dict[str, int]:
        """Bytes, by side; on a CPU there is one."""
        device, host = self.device_total - self.device_limit, self.host_total - self.host_limit
        sides = {"device": device, "host": host} if self.host else {"host": device}
        return {side: size for side, size in sides.items() if size > 0}

    @property
    def problems(self) -> list[str]:
        limits = {"device": self.device_limit, "host": self.host_limit}
        return [
            f"{size / GIB:.2f} GiB of {side} memory are missing (of "
            f"{(limits[side] + size) / GIB:.2f}, {limits[side] / GIB:.2f} are there)"
            for side, size in self.missing.items()
        ]

    @property
    def fits(self) -> bool:
        return not self.missing

    @property
    def merit(self) -> tuple[bool, bool, int]:
        """By which plans of a mode are ordered."""
        return self.fits, self.fits and self.pays, -sum(self.missing.values())

    @property
    def run_seconds(self) -> float:
        return sum(self.once.values()) + self.config.steps * sum(self.seconds.values())


def phases(device: Mapping[str, int]) -> dict[str, int]:
    """Bytes on the device that come and go."""
    return {name: sum(device.get(part, 0) for part in PHASES[name]) for name in PHASES}


def peak(device: Mapping[str, int]) -> int:
    return max(phases(device).values())


def cheaper(
    config: TrainConfig, cuda: bool, engine: str = "replicas"
) -> list[tuple[str, dict[str, Any]]]:
    """Flags that save memory, and the settings that they change, in the order of their cost."""
    half = max(1, config.sampling.max_new_tokens // 2)
    short = config.sampling.model_copy(update={"max_new_tokens": half})
    folder, full = config.output / "offload", config.mode == "full"
    free, whole = {"offload_dir": None}, config.mode != "lora"
    four = {**free, "mode": "lora", "four_bit": True}
    options: list[tuple[bool, str, dict[str, Any]]] = [
        (config.micro_batch != "auto", "--micro-batch auto", {"micro_batch": "auto"}),
        (config.rollout_batch != "auto", "--rollout-batch auto", {"rollout_batch": "auto"}),
        (
            config.gradient_checkpointing is False,
            "--gradient-checkpointing True",
            {"gradient_checkpointing": True},
        ),
        (config.moments == "fp32", "--moments bf16", {"moments": "bf16"}),
        (config.gradients == "fp32", "--gradients bf16", {"gradients": "bf16"}),
        (full and cuda, "--mode offload", {"mode": "offload"}),
        (
            whole and config.offload_dir is None,
            "--mode offload --offload-dir DIR",
            {"mode": "offload", "offload_dir": folder},
        ),
        (half > 1, f"--max-new-tokens {half}", {"sampling": short}),
        (whole, "--mode lora", {**free, "mode": "lora"}),
        (cuda and not config.four_bit, "--mode lora --4bit", four),
    ]
    fixed = set() if engine == "replicas" else {"mode", "moments", "gradients"}
    return [(text, change) for useful, text, change in options if useful and not fixed & {*change}]
