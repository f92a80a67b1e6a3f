"""A GPU's memory: settings of its allocator, its cap, and whether a planned run fits into it."""

import os

import pytest
import torch

from em_kernels.training.device_memory import (
    ALLOCATOR_SETTINGS,
    let_segments_grow,
    limited_memory,
)

SIZE = 1 << 20


@pytest.mark.parametrize("name", ALLOCATOR_SETTINGS)
def test_segments_grow_unless_the_user_has_set_them(name, monkeypatch):
    for other in ALLOCATOR_SETTINGS:
        monkeypatch.delenv(other, raising=False)
    with monkeypatch.context() as users:
        users.setenv(name, "max_split_size_mb:64")
        let_segments_grow()
        assert [os.environ.get(x) for x in ALLOCATOR_SETTINGS if x != name] == [None]
    monkeypatch.setenv(ALLOCATOR_SETTINGS[0], "")  # restores what is set now
    monkeypatch.delenv(ALLOCATOR_SETTINGS[0])
    let_segments_grow()
    assert os.environ[ALLOCATOR_SETTINGS[0]] == "expandable_segments:True"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is there")
def test_the_cap_ends_with_the_run(simulated_cuda):
    device, before = torch.device("cuda", 0), simulated_cuda.limit
    torch.empty(SIZE, dtype=torch.uint8, device=device)
    with pytest.raises(ZeroDivisionError), limited_memory(device, SIZE // 2):
        assert torch.cuda.max_memory_allocated() == 0
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(SIZE, dtype=torch.uint8, device=device)
        raise ZeroDivisionError
    assert simulated_cuda.limit == before
    torch.empty(SIZE, dtype=torch.uint8, device=device)


def test_a_cpu_has_no_cap():
    with limited_memory(torch.device("cpu"), 1):
        torch.empty(SIZE, dtype=torch.uint8)
