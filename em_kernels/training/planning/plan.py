"""A run's plan: its settings, memory by component, what is missing, and what would save memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..config import TrainConfig

GIB, MIB = 1 << 30, 1 << 20
PHASES = {  # components that come and go, by the phase in which they are in memory
    "sampling": ("KV cache", "next tokens"),
    "head": ("activations", "logits chunk"),
    "backward": ("activations", "recompute, gradients"),
    "optimizer": ("rounding",),
    "saving": ("bf16 copy",),
}


class Rates(NamedTuple):
    """Speeds of a machine, all per second."""

    flops: float  # of matrix products in training, sustained
    sampled_flops: float  # the same, in sampling
    read: float  # bytes of weights in a sampling step
    entries: float  # vocabulary entries of a row of logits that the samplers choose from
    bandwidth: float  # bytes of the device's memory
    pcie: float  # bytes between host and device
    host: float  # bytes of host memory in AdamW
    disk: float  # bytes
    download: float  # bytes
    launches: float = 100e3  # operations that Python launches on a GPU: 10 us each, estimated


# Two cores of a processor, where a model's layers cannot be measured.
CPU_RATES = Rates(0.15e12, 0.15e12, 15e9, 50e6, 15e9, 15e9, 1e9, 1e9, 50e6)


@dataclass(frozen=True)
class Plan:
    """A run's settings with nothing left "auto", and the memory, disk and time that they need."""

    config: TrainConfig
    device: Mapping[str, int]  # bytes by component; on a CPU all components
    host: Mapping[str, int]
    device_limit: int
    host_limit: int
    disk: Mapping[str, int]
    download: int
    seconds: Mapping[str, float]  # of an update whose completions all have full length
    once: Mapping[str, float]  # seconds of the run's other parts
    rates: Rates
    card: str  # torch's name of the GPU whose published speed the rates assume; empty for a CPU
    pays: bool  # batches are large enough to be efficient
    remedies: tuple[str, ...] = ()  # flags with which it would fit, where it does not

    @property
    def name(self) -> str:
        folder, four_bit = self.config.offload_dir is not None, self.config.four_bit
        return self.config.mode + (" to disk" if folder else " 4bit" if four_bit else "")

    @property
    def device_total(self) -> int:
        """Bytes in the phase that needs most."""
        passing = {part for parts in PHASES.values() for part in parts}
        fixed = sum(size for name, size in self.device.items() if name not in passing)
        return fixed + peak(self.device)

    @property
    def allocated(self) -> int:
        """Bytes that torch.cuda.max_memory_allocated should report, or a CPU process's peak."""
        other = ("context", "fragments", "spare") if self.host else ("graders",)
        return self.device_total - sum(self.device.get(name, 0) for name in other)

    @property
    def host_total(self) -> int:
        return sum(self.host.values())

    @property
    def missing(self) -> dict[str, int]:
        """Bytes that device and host memory are short of; on a CPU, "host" is the only one."""
        device, host = self.device_total - self.device_limit, self.host_total - self.host_limit
        sides = {"device": device, "host": host} if self.host else {"host": device}
        return {side: size for side, size in sides.items() if size > 0}

    @property
    def problems(self) -> list[str]:
        limits = {"device": self.device_limit, "host": self.host_limit}
        return [
            f"{size / GIB:.2f} GiB of {side} memory are missing (it needs "
            f"{(limits[side] + size) / GIB:.2f}, {limits[side] / GIB:.2f} are available)"
            for side, size in self.missing.items()
        ]

    @property
    def fits(self) -> bool:
        return not self.missing

    @property
    def merit(self) -> tuple[bool, bool, int]:
        """Sort key: greatest for a plan that fits and is efficient, then for one that fits."""
        return self.fits, self.fits and self.pays, -sum(self.missing.values())

    @property
    def run_seconds(self) -> float:
        return sum(self.once.values()) + self.config.steps * sum(self.seconds.values())


def phases(device: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes on the device that come and go, by phase."""
    return {name: sum(device.get(part, 0) for part in PHASES[name]) for name in PHASES}


def peak(device: Mapping[str, int]) -> int:
    """Return the bytes that come and go in the phase that needs most."""
    return max(phases(device).values())


def cheaper(config: TrainConfig, cuda: bool, engine: str = "replicas") -> dict[str, dict[str, Any]]:
    """Return flags that save memory, the cheapest first, each with the settings that it changes."""
    half = max(1, config.sampling.max_new_tokens // 2)
    flags: dict[str, dict[str, Any]] = {
        "--micro-batch auto": {"micro_batch": "auto"},
        "--rollout-batch auto": {"rollout_batch": "auto"},
        "--gradient-checkpointing True": {"gradient_checkpointing": True},
        "--moments bf16": {"moments": "bf16"},
        "--gradients bf16": {"gradients": "bf16"},
    }
    if config.mode == "full" and cuda:
        flags["--mode offload"] = {"mode": "offload"}
    if config.mode != "lora" and config.offload_dir is None:
        folder = config.output / "offload"
        flags["--mode offload --offload-dir DIR"] = {"mode": "offload", "offload_dir": folder}
    if half > 1:
        shorter = config.sampling.model_copy(update={"max_new_tokens": half})
        flags[f"--max-new-tokens {half}"] = {"sampling": shorter}
    lora = {"offload_dir": None, "mode": "lora"}
    if config.mode != "lora":
        flags["--mode lora"] = lora
    if cuda and not config.four_bit:
        flags["--mode lora --4bit"] = {**lora, "four_bit": True}
    # What is "auto" already takes the cheaper value by itself. An engine that shards the model has
    # one mode and one precision.
    fixed = set() if engine == "replicas" else {"mode", "moments", "gradients"}
    return {
        flag: change
        for flag, change in flags.items()
        if not fixed & change.keys()
        and any(getattr(config, name) not in ("auto", value) for name, value in change.items())
    }
