"""Launch settings of the Triton kernels: one table for every GPU."""

from typing import NamedTuple


class RowConfig(NamedTuple):
    """Launch settings, all powers of two."""

    statistics_warps: int
    THREAD_V: int  # logits that a thread holds at a time, in the statistics and the column masses
    gradient_warps: int
    BLOCK_N: int  # rows of a gradient program
    BLOCK_V: int  # columns of a gradient program
    # Statistics are split by columns and column masses by rows, until this many warps run on an SM.
    warps_per_sm: int


# Chosen on the compile report's numbers (registers, occupancy, bytes in flight); no GPU has timed
# it yet. The gradient in blocks of 4 x 512 took 88 to 125 registers, which left room for a quarter
# of an H100's warps, and passed the bias through shared memory; one row of 1024 takes 40 to 54
# registers with as many bytes in flight. The statistics with collision and argmax took 77 to 92
# registers in 8 warps and take 62 to 86 in 4, which also waste fewer of an SM's registers. The
# column masses at THREAD_V 16 take 14 to 18 instructions per logit in 62 to 84 registers (with
# softcap 42 to 54 in 97; no variant takes more than 127 registers); at THREAD_V 8 they take 22
# instructions, at 32 16.
DEFAULT = RowConfig(
    statistics_warps=4,
    THREAD_V=16,
    gradient_warps=4,
    BLOCK_N=1,
    BLOCK_V=1024,
    warps_per_sm=64,
)

# Settings measured on a GPU, by its compute capability.
TUNED: dict[tuple[int, int], RowConfig] = {}


def config_for(capability: tuple[int, int]) -> RowConfig:
    """Return the settings for a GPU of this compute capability."""
    return TUNED.get(capability, DEFAULT)
