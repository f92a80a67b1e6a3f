"""Launch settings of the Triton rows: one table, for every GPU."""

from typing import NamedTuple


class RowConfig(NamedTuple):
    """Powers of two. A statistics program holds THREAD_V logits a thread at a time."""

    statistics_warps: int
    THREAD_V: int
    gradient_warps: int
    BLOCK_N: int  # rows and columns of a gradient program
    BLOCK_V: int
    programs_per_sm: int  # statistics of few rows are split by columns until there are as many


# Chosen on the compile report's numbers (registers, occupancy, bytes in flight); no GPU has timed
# it yet. The gradient in blocks of 4 x 512 took 88 to 125 registers, a quarter of an H100's warps,
# and passed the bias through shared memory; one row of 1024 takes 40 to 66, with as many bytes in
# flight. The statistics with everything took 77 to 92 in 8 warps and take 62 to 86 in 4, which also
# waste fewer of an SM's registers.
DEFAULT = RowConfig(
    statistics_warps=4,
    THREAD_V=16,
    gradient_warps=4,
    BLOCK_N=1,
    BLOCK_V=1024,
    programs_per_sm=16,
)

# (compute capability) -> settings measured on such a GPU
TUNED: dict[tuple[int, int], RowConfig] = {}


def config_for(capability: tuple[int, int]) -> RowConfig:
    """The settings for a GPU of this compute capability."""
    return TUNED.get(capability, DEFAULT)
