"""Matrix products on the CPU whose terms are added up in another order: as valid, and rounded as
another processor might.
"""

import contextlib
import warnings

import torch

from em_kernels.kernels import cpu

PRODUCTS = {  # where the operands of each product stand in its arguments
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
    """Within it every product sums over a permutation, that of the seed, of its inner dimension."""
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
        if a.shape[-1] > 1 and all(1 in x.stride() for x in (a, b)):  # else our own op refuses
            order = torch.randperm(a.shape[-1], generator=torch.Generator().manual_seed(seed))
            operands = a.index_select(-1, order), b.index_select(-2, order)
            arguments = *arguments[:first], *operands, *arguments[first + 2 :]
        return plain.call_boxed(keys, *arguments, **named)

    return product


FAR = 10  # times what another order of sums does; a mistake does a thousand times as much


def assert_as_near(found, expected, others):
    """Tensors or numbers no further from the expected ones than FAR times what those are that were
    computed as the expected ones, with sums in other orders.
    """
    found = list(found)
    for i, (mine, same) in enumerate(zip(found, expected, strict=True)):
        mine, same = (torch.as_tensor(x).double() for x in (mine, same))
        spread = max((torch.as_tensor(other[i]).double() - same).norm() for other in others)
        dtype = torch.as_tensor(found[i]).dtype
        rounding = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        error, allowed = (mine - same).norm(), FAR * spread + 4 * rounding * same.norm()
        assert error <= allowed, f"number {i}: {error:.2e} > {allowed:.2e}"
