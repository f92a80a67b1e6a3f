"""A run's processes, one a device: which this one is, who holds what, and what they tell each
other. They are started by `accelerate launch` or torchrun; one process is the special case.
"""

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
PATIENCE = timedelta(hours=2)  # of ranks, while one writes or reads; NCCL's own is ten minutes


class LaunchSpec(NamedTuple):
    """A run's processes.

    on_machine: how many share one host's memory.
    engine: who holds weights and optimizer. replicas: every rank all of them, and gradients are
        added up (what accelerate calls MULTI_GPU or MULTI_CPU); fsdp2: each a part of both;
        deepspeed: weights whole, of gradients and optimizer a part (ZeRO 2).
    on_host: its state is in host memory, as the engine's own settings have it.
    """

    ranks: int = 1
    on_machine: int = 1
    engine: str = "replicas"
    on_host: bool = False


class Ranks:
    """The processes of a run, as one of them sees them.

    index, count: of this process (its rank), and of all.
    device: this process's, with its index.
    """

    def __init__(self, accelerator: Accelerator, device: torch.device) -> None:
        self.accelerator, self.device = accelerator, device
        there = dist.is_initialized()
        # accelerate's own count is 1 where DeepSpeed runs on CPUs
        self.index, self.count = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        state: Any = accelerator.state
        self.plugin: Any = None  # accelerate's settings of the engine
        engine, on_host = "replicas", False
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            engine, self.plugin = "deepspeed", state.deepspeed_plugin
            on_host = self.plugin.offload_optimizer_device != "none"
        elif there and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            engine = "fsdp2"
            self.plugin = getattr(state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
            state.fsdp_plugin = self.plugin  # which accelerate has on GPUs alone
            on_host = type(self.plugin.cpu_offload).__name__ == "CPUOffloadPolicy"
        on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.world = LaunchSpec(self.count, on_machine, engine, on_host)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the run's folder and the console."""
        return self.index == 0

    def describe(self) -> dict[str, Any]:
        """Settings of the launch that change the last digits; empty for one process."""
        if self.world == LaunchSpec():
            return {}
        return {"ranks": self.count, "engine": self.world.engine}

    def gather(self, value: T) -> list[T]:
        """Each rank's, in order; the same list on all."""
        found: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(found, value)
        return found

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, the same bits on all."""
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """The ranks' sum, in place where the devices allow."""
        if self.count == 1:
            return values
        there = values.to(self.device)
        dist.all_reduce(there)
        return there.to(values.device)

    def from_main(self, make: Callable[[], T]) -> T:
        """Make something on rank 0 and share it with every rank. If that raises a UserError, the
        other ranks exit silently.
        """
        if self.count == 1:
            return make()
        found: list[Any] = [None]
        if self.is_main:
            try:
                found = [make()]
            except (UserError, Interrupted) as error:
                found = [error]
        dist.broadcast_object_list(found)
        if isinstance(found[0], UserError):
            self.refuse(found[0])
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    @contextmanager
    def on_main(self, context: AbstractContextManager[T]) -> Iterator[T | None]:
        """A context that rank 0 enters; where it cannot, all end."""
        with ExitStack() as stack:
            found: list[T] = []
            self.from_main(lambda: found.append(stack.enter_context(context)))
            yield found[0] if found else None

    def refuse(self, error: UserError) -> NoReturn:
        """Raise what every rank has found, on rank 0; the others wait for it to say so, as the
        launcher ends all when one ends.
        """
        if not self.is_main:
            time.sleep(5)
            raise SystemExit(2)
        raise error

    def together(self, work: Callable[[], T]) -> T:
        """work(); where it raises Interrupted on one rank, that is raised on all."""
        if self.count == 1:
            return work()
        found: list[T] = []
        with suppress(Interrupted):
            found.append(work())
        if not all(self.gather(bool(found))):
            raise Interrupted("interrupted")
        return found[0]


def find_ranks(device: str, rollouts: int | None = None) -> Ranks:
    """Find the processes that accelerate or torchrun has started.

    Raises: UserError where it asks for what cannot work.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but torch sees no CUDA GPU; use auto or cpu")
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        raise UserError("parallelism_config: is not supported; leave it out of accelerate's")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    cpu = on_cpu and not deepspeed  # accelerate has no DeepSpeed where it is told of CPUs
    make = partial(Accelerator, cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    try:
        accelerator = make()
    except ValueError:  # this process has made one of another device
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = make()
    except ImportError as error:
        raise UserError(f"deepspeed: {error}") from error
    except NotImplementedError as error:  # of cards and drivers without peer-to-peer
        raise UserError(f"device: {error}") from error
    ranks = Ranks(
        accelerator,
        accelerator.device if on_cpu else torch.device("cuda", torch.cuda.current_device()),
    )
    stage, engine = getattr(ranks.plugin, "zero_stage", 2), ranks.world.engine
    if device == "cpu" and torch.cuda.is_available() and engine != "replicas":
        hide = "hide it: CUDA_VISIBLE_DEVICES=''"
        ranks.refuse(UserError(f"device: cpu: {engine} takes the GPU where there is one; {hide}"))
    if getattr(ranks.plugin, "fsdp_version", 2) != 2:
        ranks.refuse(UserError("fsdp: version 1 is not supported; launch with --fsdp_version 2"))
    if stage != 2:
        why = "each process would hold all gradients"
        if stage == 3:
            why = "sampling reads every weight at every token, which it would fetch each time"
        remedy = "use stage 2, or FSDP2"
        ranks.refuse(UserError(f"deepspeed: ZeRO stage {stage} is not supported: {why}; {remedy}"))
    if rollouts is not None and rollouts < ranks.count:
        few = f"{rollouts} are fewer than the {ranks.count} processes"
        ranks.refuse(UserError(f"rollouts: {few}; raise it"))
    ranks.gather(None)  # NCCL has its memory before a plan asks what is free
    return ranks
