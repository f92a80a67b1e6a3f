"""Planned runs fit into a GPU's memory as torch's allocator divides it, which is simulated."""

import random

import pytest
import torch
from caching_allocator import MIB, CachingAllocator, OutOfMemory
from training.planned_run import as_on_a_gpu, play
from training.shapes import QWEN

from em_kernels.training.config import TrainConfig
from em_kernels.training.planning.components import CONTEXT_BYTES
from em_kernels.training.planning.plan import GIB
from em_kernels.training.planning.planner import Planner

LIMIT = 1 << 40


@pytest.mark.parametrize(
    "size, fixed, expandable",
    [(1, 2, 2), (MIB, 2, 2), (MIB + 1, 20, 20), (11 * MIB, 12, 20), (201 * MIB, 202, 220)],
)
def test_segments(size, fixed, expandable):
    for grows, reserved in ((False, fixed), (True, expandable)):
        allocator = CachingAllocator(LIMIT, grows)
        block = allocator.malloc(size)
        assert allocator.reserved == reserved * MIB
        allocator.free(block)
        assert allocator.malloc(size).start == block.start and allocator.reserved == reserved * MIB


def test_a_segment_that_grows_wastes_less():
    """30 of 100 MiB stay in use; the next tensor is larger than what is free."""
    for grows in (False, True):
        allocator = CachingAllocator(160 * MIB, grows)
        allocator.free(allocator.malloc(100 * MIB))
        allocator.malloc(30 * MIB)
        if grows:
            allocator.malloc(110 * MIB)
            assert allocator.reserved == 140 * MIB
        else:
            with pytest.raises(OutOfMemory):
                allocator.malloc(110 * MIB)


@pytest.mark.parametrize("grows", [False, True])
def test_blocks_never_overlap_and_all_memory_returns(grows):
    limit = 300 * MIB
    allocator, live, chance, failed = CachingAllocator(limit, grows), [], random.Random(1), 0
    for _ in range(3000):
        if live and chance.random() < 0.48:
            allocator.free(live.pop(chance.randrange(len(live))))
            continue
        try:
            live.append(allocator.malloc(int(2 ** chance.uniform(3, 26))))
        except OutOfMemory:
            failed += 1
            allocator.free(live.pop(chance.randrange(len(live))))
        spans = sorted((block.start, block.start + block.size) for block in live)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
        assert sum(end - start for start, end in spans) == allocator.allocated
        assert allocator.allocated <= allocator.reserved <= limit
    assert failed
    for block in live:
        allocator.free(block)
    allocator._release_free()
    assert allocator.allocated == allocator.reserved == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("size, mode", [("1.5B", "full"), ("7B", "lora"), ("7B", "offload")])
def test_planned_runs_fit_a_24_gb_card(size, mode, monkeypatch):
    """Sampling and training of two updates, with 3% of the memory to spare."""
    asked = TrainConfig(model="m", prompt="p", mode=mode, gpu_memory=22.5, host_memory=110)
    plan = Planner(asked, QWEN[size], 128, torch.device("cuda")).choose()
    assert plan.fits and plan.name == mode
    allocator = CachingAllocator(plan.device_limit - CONTEXT_BYTES, expandable=True)
    as_on_a_gpu(monkeypatch)
    play(plan, QWEN[size], 128, allocator)
    found = allocator.peak_allocated, allocator.peak_reserved
    print(
        f"{size} {mode}: planned {plan.allocated / GIB:.2f} GiB, allocated and reserved at most "
        f"{found[0] / GIB:.2f}, {found[1] / GIB:.2f}"
    )
    assert CONTEXT_BYTES + allocator.peak_reserved <= 0.97 * plan.device_limit
