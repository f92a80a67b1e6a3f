"""Whether a gradient tolerance can pay, from shapes, dtypes and what a device takes for each step.

All ranks decide alike, before the first chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .checks import HeadArguments
from .gemm import bf16_isa, operand_dtype


class ChoiceCosts(NamedTuple):
    """Seconds of one device."""

    per_logit: float  # the pass that adds up column masses, less the pass over dy that it saves
    per_entry: float  # of the vocabulary: the choice
    per_chunk: float  # launches, and the wait for the counts
    flops_16: float  # of matrix products, per second
    flops_32: float


# Two cores of an AMD EPYC with AVX512-BF16, one without a 16-bit product (LOG.md).
CPU = ChoiceCosts(1e-9, 40e-9, 2e-3, 0.4e12, 0.15e12)
CPU_WITHOUT_16_BITS = CPU._replace(flops_16=CPU.flops_32)
# By compute capability: planned, from data sheets at four fifths of the peak of dense products. No
# GPU has measured them. The choice adds 12 launches and one kernel of 50 us.
GPUS = {
    (7, 0): ChoiceCosts(0, 0, 130e-6, 80e12, 12e12),
    (7, 5): ChoiceCosts(0, 0, 130e-6, 40e12, 6e12),
    (8, 0): ChoiceCosts(0, 0, 130e-6, 250e12, 15e12),
    (8, 6): ChoiceCosts(0, 0, 130e-6, 60e12, 25e12),
    (8, 9): ChoiceCosts(0, 0, 130e-6, 130e12, 60e12),
    (9, 0): ChoiceCosts(0, 0, 130e-6, 650e12, 50e12),
    (10, 0): ChoiceCosts(0, 0, 130e-6, 1600e12, 60e12),
    (12, 0): ChoiceCosts(0, 0, 130e-6, 180e12, 80e12),
}
# The share of the columns that peaked distributions need at best; a flatter chunk is found out
# when it comes, and stays dense.
BEST_SHARE = 0.02
CHUNK_TOKENS = 512
# Ranks may hold shards of different size, but must agree.
SHARD = 32768


def costs_of(device: torch.device) -> ChoiceCosts:
    """Return the device's costs: of a GPU that is not in the table, those of the next older one."""
    if device.type != "cuda":
        return CPU if bf16_isa() > 0 else CPU_WITHOUT_16_BITS
    capability = torch.cuda.get_device_capability(device)
    older = [known for known in GPUS if known <= capability]
    return GPUS[max(older, default=min(GPUS))]


def why_exact(head: HeadArguments, needs: Sequence[bool]) -> str:
    """Return why no choice of columns can pay in such a call; empty where it may.

    needs: whether gradients of hidden, weight and bias are wanted.
    """
    (tokens, width), entries = head.hidden.shape, len(head.weight)
    if head.group is not None:
        entries = SHARD
    costs, products = costs_of(head.hidden.device), needs[0] + needs[1]
    flops = costs.flops_16 if operand_dtype(head.weight).itemsize == 2 else costs.flops_32
    chunk = min(tokens, CHUNK_TOKENS)
    saved = (1 - BEST_SHARE) * 2 * products * chunk * entries * width / flops
    spent = chunk * entries * costs.per_logit + entries * costs.per_entry + costs.per_chunk
    if products == 0 or saved > spent:
        return ""
    return (
        f"choosing columns takes longer than the products of {tokens} tokens with {entries} x "
        f"{width} weights"
    )
