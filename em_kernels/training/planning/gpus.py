"""Cards that `plan --gpu` knows: their usable memory, and the speed that a plan's seconds assume.

Estimates: no GPU has confirmed a plan's seconds, nor the shares of the published peaks below.
"""

from typing import NamedTuple

import torch

from ..config import Sampling
from ..rollouts.next_tokens import has_candidates
from ..settings import UserError
from .plan import Rates


class Card(NamedTuple):
    """A card and its maker's published figures.

    usable_gib: what torch.cuda.mem_get_info reports as total, as users' error messages quote it,
        less 1 GiB for a desktop on a GeForce card and 1 % on others, rounded down to half a GiB.
        T4, A10 and L4 report 1.4 to 2 GiB less than they are sold with, as error correction takes
        a sixteenth.
    tflops: dense tensor products of bf16 (T4: fp16) with fp32 accumulation, from the data sheets of
        T4, A10, L4, A100 and H100 SXM (L4 and H100: half of what these give with sparsity) and the
        appendices of NVIDIA's architecture white papers: GA102 (RTX 3090), Ada (4090), RTX
        Blackwell (5090). GeForce cards accumulate in fp32 at half their rate. For the RTX 3060
        none is published: 112 tensor cores, 128 operations a clock as on the 3090, 1.777 GHz.
    gb_per_s: memory bandwidth, from the same documents.
    """

    name: str  # as torch.cuda.get_device_name has it
    usable_gib: float
    tflops: float
    gb_per_s: float
    capability: tuple[int, int]
    pcie: int  # generation


CARDS = {
    "t4": Card("Tesla T4", 14, 65, 320, (7, 5), 3),
    "a10": Card("NVIDIA A10", 21.5, 125, 600, (8, 6), 4),
    "l4": Card("NVIDIA L4", 21.5, 121, 300, (8, 9), 4),
    "3060": Card("NVIDIA GeForce RTX 3060", 10.5, 25.5, 360, (8, 6), 4),
    "3090": Card("NVIDIA GeForce RTX 3090", 22.5, 71, 936, (8, 6), 4),
    "4090": Card("NVIDIA GeForce RTX 4090", 22.5, 165.2, 1008, (8, 9), 4),
    "5090": Card("NVIDIA GeForce RTX 5090", 30, 209.5, 1792, (12, 0), 5),
    "a100-40": Card("NVIDIA A100-SXM4-40GB", 38.5, 312, 1555, (8, 0), 4),
    "a100-80": Card("NVIDIA A100-SXM4-80GB", 78, 312, 2039, (8, 0), 4),
    "h100": Card("NVIDIA H100 80GB HBM3", 78, 989, 3350, (9, 0), 5),
}
DEFAULT = CARDS["3090"]  # assumed where the card is unknown: the slower of the common 24 GB cards
PRODUCTS_SHARE = 0.5  # of the published products, sustained, elementwise kernels included
BANDWIDTH_SHARE = 0.85  # of the published bandwidth, sustained
# Bytes moved per vocabulary entry of a row of logits. The head writes 2 in 16 bits, 6 go into the
# fp32 copy. Top-k reads that six times: four digits of a radix select, then what it found.
CANDIDATES_TRAFFIC = 2 + 6 + 6 * 4
# Without top-k: the temperature, and softmax and cumulative sum in fp64; with top-p also a sort of
# values and indices, most of it.
WHOLE_CDF_TRAFFIC, WHOLE_TOP_P_TRAFFIC = 80, 400


def find_card(name: str) -> Card:
    """Return the card of this name; UserError if there is none."""
    if name not in CARDS:
        raise UserError(f"gpu: {name!r} is unknown; choose one of {', '.join(CARDS)}")
    return CARDS[name]


def card_of(device: torch.device) -> Card:
    """Return the card that a CUDA device is, or DEFAULT."""
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    return next((card for card in CARDS.values() if card.name == name), DEFAULT)


def gpu_rates(card: Card, sampling: Sampling, vocab_size: int) -> Rates:
    """Return the speed of a card in a machine whose host and disk are average."""
    flops = PRODUCTS_SHARE * card.tflops * 1e12
    bandwidth = BANDWIDTH_SHARE * card.gb_per_s * 1e9
    traffic = WHOLE_CDF_TRAFFIC if sampling.top_p == 1 else WHOLE_TOP_P_TRAFFIC
    if has_candidates(sampling, vocab_size):
        traffic = CANDIDATES_TRAFFIC
    return Rates(
        flops=flops,
        sampled_flops=flops,
        read=bandwidth,
        entries=bandwidth / traffic,
        bandwidth=bandwidth,
        pcie=10e9 * 2 ** (card.pcie - 3),  # five eighths of 16 lanes, one way
        host=20e9,
        disk=2e9,
        download=50e6,
    )
