"""A second copy of kernels/triton.py and its kernels, run on the CPU by Triton's interpreter."""

import functools
import importlib.util

import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import em_kernels.kernels.triton as compiled
from em_kernels.kernels import triton_columns, triton_finish, triton_kernels
from em_kernels.kernels.configs import DEFAULT

# Few lanes, as the interpreter merges them one by one; few columns, so that rows have blocks.
FUNCTIONS = (
    "row_statistics",
    "finish_rows",
    "gradient_factors",
    "row_gradient",
    "column_mass",
    "choose_columns",
    "gradient_of_columns",
)
SMALL = DEFAULT._replace(statistics_warps=1, BLOCK_N=2, BLOCK_V=256)


def _in_interpreter(function):
    """Wrap a launch so that tl.sum and the like, already compiled at import, are interpreted."""

    @functools.wraps(function)
    def run(*arguments, **named):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in list(vars(tl).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(tl, name, InterpretedFunction(value.fn))
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
    for module in (triton_kernels, triton_finish, triton_columns, compiled):
        copy = _copy(module)
        copy.core = tl.core  # the interpreter patches what the kernels' module names
        vars(copy).update((name, functions[name]) for name in functions if hasattr(copy, name))
        made = {k: x for k, x in vars(copy).items() if isinstance(x, InterpretedFunction)}
        functions |= made
    for name in FUNCTIONS:
        setattr(copy, name, _in_interpreter(getattr(copy, name)))
    copy.config_for = lambda capability: SMALL
    return copy
