"""Row kernels: a chunk of raw logits in, statistics or their gradient out. One file a device, one
interface.

row_statistics(y, bias, inv_temperature, logit_scale, softcap, targets) -> RowParts
row_gradient(y, bias, inv_temperature, logit_scale, softcap, targets, m, log_s, factors) -> dy, in
y's memory

y (rows, V) raw logits in fp32 or fp64; everything per row is (rows,) in y's dtype, targets int64.
"""

from types import ModuleType

from torch import Tensor

from . import cpu, portable


def kernels_for(y: Tensor) -> ModuleType:
    """The fastest row kernels that this machine has for y."""
    return cpu if cpu.supports(y) else portable
