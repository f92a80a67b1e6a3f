"""Rounding of fp32 to 16 bits keeps small changes on average."""

import torch
from training.tiny import make_model, make_optimizer, settings

from em_kernels.training.models import rounding
from em_kernels.training.models.rounding import to_bf16, to_half


def test_what_is_bf16_already_stays():
    x = torch.cat([torch.randn(10**5), torch.zeros(3), -torch.zeros(3)]).bfloat16()
    assert torch.equal(to_bf16(x.float()).view(torch.int16), x.view(torch.int16))


def test_to_one_of_the_two_neighbours_by_distance():
    """Values round up or down with odds in proportion to the distance, whatever their sign."""
    x = torch.randn(1 << 18).bfloat16().float()
    step = torch.nextafter(x.bfloat16(), x.bfloat16() * torch.inf).float() - x
    for share in (0.1, 0.5, 0.9):
        moved = to_bf16(x + share * step).float()
        up = moved != x
        assert torch.equal(moved[up], (x + step)[up])
        assert abs(up.float().mean().item() - share) < 0.005


def test_fp16_in_the_same_way():
    x = torch.cat([torch.randn(1 << 18), torch.tensor([0.0, -0.0, torch.inf, 2**-14, 1e-7])])
    half = to_half(x, torch.float16)
    nearest = x.half()
    assert (half != nearest).float().mean() > 0.2
    assert torch.equal(
        to_half(nearest.float(), torch.float16).view(torch.int16), nearest.view(torch.int16)
    )
    spacing = (
        torch.nextafter(nearest.abs(), nearest.new_tensor(torch.inf)) - nearest.abs()
    ).float()
    error = (half.float() - x)[:-5] / spacing[:-5]
    assert error.abs().max() <= 1 and abs(error.mean().item()) < 0.005
    large = x.abs() >= 2**-14  # smaller ones have fixed steps in fp16, not in bf16
    assert torch.equal(to_bf16(half.float())[large], to_bf16(x)[large])


def test_a_place_has_its_threshold_wherever_it_is_cut(monkeypatch):
    monkeypatch.setattr(rounding, "LENGTH", 1000)
    monkeypatch.setattr(rounding, "_noise", {})
    x = torch.randn(7777)
    whole = to_bf16(x)
    for cut in (1, 999, 1000, 1001, 5000):
        assert torch.equal(torch.cat([to_bf16(x[:cut]), to_bf16(x[cut:], cut)]), whole)


def test_a_weight_that_moves_on_never_goes_back():
    """An element's threshold is fixed, so that it does not flicker between updates."""
    x = torch.rand(10**4) + 1
    before = to_bf16(x)
    for _ in range(20):
        x = x + 3e-4
        now = to_bf16(x)
        assert (now >= before).all()
        before = now


def test_updates_far_below_a_step_arrive_in_bf16_weights():
    """Rounding to nearest would leave nearly all of them unchanged."""
    model = make_model(dtype=torch.bfloat16)
    start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, settings("-", "-", lr=1e-5, clip=1e9))
    generator = torch.Generator().manual_seed(0)
    signs = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    for _ in range(3):
        for name, p in model.named_parameters():
            optimizer.add(p, signs[name].bfloat16())
        optimizer.step(1.0)
    along = whole = nearest = 0.0
    for slot in optimizer._slots.values():
        moved = slot.master.view(slot.parameter.shape) - start[slot.name]
        now = slot.parameter.detach().float() - start[slot.name]
        along += (moved * now).sum().item()
        rounded = (start[slot.name] + moved).bfloat16().float()
        nearest += (moved * (rounded - start[slot.name])).sum()
        whole += moved.square().sum().item()
    assert 0.9 < along / whole < 1.1
    assert nearest / whole < 0.3


def test_the_nearest_of_dithered_weights_is_theirs():
    """They agree as weights train, but for ties (one in 2^16) and where bf16's spacing changes."""
    x = torch.cat([torch.randn(3 * 10**5) * 10.0**e for e in (-30, -3, 0, 30)]).bfloat16().float()
    dithered = rounding.dithered(x)
    assert (dithered != x).float().mean() > 0.99
    for move in (0, 1e-4, -3e-4):
        moved = to_bf16(x * (1 + move))
        found = (dithered + x * move).bfloat16()
        assert (found != moved).float().mean() < 5e-4


def test_what_has_no_neighbours_is_not_dithered():
    x = torch.tensor([0.0, -0.0, 1e-40, -1e-38, torch.inf, -torch.inf, torch.nan])
    assert torch.equal(rounding.dithered(x).view(torch.int32), x.view(torch.int32))
