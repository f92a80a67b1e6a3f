"""Tensors of the simulated CUDA device, its streams, and the rules of its operations."""

import functools
import threading
import weakref

import torch
from simulated_memory import Copy, Memory, poison
from simulated_products import PRODUCTS, check_product, product_in_fp32
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# The device that C++ sees: it must differ from the CPU, and autograd runs it on the caller's thread
# where a CUDA device would need a thread of its own.
INNER = torch.device("lazy", 0)
TOTAL_BYTES = 6 << 30
# Ops beside pointwise ones that take a scalar from the host.
TAKES_HOST_SCALAR = ("fill_", "masked_fill", "masked_fill_", "index_put", "index_put_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "_unique2")


def is_planning():
    """Return whether torch's own tensors without values are in use, with devices of their own."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def inner_device(x):
    """Return the device that C++ should see for a CUDA device, and anything else unchanged."""
    if is_planning():
        return x
    is_cuda = str(x).startswith("cuda") if isinstance(x, (str, torch.device)) else False
    return INNER if is_cuda else x


class CudaTensor(torch.Tensor):
    """A tensor of the simulated device; its storage is the host's."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda, is_cpu = True, False

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        if function is torch.ops.prim.device.default:
            return INNER
        return SimulatedCuda.active.dispatch(function, arguments, named or {})

    def __getitem__(self, index):
        return super().__getitem__(_index(index))

    def __setitem__(self, index, value):
        super().__setitem__(_index(index), value)

    def __format__(self, spec):
        return format(self.detach().cpu(), spec)

    def __repr__(self):
        return repr(self.detach().cpu())

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, force=False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        return self.detach().cpu().numpy()

    def record_stream(self, stream):
        SimulatedCuda.active.keep(self, stream)

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.detach().clone().requires_grad_(self.requires_grad))


def _index(x):
    """Make tensors of an index's lists, which torch would do without modes."""
    if isinstance(x, list):
        return torch.tensor(x, device=CPU)
    return tuple(map(_index, x)) if isinstance(x, tuple) else x


def plain(x):
    """Return the tensor of the host that has x's memory."""
    if not isinstance(x, CudaTensor):
        return x
    alias = torch.empty(0, dtype=x.dtype, device=CPU)
    return alias.set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


class Stream:
    """A queue of work; `seen` says up to where it, and others it has waited for, must be done."""

    def __init__(self, device=None, priority=0):
        self.position, self.seen = 0, {}

    def advance(self):
        self.position += 1
        self.seen[self] = self.position

    def has_seen(self, stream, position):
        return self.seen.get(stream, 0) >= position

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        for stream, position in event.seen.items():
            self.seen[stream] = max(position, self.seen.get(stream, 0))

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())

    def synchronize(self):
        self.record_event().synchronize()


class Event:
    """A point in a stream."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self.seen = {}

    def record(self, stream=None):
        self.seen = dict((stream or torch.cuda.current_stream()).seen)

    def wait(self, stream=None):
        (stream or torch.cuda.current_stream()).wait_event(self)

    def synchronize(self):
        SimulatedCuda.active.finish(self.seen)

    def query(self):
        self.synchronize()
        return True

    def elapsed_time(self, other):
        return 1.0  # ms


@functools.cache
def _is_composite(function):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(function.name(), "CompositeImplicitAutograd")


@functools.cache
def _written_arguments(function):
    """Return the names of the arguments that an op writes to."""
    arguments = function._schema.arguments
    return [x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write]


class SimulatedCuda(TorchDispatchMode):
    """Mode in which CUDA tensors can be made."""

    active = None

    def __init__(self):
        super().__init__()
        self.stream = self.default_stream = Stream()
        self.memories, self.pinned, self.copies = {}, set(), []
        self.allocated = self.peak = 0
        self.limit = TOTAL_BYTES
        self.graph = None  # that is being captured
        self.is_old_rocm = False  # ROCm before torch 2.10 has no products of 16 bits into fp32
        self.waits = self.steps = 0  # of the host for copies; of Triton's interpreter
        self.lock = threading.RLock()  # a thread of the offload waits for events

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if any(isinstance(x, FakeTensor) for x in tree_leaves((arguments, named))) or is_planning():
            return function(*arguments, **(named or {}))
        if function is torch.ops.prim.device.default:
            return INNER
        return self.dispatch(function, arguments, named or {})

    # Memory

    def wrap(self, x):
        """Return the CUDA tensor that has the memory of a tensor of the host."""
        self.memory_of(x)
        make = torch.Tensor._make_subclass
        return make(CudaTensor, x, False, dispatch_device=True, device_for_backend_keys=CPU)

    def memory_of(self, x):
        """Return the Memory of x's storage, which is counted from the first time on."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.memories:  # or the garbage collector took its Python object for dead
            memory = self.memories[key] = Memory(storage.nbytes(), self.stream)
            weakref.finalize(storage, self._free, key)
            self.allocated += memory.nbytes
            self.peak = max(self.peak, self.allocated)
            if self.allocated > self.limit:
                wanted = memory.nbytes / 2**20
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {wanted} MiB")
        return self.memories[key]

    def _free(self, key):
        self.allocated -= self.memories.pop(key).nbytes

    def keep(self, x, stream):
        """Keep x's memory until the stream's copies of it are done."""
        storage = x.untyped_storage()
        for copy in self.copies:
            if copy.key == storage._cdata and copy.stream is stream:
                copy.held = storage

    def is_pinned(self, x):
        return x.untyped_storage()._cdata in self.pinned

    def pin(self, x):
        storage = x.untyped_storage()
        if storage._cdata not in self.pinned:
            self.pinned.add(storage._cdata)
            weakref.finalize(storage, self.pinned.discard, storage._cdata)
        return x

    # Streams

    def use(self, read, written):
        """Put an op that reads and writes CUDA tensors on the current stream."""
        if self.graph is not None:  # they run when it is replayed
            return
        with self.lock:
            stream = self.stream
            stream.advance()
            for x in (*read, *written):
                key = x.untyped_storage()._cdata
                for copy in self.copies:
                    if copy.key == key and stream.has_seen(copy.stream, copy.position):
                        copy.start()
                if not stream.has_seen(*self.memory_of(x).written):
                    raise RuntimeError("a race: another stream wrote this tensor; wait for it")
            for x in written:
                self.memory_of(x).written = stream, stream.position

    def finish(self, seen):
        """Let all copies arrive that the streams have up to these positions."""
        with self.lock:
            self.waits += 1
            for copy in self.copies[:]:
                if seen.get(copy.stream, 0) >= copy.position:
                    copy.finish()
                    self.copies.remove(copy)

    def copy(self, target, source, non_blocking):
        """Copy between the host and the device."""
        self.refuse_in_graph("a copy from or to the host")
        to_host = not isinstance(target, CudaTensor)
        host, ours = (target, source) if to_host else (source, target)
        self.use([ours] if to_host else [], [] if to_host else [ours])
        flat = host.is_contiguous() and ours.is_contiguous() and host.shape == ours.shape
        if non_blocking and self.is_pinned(host) and flat and host.dtype == ours.dtype:
            memory = self.memory_of(ours)
            self.copies.append(Copy(host, plain(ours), to_host, self.stream, memory))
        else:
            self.finish(self.stream.seen)
            plain(target).copy_(plain(source))
        return target

    def refuse_in_graph(self, what):
        if self.graph is not None:
            self.graph.is_valid = False
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")

    # Ops

    def dispatch(self, function, arguments, named):
        tensors = [x for x in tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, CudaTensor)]
        device = next((x for x in arguments if isinstance(x, torch.device)), named.get("device"))
        device = None if device is None else torch.device(device)
        makes_ours = device is not None and device.type in ("cuda", INNER.type)
        name = function._schema.name.partition("::")[2]
        if not ours and not makes_ours:
            return self._on_host(function, name, arguments, named)
        if function.namespace not in ("aten", "prim", "prims"):
            return self._own_op(function, arguments, named)
        if _is_composite(function):
            with self, torch._C._AutoDispatchBelowAutograd():
                return function.decompose(*arguments, **named)
        host = [x for x in tensors if not isinstance(x, CudaTensor)]
        if name == "copy_" and host:
            return self.copy(*arguments[:2], named.get("non_blocking", len(arguments) > 2))
        if name == "_to_copy" and (host or device == CPU):
            return self._moved(function, arguments[0], named)
        if device == CPU:  # new memory with the shape of ours
            return self._on_host(function, name, tree_map_only(CudaTensor, plain, arguments), named)
        if host:
            self._refuse_host(function, name, arguments, host)
        if name in PRODUCTS:
            check_product(function, arguments, named, self.is_old_rocm)
        return self._on_device(function, name, arguments, named, ours)

    def _on_host(self, function, name, arguments, named):
        if name in ("pin_memory", "_pin_memory"):
            return self.pin(arguments[0].clone())
        if name == "is_pinned":
            return self.is_pinned(arguments[0])
        if named.get("pin_memory"):
            return self.pin(function(*arguments, **named | {"pin_memory": False}))
        return function(*arguments, **named)

    def _own_op(self, function, arguments, named):
        name = function._schema.name
        if name not in OPDEFS:  # it is in C++
            raise NotImplementedError(f"Could not run '{name}' with arguments from 'CUDA'.")
        with self, torch._C._AutoDispatchBelowAutograd():
            return OPDEFS[name]._init_fn(*arguments, **named)

    def _moved(self, function, source, named):
        """Run _to_copy between the devices."""
        self.refuse_in_graph("a copy from or to the host")
        options = {key: x for key, x in named.items() if key in ("dtype", "memory_format")}
        if isinstance(source, CudaTensor):  # cast there
            cast = self._on_device(function, "_to_copy", (source,), options, [source])
            target = torch.empty_like(plain(cast))
            if named.get("non_blocking"):
                self.pin(target)
            return self.copy(target, cast, named.get("non_blocking", False))
        if named.get("non_blocking") and self.is_pinned(source) and "dtype" not in options:
            return self.copy(self.wrap(torch.empty_like(source)), source, True)
        return self.wrap(function(source, **options))

    def _refuse_host(self, function, name, arguments, host):
        if name in INDEXING and isinstance(arguments[0], CudaTensor):
            host = [x for x in arguments[2:3] if x is host[-1]]  # indices may be the host's
        takes_scalar = torch.Tag.pointwise in function.tags or name in TAKES_HOST_SCALAR
        takes_scalar |= name.startswith("_foreach_")
        onto_host = function._schema.is_mutable and any(x is arguments[0] for x in host)
        if onto_host or any(x.dim() > 0 or not takes_scalar for x in host):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({function})"
            )

    def _on_device(self, function, name, arguments, named, ours):
        if name in WAITS:
            self.refuse_in_graph(name)
            self.finish(self.stream.seen)
        names = [x.name for x in function._schema.arguments]
        given = dict(zip(names, arguments, strict=False)) | named
        written = tree_leaves([given[x] for x in _written_arguments(function) if x in given])
        written = [x for x in written if isinstance(x, CudaTensor)]
        self.use(ours, written)
        outer = {}

        def inner(x):
            found = plain(x)
            outer[id(found)] = x, found
            return found

        arguments = tree_map_only(torch.Tensor, inner, arguments)
        named = tree_map_only(torch.Tensor, inner, named)
        if "device" in named:
            named = named | {"device": CPU}
        named.pop("pin_memory", None)
        widens = name in PRODUCTS and function._overloadname.startswith("dtype")
        run = product_in_fp32 if widens else function
        found = run(*arguments, **named)
        if self.graph is not None:
            self.graph.record(run, arguments, named, found)
        for x, plainer in list(outer.values()) if written else ():
            if isinstance(x, CudaTensor) and _layout(x) != _layout(plainer):  # out= was resized
                x.data = self.wrap(plainer)
        if "empty" in name:
            poison(found)

        def wrapped(x):
            return outer[id(x)][0] if id(x) in outer else self.wrap(x)

        return tree_map_only(torch.Tensor, wrapped, found)


def _layout(x):
    return x.untyped_storage()._cdata, x.storage_offset(), x.size(), x.stride()
