"""A second copy of kernels/triton.py and its kernels, run on the CPU by Triton's interpreter."""

import functools
import importlib.util

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, ReduceOps
from triton.runtime.jit import JITFunction

import em_kernels.kernels.triton as compiled
from em_kernels.kernels import triton_columns, triton_divergence, triton_finish, triton_kernels
from em_kernels.kernels.configs import DEFAULT

FUNCTIONS = (
    "row_statistics",
    "finish_rows",
    "gradient_factors",
    "row_gradient",
    "column_mass",
    "choose_columns",
    "gradient_of_columns",
    "divergence_sums",
    "divergence_gradient",
)
# Few lanes and columns, so that rows have blocks.
SMALL = DEFAULT._replace(statistics_warps=1, BLOCK_N=2, BLOCK_V=256)


convert_float = interpreter._convert_float


def _rounded(values, source, target, rounding_mode):
    """Convert as GPUs do; the interpreter's own conversion to bf16 truncates."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return convert_float(values, source, target, rounding_mode)
    rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
    return rounded.view(torch.uint16).numpy()


def _reduce_in_halves(self, given):
    """Merge lanes half with half, as a GPU does; the interpreter takes them one by one."""
    flat = self.axis is None
    arrays = [x.handle.data.ravel() if flat else x.handle.data for x in given]
    axis, dtypes = 0 if flat else self.axis, [x.dtype for x in given]
    while arrays[0].shape[axis] > 1:
        halves = zip(*(np.split(x, 2, axis) for x in arrays), strict=True)
        lanes = (x for half in halves for x in half)
        merged = self.combine_fn.fn(*map(self.to_tensor, lanes, dtypes * 2))
        arrays = [x.handle.data for x in (merged if isinstance(merged, tuple) else (merged,))]
    if not self.keep_dims:
        arrays = [x.squeeze(axis) for x in arrays]
    elif flat:
        arrays = [x.reshape((1,) * len(given[0].shape)) for x in arrays]
    return [self.to_tensor(x, dtype) for x, dtype in zip(arrays, dtypes, strict=True)]


def _in_interpreter(function):
    """Wrap a launch so that tl.sum and the like, already compiled at import, are interpreted."""

    @functools.wraps(function)
    def run(*arguments, **named):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in list(vars(tl).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(tl, name, InterpretedFunction(value.fn))
            patch.setattr(interpreter, "_convert_float", _rounded)
            patch.setattr(ReduceOps, "generic_reduce", _reduce_in_halves)
            # The launch patches the language once; without this each call would, slowly.
            patch.setattr(InterpretedFunction, "__call__", lambda f, *a, **k: f.rewrite()(*a, **k))
            return function(*arguments, **named)

    return run


def _copy(module):
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_copy", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(copy)
    return copy


def load():
    """Return the copy, with the launch settings SMALL; it counts one multiprocessor."""
    functions = {}
    modules = triton_kernels, triton_finish, triton_columns, triton_divergence, compiled
    for module in modules:
        copy = _copy(module)
        copy.core = tl.core  # the interpreter patches what the kernels' module names
        vars(copy).update((name, functions[name]) for name in functions if hasattr(copy, name))
        made = {k: x for k, x in vars(copy).items() if isinstance(x, InterpretedFunction)}
        functions |= made
    for name in FUNCTIONS:
        setattr(copy, name, _in_interpreter(getattr(copy, name)))
    copy.config_for = lambda capability: SMALL
    return copy
