"""The loops' parts: the budget of a chunk, and the work that it all costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from truth import draw

import em_kernels.flops  # noqa: F401  # FlopCounterMode counts the extension's GEMM
from em_kernels import chunked
from em_kernels.chunked import Needs, Transform, chunk_length

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")


@pytest.mark.parametrize("total", [0, 1, 7, 100, 101])
@pytest.mark.parametrize("budget", [40, 79, 80, 1000, 10**9])
def test_chunks_fit_the_budget_and_are_even(total, budget):
    length = chunk_length(total, 40, budget, CPU)
    assert length >= 1 and (length == 1 or length * 40 <= budget)
    if total:
        pieces = -(-total // length)
        assert pieces == -(-total // max(1, budget // 40))
        assert pieces * length - total < pieces


def test_default_budget_is_an_eighth_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(chunked, "free_bytes", lambda device: 8 * 40 * 7)
    assert chunk_length(12, 40, None, CPU) == 6  # 256 B, the power of two below 280 B
    monkeypatch.setattr(chunked, "free_bytes", lambda device: 1 << 50)
    assert chunk_length(1 << 40, 1, None, CPU) == 1 << 30


NEEDED = {(): 2, ("hidden",): 4, ("weight",): 4, ("hidden", "weight"): 6}


def work(function):
    """Floating-point operations: a GEMM over the vocabulary is 2 N D V."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_work(needed, dtype):
    """The README's table; tokens of weight 0 cost nothing."""
    n, d, v = 64, 16, 200
    hidden, weight, _, targets = draw(n, d, v, dtype=dtype)
    hidden, weight = hidden.detach(), weight.detach()
    needs = Needs(**dict.fromkeys(needed, True))
    half = torch.arange(n) % 2
    for mask, tokens in ((None, n), (half, n // 2)):
        unit = tokens * d * v

        def loss(mask=mask):
            arguments = hidden, weight, Transform(), mask
            chunked.entropy_loss(*arguments, mean=True, needs=needs, chunk_bytes=9 * v * 4)

        def stats(mask=mask):
            head = hidden, weight, Transform(), targets, mask
            found, _, m, log_s = chunked.token_stats(*head, chunk_bytes=9 * v * 4)
            upstream = torch.ones_like(found)
            if needed:
                chunked.token_stats_backward(
                    upstream, found, m, log_s, *head, needs=needs, chunk_bytes=9 * v * 4
                )

        assert work(loss) == pytest.approx(NEEDED[needed] * unit, rel=0.01)
        recomputed = 2 if needed else 0
        assert work(stats) == pytest.approx((NEEDED[needed] + recomputed) * unit, rel=0.01)


def test_no_row_gradient_where_none_is_needed(monkeypatch):
    monkeypatch.setattr(chunked, "_row_gradient", None)
    hidden, weight, _, _ = draw(5, 4, 9)
    with torch.no_grad():
        chunked.entropy_loss(hidden, weight, Transform(), None, mean=True, needs=Needs())
