"""Memory beyond the GPU's: transfers through pinned buffers, and state in memory-mapped files."""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

from ..settings import UserError

BUFFER_BYTES = 64 << 20  # torch rounds pinned blocks up to a power of two; WSL pins under 1 GiB


class Bounce:
    """Two pinned buffers between a GPU and the host, and a thread that empties them."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self.side = torch.cuda.Stream(device) if on_gpu else None
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.busy: list[Callable[[], object]] = [lambda: None] * 2  # waits until a buffer is free
        self.turn = 0
        self.buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8) for _ in range(2)]
        try:
            self.buffers = [x.pin_memory() if on_gpu else x for x in self.buffers]
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            warnings.warn(f"offload: slower, as no memory can be pinned: {reason}", stacklevel=3)

    def _next(self, like: Tensor) -> Tensor:
        self.turn ^= 1
        self.busy[self.turn]()
        return self.buffers[self.turn][: like.nbytes].view(like.dtype).view(like.shape)

    def fetch(self, source: Tensor, put: Callable[[slice, Tensor], None], reused: bool) -> None:
        """Start copying a contiguous source to the host in parts; the thread calls put(part, copy).

        Args:
            reused: the caller will overwrite the source, so the current stream waits for the copy.
        """
        rows = max(1, BUFFER_BYTES // max(1, source[:1].nbytes))
        for start in range(0, len(source), rows):
            part = slice(start, min(start + rows, len(source)))
            host = self._next(source[part])
            arrived = self._copy(host, source[part])
            job = self.thread.submit(_put_when_arrived, arrived, put, part, host)
            self.busy[self.turn] = job.result
        if self.side is not None and reused:
            torch.cuda.current_stream(source.device).wait_stream(self.side)

    def _copy(self, host: Tensor, source: Tensor) -> Callable[[], object]:
        """Start a copy, and return a function that waits for it."""
        if self.side is None:
            host.copy_(source)
            return lambda: None
        self.side.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self.side):
            host.copy_(source, non_blocking=True)
            source.record_stream(self.side)  # keeps its memory until it is copied
            return _waiter_for(self.side)

    def send(self, target: Tensor, values: Tensor) -> None:
        """Copy host values, at most a buffer, into a target, in the order of the current stream."""
        host = self._next(target)
        host.copy_(values)  # casts
        target.copy_(host, non_blocking=True)
        if target.is_cuda:
            self.busy[self.turn] = _waiter_for(torch.cuda.current_stream(target.device))

    def wait(self) -> None:
        """Wait until the host has everything, and the buffers are free."""
        for done in self.busy:
            done()

    def close(self) -> None:
        self.thread.shutdown()


def _put_when_arrived(arrived: Callable, put: Callable, part: slice, host: Tensor) -> None:
    arrived()
    put(part, host)


def _waiter_for(stream: torch.cuda.Stream) -> Callable[[], object]:
    """Return a function that waits, asleep, for the stream's work so far."""
    return stream.record_event(torch.cuda.Event(blocking=True)).synchronize


def zeros_in_memory(
    device: torch.device, kinds: Mapping[str, Sequence[tuple[int, torch.dtype]]]
) -> dict[str, list[Tensor]]:
    """Return zeros (n,) for each (n, dtype), in one block of memory for each kind.

    A GPU's allocator would round each tensor up, to as much as 2 MiB.
    """
    zeros = {}
    for kind, tensors in kinds.items():
        size = sum(map(_aligned_bytes, tensors))
        # zero_() makes a host that lacks the memory fail here, and not in the first update.
        arena = torch.empty(size, dtype=torch.uint8, device=device).zero_()
        zeros[kind] = _tensors_in(arena, tensors)
    return zeros


def zeros_in_files(
    folder: Path, kinds: Mapping[str, Sequence[tuple[int, torch.dtype]]]
) -> dict[str, list[Tensor]]:
    """Return zeros (n,) for each (n, dtype), in a mapped file for each kind."""
    sizes = {kind: sum(map(_aligned_bytes, tensors)) for kind, tensors in kinds.items()}
    need = sum(sizes.values())
    remedy = "choose another folder, or leave it out to use memory"
    if not hasattr(os, "posix_fallocate"):
        raise UserError("offload_dir: needs Linux; leave it out to use memory")
    zeros = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if need > free:  # checked first: a reservation that fails has filled the disk
            found = f"{need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            raise UserError(f"offload_dir: {folder} needs {found}; {remedy}")
        for kind, size in sizes.items():
            # Unlinked once it is mapped: on Linux the file goes with the process, however it ends.
            with NamedTemporaryFile(dir=folder, prefix=f"{kind}.") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # else a full disk is a SIGBUS later
                arena = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
            zeros[kind] = _tensors_in(arena, kinds[kind])
    except OSError as error:
        raise UserError(f"offload_dir: {folder}: {error.strerror}; {remedy}") from error
    return zeros


def _aligned_bytes(tensor: tuple[int, torch.dtype]) -> int:
    """Return a tensor's bytes, in multiples of 16 elements: kernels load 16 bytes at a time."""
    count, dtype = tensor
    return -(-count // 16) * 16 * dtype.itemsize


def _tensors_in(arena: Tensor, tensors: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    parts = zip(arena.split(list(map(_aligned_bytes, tensors))), tensors, strict=True)
    return [part[: n * d.itemsize].view(d) for part, (n, d) in parts]
