"""A run's processes, one per device, started by `accelerate launch` or torchrun, or just one."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from .interrupts import Interrupted
from .settings import UserError

T = TypeVar("T")
ENGINES = ("replicas", "fsdp2", "deepspeed")
TIMEOUT = timedelta(hours=2)  # while rank 0 reads or writes; NCCL's own is ten minutes


class LaunchSpec(NamedTuple):
    """A run's processes, and who holds weights and optimizer.

    engine: replicas: every rank holds all of both, and gradients are added up; fsdp2: a part of
        both; deepspeed: all weights, and a part of gradients and optimizer (ZeRO 2).
    """

    ranks: int = 1
    on_machine: int = 1  # ranks that share a host's memory
    engine: str = "replicas"
    on_host: bool = False  # the engine keeps the optimizer's state in host memory


class Ranks:
    """A run's processes, as one of them sees them: its rank is `index`, one of `count`."""

    def __init__(self, accelerator: Accelerator, device: torch.device) -> None:
        self.accelerator, self.device = accelerator, device
        several = dist.is_initialized()
        # accelerate's own count is 1 where DeepSpeed runs on CPUs.
        self.index, self.count = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        state: Any = accelerator.state
        self.plugin: Any = None  # accelerate's settings of the engine
        engine, on_host = "replicas", False
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            engine, self.plugin = "deepspeed", state.deepspeed_plugin
            on_host = self.plugin.offload_optimizer_device != "none"
        elif several and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            engine = "fsdp2"
            self.plugin = getattr(state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
            state.fsdp_plugin = self.plugin  # accelerate sets it on GPUs only
            on_host = type(self.plugin.cpu_offload).__name__ == "CPUOffloadPolicy"
        on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.launch = LaunchSpec(self.count, on_machine, engine, on_host)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the run's folder and the console."""
        return self.index == 0

    def gather(self, value: T) -> list[T]:
        """Return each rank's value, in order; the same list on all."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def total(self, values: Sequence[float]) -> list[float]:
        """Return sums over the ranks, the same bits on all."""
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks, in place if the values are on this rank's device."""
        if self.count == 1:
            return values
        total = values.to(self.device)
        dist.all_reduce(total)
        return total.to(values.device)

    def from_main(self, make: Callable[[], T]) -> T:
        """Return what make() returns on rank 0. If it raises a UserError there, the others exit
        silently; Interrupted is raised on all.
        """
        if self.count == 1:
            return make()
        made: list[Any] = [None]
        if self.is_main:
            try:
                made = [make()]
            except (UserError, Interrupted) as error:
                made = [error]
        dist.broadcast_object_list(made)
        if isinstance(made[0], UserError):
            self.refuse(made[0])
        if isinstance(made[0], BaseException):
            raise made[0]
        return made[0]

    @contextmanager
    def on_main(self, context: AbstractContextManager[T]) -> Iterator[T | None]:
        """Enter a context on rank 0 and yield its value there; if it fails, all ranks exit."""
        with ExitStack() as stack:
            entered: list[T] = []
            self.from_main(lambda: entered.append(stack.enter_context(context)))
            yield entered[0] if entered else None

    def refuse(self, error: UserError) -> NoReturn:
        """Raise on rank 0 an error that all ranks found, and exit on the others."""
        if not self.is_main:
            time.sleep(5)  # The launcher ends all when one ends: rank 0 prints the error first.
            raise SystemExit(2)
        raise error

    def together(self, work: Callable[[], T]) -> T:
        """Return work(); where it raises Interrupted on one rank, raise that on all."""
        if self.count == 1:
            return work()
        done: list[T] = []
        with suppress(Interrupted):
            done.append(work())
        if not all(self.gather(bool(done))):
            raise Interrupted("interrupted")
        return done[0]


def find_ranks(device: str, rollouts: int | None = None) -> Ranks:
    """Find the processes that accelerate or torchrun has started; each needs a rollout."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no CUDA GPU; use auto or cpu")
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        raise UserError("parallelism_config: is not supported; remove it from accelerate's config")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    cpu = on_cpu and not deepspeed  # with cpu=True accelerate leaves DeepSpeed out
    make = partial(Accelerator, cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    try:
        accelerator = make()
    except ValueError:  # this process has made an Accelerator for another device
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = make()
    except ImportError as error:
        raise UserError(f"deepspeed: {error}") from error
    except NotImplementedError as error:  # cards and drivers without peer-to-peer
        raise UserError(f"device: {error}") from error
    gpu = None if on_cpu else torch.device("cuda", torch.cuda.current_device())
    ranks = Ranks(accelerator, gpu or accelerator.device)
    stage, engine = getattr(ranks.plugin, "zero_stage", 2), ranks.launch.engine
    if device == "cpu" and torch.cuda.is_available() and engine != "replicas":
        hide = "hide it: CUDA_VISIBLE_DEVICES=''"
        ranks.refuse(UserError(f"device: cpu: {engine} takes the GPU where there is one; {hide}"))
    if getattr(ranks.plugin, "fsdp_version", 2) != 2:
        ranks.refuse(UserError("fsdp: version 1 is not supported; launch with --fsdp_version 2"))
    if stage != 2:
        fetched = "sampling would fetch every weight from the other processes for each token"
        why = fetched if stage == 3 else "each process would hold all gradients"
        remedy = "use stage 2, or FSDP2"
        ranks.refuse(UserError(f"deepspeed: ZeRO stage {stage} is not supported: {why}; {remedy}"))
    if rollouts is not None and rollouts < ranks.count:
        few = f"{rollouts} are fewer than the {ranks.count} processes"
        ranks.refuse(UserError(f"rollouts: {few}; raise it"))
    ranks.gather(None)  # makes NCCL take its memory before a plan asks what is free
    return ranks
