"""Memory of the simulated CUDA device: what nobody has written, and copies that are under way."""

import weakref

import torch

BLOCK_BYTES = 512  # the caching allocator's smallest block


def poison(x):
    """Fill a tensor of the host with what must not be read."""
    if x.dtype.is_floating_point or x.dtype.is_complex:
        return x.fill_(torch.nan)
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).min)


class Memory:
    """One storage of the device: its size, and which op of which stream wrote it last."""

    def __init__(self, nbytes, stream):
        self.nbytes = -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
        self.stream = stream  # on which it was allocated
        self.written = stream, stream.position


class Copy:
    """An asynchronous copy between pinned memory and the device."""

    def __init__(self, host, ours, to_host, stream, memory):
        self.host, self.to_host, self.stream, self.position = host, to_host, stream, stream.position
        self.key, self.values = ours.untyped_storage()._cdata, None
        self.layout = ours.dtype, ours.storage_offset(), ours.size(), ours.stride()
        storage = ours.untyped_storage()
        self.storage = weakref.ref(storage)
        # Memory of another stream may be taken by others once its tensor goes, unless the caller
        # has recorded this stream.
        self.held = storage if not to_host or memory.stream is stream else None
        poison(host if to_host else ours)

    def start(self):
        """Read the source."""
        if self.values is not None:
            return
        storage, (dtype, *layout) = self.storage(), self.layout
        ours = torch.empty(0, dtype=dtype, device="cpu")
        if storage is None:
            self.values = poison(torch.empty_like(self.host))
        elif self.to_host:
            self.values = ours.set_(storage, *layout).clone()
        else:
            self.values = ours.set_(storage, *layout).copy_(self.host)

    def finish(self):
        self.start()
        if self.to_host:
            self.host.copy_(self.values)
