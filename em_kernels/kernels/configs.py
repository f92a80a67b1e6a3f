"""Launch settings of the Triton rows: one table, for every GPU."""

from typing import NamedTuple


class RowConfig(NamedTuple):
    """Powers of two."""

    statistics_warps: int
    THREAD_V: int  # logits that a thread of the statistics or of the column masses holds at a time
    gradient_warps: int
    BLOCK_N: int  # rows and columns of a gradient program
    BLOCK_V: int
    warps_per_sm: int  # statistics are split by columns, column masses by rows, up to as many


# Chosen on the compile report's numbers (registers, occupancy, bytes in flight); no GPU has timed
# it yet. The gradient in blocks of 4 x 512 took 88 to 125 registers, a quarter of an H100's warps,
# and passed the bias through shared memory; one row of 1024 takes 40 to 54, with as many bytes in
# flight. The statistics with everything took 77 to 92 in 8 warps and take 62 to 86 in 4, which also
# waste fewer of an SM's registers. The column masses at THREAD_V 16: 14 to 18 instructions a logit
# in 62 to 84 registers, 42 to 54 in 97 with softcap, at most 127 in any variant; at 8 22, at 32 16.
DEFAULT = RowConfig(
    statistics_warps=4,
    THREAD_V=16,
    gradient_warps=4,
    BLOCK_N=1,
    BLOCK_V=1024,
    warps_per_sm=64,
)

# (compute capability) -> settings measured on such a GPU
TUNED: dict[tuple[int, int], RowConfig] = {}


def config_for(capability: tuple[int, int]) -> RowConfig:
    """The settings for a GPU of this compute capability."""
    return TUNED.get(capability, DEFAULT)
