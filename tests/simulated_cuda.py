"""A CUDA device simulated on the CPU, on which the GPU tests run where there is no GPU.

Its tensors lie in host memory, say that they are on cuda:0, and obey CUDA's rules:

- tensors of two devices do not meet, but for scalars from the host where CUDA takes them;
- mm and addmm have CUDA's dtypes, with out_dtype and without integers;
- ops of ours without a CUDA kernel refuse them, and Triton kernels refuse tensors of the host;
- new memory, and the target of a copy that is under way, hold NaN or the smallest integer;
- an asynchronous copy happens as late as it may: reading its target before an event, overwriting
  its source, or letting go of its memory gives wrong numbers, and a stream that reads what another
  is still writing raises;
- memory is counted tensor by tensor, in blocks of 512 bytes, and has a limit.

Triton kernels run in Triton's interpreter, with the small blocks of interpreted.py. What this
cannot show: speed; limits of a launch, such as registers and shared memory; races within a kernel;
how a GPU's matrix products, exponentials and reductions round; the fragmentation of its memory; two
devices; kernels of libraries (bitsandbytes, NCCL, flash attention).
"""

import contextlib
import functools
import itertools
import math
import threading
from types import SimpleNamespace

import interpreted
import pytest
import torch
from kernel_params import interpreted_triton
from simulated_graph import Graph
from simulated_tensors import (
    CPU,
    CUDA,
    INNER,
    TOTAL_BYTES,
    CudaTensor,
    Event,
    SimulatedCuda,
    Stream,
    inner_device,
    plain,
)
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from em_kernels.kernels import self_test, triton
from em_kernels.ops import gemm

SM_COUNT = 4  # few enough for the interpreter, enough to split rows and columns
# Large blocks: the interpreter's time is that of its steps, whatever their width.
LOGIT_DTYPES = torch.float32, torch.bfloat16, torch.float16
LAUNCHES = interpreted.SMALL._replace(THREAD_V=64, BLOCK_N=16, BLOCK_V=1024)
MAX_STEPS = 3000  # of the interpreter, which does about a hundred a second
_OPCHECK = "opcheck traces with tensors of its own kind"
NOT_SIMULATED = {
    "test_engines_equal_one_process": "starts other processes",
    "test_entropy_falls[4bit]": "the kernels of bitsandbytes are not simulated",
    "test_opcheck": _OPCHECK,
    "test_opcheck_of_logits": _OPCHECK,
}


def _with_inner_device(function):
    @functools.wraps(function)
    def run(*arguments, **named):
        named = {key: inner_device(x) for key, x in named.items()}
        # transformers loads weights in threads, which have no mode.
        is_thread = threading.current_thread() is not threading.main_thread()
        with SimulatedCuda.active if is_thread else contextlib.nullcontext():
            return function(*map(inner_device, arguments), **named)

    return run


def _made_on_the_host(function):
    """Wrap torch.tensor and torch.as_tensor, which leave modes out while they make a tensor."""

    @functools.wraps(function)
    def run(data, *, device=None, **named):
        contexts = [x for x in _get_current_function_mode_stack() if isinstance(x, DeviceContext)]
        device = inner_device(device or (contexts[-1].device if contexts else CPU))
        if isinstance(data, torch.Tensor) or device != INNER:
            return function(data, device=device, **named)
        requires_grad = named.pop("requires_grad", False)
        return function(data, device=CPU, **named).to(device).requires_grad_(requires_grad)

    return run


def _loaded_on_the_host(from_pretrained):
    """Wrap transformers' loading, whose threads have no mode: load on the host, then copy."""

    @functools.wraps(from_pretrained)
    def run(*arguments, device_map=None, **named):
        found = from_pretrained(*arguments, **named)
        if device_map is None:
            return found
        (host, *rest), attention = found, found[0].config._attn_implementation
        with torch.device(CUDA):
            model = from_pretrained.__self__.from_config(
                host.config, dtype=host.dtype, attn_implementation=attention
            )
        model.load_state_dict(host.state_dict())
        model.generation_config = host.generation_config
        return model.eval(), *rest

    return run


class _Launcher:
    """A Triton kernel that Triton's interpreter runs on the memory of CUDA tensors."""

    def __init__(self, cuda, kernel):
        self.cuda, self.kernel = cuda, kernel

    def __getitem__(self, grid):
        return functools.partial(self.launch, grid)

    def launch(self, grid, *arguments, **named):
        tensors = [x for x in (*arguments, *named.values()) if torch.is_tensor(x)]
        for i, x in enumerate(tensors):
            if not isinstance(x, CudaTensor):
                raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton")
        block = LAUNCHES.THREAD_V * 32 * LAUNCHES.statistics_warps
        self.cuda.steps += math.prod(grid) + tensors[0].numel() // block
        if self.cuda.steps > MAX_STEPS:
            pytest.skip(f"needs over {MAX_STEPS} steps of Triton's interpreter; a GPU runs it")
        self.cuda.use(tensors, tensors)
        run = interpreted._in_interpreter(self.kernel[grid])
        run(*map(plain, arguments), **{key: plain(x) for key, x in named.items()})


@contextlib.contextmanager
def simulated(patch):
    """Simulate a CUDA device; `patch` is a pytest.MonkeyPatch, which the caller undoes."""
    cuda = SimulatedCuda()

    @contextlib.contextmanager
    def stream_context(stream):
        before, cuda.stream = cuda.stream, stream or cuda.stream
        try:
            yield
        finally:
            cuda.stream = before

    def set_limit(fraction, device=None):
        cuda.limit = fraction * TOTAL_BYTES

    def reset_peak(device=None):
        cuda.peak = cuda.allocated

    properties = SimpleNamespace(
        name="simulated",
        major=9,
        minor=0,
        total_memory=TOTAL_BYTES,
        multi_processor_count=SM_COUNT,
        warp_size=32,
    )
    replaced = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "stream": stream_context,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "_sleep": lambda cycles: None,
        "set_device": lambda device: None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: cuda.graph is not None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "current_stream": lambda device=None: cuda.stream,
        "default_stream": lambda device=None: cuda.default_stream,
        "synchronize": lambda device=None: cuda.finish({x.stream: x.position for x in cuda.copies}),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (TOTAL_BYTES - cuda.allocated, TOTAL_BYTES),
        "memory_allocated": lambda device=None: cuda.allocated,
        "memory_reserved": lambda device=None: cuda.allocated,
        "max_memory_allocated": lambda device=None: cuda.peak,
        "max_memory_reserved": lambda device=None: cuda.peak,
        "reset_peak_memory_stats": reset_peak,
        "set_per_process_memory_fraction": set_limit,
        "get_per_process_memory_fraction": lambda device=None: cuda.limit / TOTAL_BYTES,
    }
    for name, value in replaced.items():
        patch.setattr(torch.cuda, name, value)
    for name, kernel in vars(interpreted_triton).items():
        if name.endswith("_kernel"):
            patch.setattr(triton, name, _Launcher(cuda, kernel))
    # torch's own functions ask for CUDA's C++ code.
    patch.setattr(torch.Tensor, "cuda", lambda x, device=None, **named: x.to(CUDA, **named))
    for owner, name in ((torch.Tensor, "to"), (DeviceContext, "__init__")):
        patch.setattr(owner, name, _with_inner_device(getattr(owner, name)))
    for name in ("tensor", "as_tensor"):
        patch.setattr(torch, name, _made_on_the_host(getattr(torch, name)))
    # Module.to() would give a host tensor's Python object the device's memory.
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    for name in ("_host_emptyCache", "_cuda_getCurrentRawStream"):  # the latter for bitsandbytes
        patch.setattr(torch._C, name, lambda *arguments: None, raising=False)
    patch.setattr(triton, "config_for", lambda capability: LAUNCHES)
    # The kernels' self-test takes seconds of the interpreter; test_self_test.py runs it.
    results = (self_test.row_results, self_test.divergence_results)
    tested = itertools.product([CUDA], LOGIT_DTYPES, LOGIT_DTYPES, results)
    patch.setattr(self_test, "_chosen", dict.fromkeys(tested, triton))
    patch.setattr(self_test, "_failures", {})
    patch.setattr(gemm, "_widens", {})
    from transformers import AutoModelForCausalLM

    loading = _loaded_on_the_host(AutoModelForCausalLM.from_pretrained)
    patch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    patch.setattr(SimulatedCuda, "active", cuda)
    with cuda:
        yield cuda
