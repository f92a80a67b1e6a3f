"""Rounding of fp32 weights to 16 bits that keeps small updates."""

from collections.abc import Iterator

import torch
from torch import Tensor

LENGTH = 1 << 20  # The thresholds repeat after so many elements.
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of an fp32 mantissa
_noise: dict[torch.device, Tensor] = {}


def to_half(weights: Tensor, dtype: torch.dtype, start: int = 0) -> Tensor:
    """Round fp32 weights (n,) to bf16 or fp16, up or down by a threshold that is fixed for each
    element of a parameter; `start` is the index of weights[0] in it.

    Ten updates of 2e-5 move weights by far less than bf16's spacing, so that rounding to nearest
    returns bf16 weights to where they started (measured on a 135M model: 5 % of the movement was
    left). As with stochastic rounding, here the movement is kept on average; and the result depends
    on the weights alone.

    fp16's spacing is 8 times finer, but from 1/16 on still three times such an update. Its
    thresholds are the lower bits of bf16's, so that fp16 weights of at least 2^-14 that are rounded
    on to bf16 give what the fp32 ones give. Smaller ones, in fixed steps of 2^-24, go to the
    nearest.
    """
    out, dropped = torch.empty_like(weights, dtype=dtype), DROPPED_BITS[dtype]
    for part, noise, target in _parts(weights, start, out):
        threshold = noise if dropped == 16 else noise & ((1 << dropped) - 1)
        bits = part.view(torch.int32) + threshold
        # Keep the upper bits. NaNs are passed through, as adding to their bits may give 0.
        rounded = bits.bitwise_and_(-(1 << dropped)).view(torch.float32)
        target.copy_(torch.where(part.isnan(), part, rounded))
    return out


def to_bf16(weights: Tensor, start: int = 0) -> Tensor:
    """Round fp32 weights (n,) to bf16 as to_half does."""
    return to_half(weights, torch.bfloat16, start)


def dithered(weights: Tensor) -> Tensor:
    """Shift fp32 weights (n,) by less than half a bf16 step, so that rounding to nearest, as some
    libraries do, gives what to_bf16 gives for the unshifted weights, now and after updates.
    """
    out = torch.empty_like(weights)
    for part, noise, target in _parts(weights, 0, out):
        bits = part.view(torch.int32) + (noise - (1 << 15))
        tiny = part.abs() < 1e-37  # The shift would change their sign.
        target.copy_(torch.where(tiny | ~part.isfinite(), part, bits.view(torch.float32)))
    return out


def _parts(weights: Tensor, start: int, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield slices of weights, with their thresholds in steps of fp32 and slices of `out`."""
    device, done = weights.device, 0
    if device not in _noise:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(1 << 16, (LENGTH,), dtype=torch.int32, generator=generator)
        _noise[device] = noise.to(device)
    while done < len(weights):
        at = (start + done) % LENGTH
        end = min(len(weights), done + LENGTH - at)
        yield weights[done:end], _noise[device][at : at + end - done], out[done:end]
        done = end
