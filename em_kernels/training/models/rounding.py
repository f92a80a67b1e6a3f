"""fp32 weights to bf16 without losing small updates."""

from collections.abc import Iterator

import torch
from torch import Tensor

LENGTH = 1 << 20
_noise: dict[torch.device, Tensor] = {}


def to_bf16(weights: Tensor, start: int = 0) -> Tensor:
    """fp32 (n,) to bf16, up or down by a threshold that each place of a parameter keeps for ever.

    Weights that were bf16 at first, and then move by far less than bf16's steps, as ten updates of
    2e-5 make them, would all be rounded back to where they were (measured: 5 % of the movement of
    a 135M model's fp32 weights arrived). This way, as with stochastic rounding, the movement
    arrives on average; and the result depends on the weights alone.

    Args:
        start: the place of the first of these in its parameter.
    """
    out = torch.empty_like(weights, dtype=torch.bfloat16)
    for part, noise, target in _parts(weights, start, out):
        bits = part.view(torch.int32) + noise
        # the upper half: adding to the bits rounds the magnitude, but some NaN become 0
        rounded = bits.bitwise_and_(-(1 << 16)).view(torch.float32)
        target.copy_(torch.where(part.isnan(), part, rounded))
    return out


def dithered(weights: Tensor) -> Tensor:
    """fp32 (n,) moved by less than half a step of bf16, so that what rounds them to the nearest
    has to_bf16's of the weights as they were, from then on: for libraries that round so.
    """
    out = torch.empty_like(weights)
    for part, noise, target in _parts(weights, 0, out):
        bits = part.view(torch.int32) + (noise - (1 << 15))
        tiny = part.abs() < 1e-37  # below it the bits would change their sign
        target.copy_(torch.where(tiny | ~part.isfinite(), part, bits.view(torch.float32)))
    return out


def _parts(weights: Tensor, start: int, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Split weights: each part, its thresholds in steps of fp32, and its part of `out`."""
    device, done = weights.device, 0
    if device not in _noise:
        generator = torch.Generator().manual_seed(0)
        _noise[device] = torch.randint(
            1 << 16, (LENGTH,), dtype=torch.int32, generator=generator
        ).to(device)
    while done < len(weights):
        at = (start + done) % LENGTH
        end = min(len(weights), done + LENGTH - at)
        yield weights[done:end], _noise[device][at : at + end - done], out[done:end]
        done = end
