"""fp32 weights to bf16 without losing small updates."""

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
    device = weights.device
    if device not in _noise:
        generator = torch.Generator().manual_seed(0)
        _noise[device] = torch.randint(
            1 << 16, (LENGTH,), dtype=torch.int32, generator=generator
        ).to(device)
    noise, out = _noise[device], torch.empty_like(weights, dtype=torch.bfloat16)
    done = 0
    while done < len(weights):
        at = (start + done) % LENGTH
        end = min(len(weights), done + LENGTH - at)
        part = weights[done:end]
        bits = part.view(torch.int32) + noise[at : at + end - done]
        # the upper half: adding to the bits rounds the magnitude, but some NaN become 0
        rounded = bits.bitwise_and_(-(1 << 16)).view(torch.float32)
        out[done:end] = torch.where(part.isnan(), part, rounded)
        done = end
    return out
