"""GPU generations that the kernels are compiled for, and their limits."""

from typing import NamedTuple

from triton.backends.compiler import GPUTarget

REGISTERS_PER_SM = 65536  # 32-bit, on every generation here; a warp gets a multiple of 256
BLOCK_OVERHEAD = 1024  # bytes of shared memory per block that CUDA itself uses


class Arch(NamedTuple):
    """Limits of an SM, from "Technical Specifications per Compute Capability" in the CUDA guide,
    or of an AMD compute unit.
    """

    warps: int
    blocks: int
    shared_kib: int  # per SM; a block may use 1 KiB less
    lanes: int = 32  # of a warp
    registers: int = 0  # AMD's: a lane's share of all SIMDs' together


ARCHS: dict[int | str, Arch] = {
    75: Arch(warps=32, blocks=16, shared_kib=64),
    80: Arch(warps=64, blocks=32, shared_kib=164),
    86: Arch(warps=48, blocks=16, shared_kib=100),
    89: Arch(warps=48, blocks=24, shared_kib=100),
    90: Arch(warps=64, blocks=32, shared_kib=228),
    100: Arch(warps=64, blocks=32, shared_kib=228),
    120: Arch(warps=48, blocks=24, shared_kib=100),
    "gfx942": Arch(warps=32, blocks=32, shared_kib=64, lanes=64, registers=4 * 512),
    "gfx1100": Arch(warps=32, blocks=32, shared_kib=64, registers=2 * 1536),
}


def gpu_name(arch: int | str) -> str:
    return f"sm{arch}" if isinstance(arch, int) else arch


def target(arch: int | str) -> GPUTarget:
    """Return the target of Triton's compiler."""
    if isinstance(arch, int):
        return GPUTarget("cuda", arch, 32)
    return GPUTarget("hip", arch, ARCHS[arch].lanes)


def warps_per_sm(arch: Arch, warps: int, registers: int, shared: int) -> int:
    """Return how many warps fit on an SM at once: the theoretical occupancy."""
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS_PER_SM // 4 // warp_registers * 4 // warps  # in each quarter
    by_shared = arch.shared_kib * 1024 // (shared + BLOCK_OVERHEAD)
    return warps * min(arch.warps // warps, arch.blocks, by_registers, by_shared)
