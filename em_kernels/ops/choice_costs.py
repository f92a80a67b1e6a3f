"""Decides whether a gradient tolerance can pay, from shapes, dtypes and a device's speed.

All ranks decide alike, before the first chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .checks import HeadArguments
from .gemm import bf16_isa, operand_dtype


class ChoiceCosts(NamedTuple):
    """Seconds that one device takes for a choice of columns, and its speed in matrix products."""

    per_logit: float  # the pass that adds up column masses, less the pass over dy that it saves
    per_entry: float  # of the vocabulary: the choice
    per_chunk: float  # launches, and the wait for the counts
    flops_16: float  # of matrix products
    flops_32: float
    bandwidth: float  # bytes of a matrix that few tokens are multiplied with


# Two cores of an AMD EPYC with AVX512-BF16 (LOG.md); a first write to memory is slower than a read.
CPU = ChoiceCosts(0.02e-9, 60e-9, 1e-3, 0.39e12, 0.18e12, 8e9)
CPU_WITHOUT_16_BITS = CPU._replace(flops_16=CPU.flops_32)
# By compute capability: planned, from data sheets at four fifths of the peak of dense products. No
# GPU has measured them. The choice adds 12 launches and one kernel of 50 us.
GPUS = {
    (7, 0): ChoiceCosts(0, 0, 130e-6, 80e12, 12e12, 0.7e12),
    (7, 5): ChoiceCosts(0, 0, 130e-6, 40e12, 6e12, 0.3e12),
    (8, 0): ChoiceCosts(0, 0, 130e-6, 250e12, 15e12, 1.5e12),
    (8, 6): ChoiceCosts(0, 0, 130e-6, 60e12, 25e12, 0.8e12),
    (8, 9): ChoiceCosts(0, 0, 130e-6, 130e12, 60e12, 0.8e12),
    (9, 0): ChoiceCosts(0, 0, 130e-6, 650e12, 50e12, 2.8e12),
    (10, 0): ChoiceCosts(0, 0, 130e-6, 1600e12, 60e12, 6.4e12),
    (12, 0): ChoiceCosts(0, 0, 130e-6, 180e12, 80e12, 1.4e12),
}
# The share of the columns that peaked distributions need at best; a flatter chunk is found out
# when it comes, and stays dense.
BEST_SHARE = 0.02
CHUNK_TOKENS = 512
SHARD = 32768  # entries that each rank counts, as they must agree, whatever their sizes and devices


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
    on_gpu, products = head.hidden.device.type == "cuda", needs[0] + needs[1]
    costs, operand = costs_of(head.hidden.device), operand_dtype(head.weight)
    if head.group is not None:
        entries, costs, operand = SHARD, GPUS[9, 0] if on_gpu else CPU, head.weight.dtype
    flops = costs.flops_16 if operand.itemsize == 2 else costs.flops_32
    chunk, size = min(tokens, CHUNK_TOKENS), entries * width
    computed = products * 2 * chunk * size / flops
    # A GPU writes the zeros of dweight, as many bytes as the product would.
    matrices = needs[0] + (needs[1] and not on_gpu)
    moved = matrices * size * head.weight.dtype.itemsize / costs.bandwidth
    saved = (1 - BEST_SHARE) * max(computed, moved)
    spent = chunk * entries * costs.per_logit + entries * costs.per_entry + costs.per_chunk
    if products == 0 or saved > spent:
        return ""
    return (
        f"choosing columns takes longer than the products of {tokens} tokens with {entries} x "
        f"{width} weights"
    )
