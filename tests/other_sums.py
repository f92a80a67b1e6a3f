"""CPU matrix products that sum in another order, and so round as another processor might."""

import contextlib
import warnings

import torch

from em_kernels.kernels import cpu

PRODUCTS = {  # position of each product's first operand in its arguments
    "aten::mm": 0,
    "aten::mm.out": 0,
    "aten::bmm": 0,
    "aten::bmm.out": 0,
    "aten::addmm": 1,
    "aten::addmm.out": 1,
    "aten::baddbmm": 1,
    "aten::baddbmm.out": 1,
    "aten::baddbmm_": 1,
    "aten::addmm_": 1,
    "em_kernels::gemm_bf16": 1,
}


@contextlib.contextmanager
def other_sums(seed):
    """Let every product sum over its inner dimension in an order drawn from the seed."""
    libraries = {name: torch.library.Library(name, "IMPL") for name in ("aten", "em_kernels")}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*only once for all operators")
            for name, first in PRODUCTS.items():
                namespace, op = name.split("::")
                if namespace == "aten" or cpu.is_built():
                    product = permuted(torch.library.get_kernel(name, "CPU"), first, seed)
                    libraries[namespace].impl(
                        op, product, "CPU", with_keyset=True, allow_override=True
                    )
        yield
    finally:
        for library in libraries.values():
            library._destroy()


def permuted(plain, first, seed):
    def product(keys, *arguments, **named):
        a, b = arguments[first : first + 2]
        # Our own op refuses operands without a stride of 1.
        if a.shape[-1] > 1 and all(1 in x.stride() for x in (a, b)):
            order = torch.randperm(a.shape[-1], generator=torch.Generator().manual_seed(seed))
            operands = a.index_select(-1, order), b.index_select(-2, order)
            arguments = *arguments[:first], *operands, *arguments[first + 2 :]
        return plain.call_boxed(keys, *arguments, **named)

    return product


FAR = 10  # allowed multiple of another summation order's error; mistakes make 1000


def assert_as_near(found, expected, others):
    """Check that found is at most FAR times as far from expected as the others are.

    Each is a list of tensors or numbers; others were computed as expected was, with sums in other
    orders.
    """
    found = list(found)
    for i, (mine, same) in enumerate(zip(found, expected, strict=True)):
        mine, same = (torch.as_tensor(x).double() for x in (mine, same))
        spread = max((torch.as_tensor(other[i]).double() - same).norm() for other in others)
        dtype = torch.as_tensor(found[i]).dtype
        rounding = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        error, allowed = (mine - same).norm(), FAR * spread + 4 * rounding * same.norm()
        assert error <= allowed, f"number {i}: {error:.2e} > {allowed:.2e}"
