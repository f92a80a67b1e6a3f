"""The budget of a chunk, and the GEMM work of the loops."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from truth import draw

import em_kernels.ops.flops  # noqa: F401  # FlopCounterMode counts the extension's GEMM
from em_kernels import kernels
from em_kernels.ops import chunked, inputs, memory, vocab_slabs
from em_kernels.ops.inputs import GradMask, HeadInputs, SavedStats
from em_kernels.ops.memory import chunk_length

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


@pytest.mark.parametrize("total", [1, 255, 257, 8192, 151_936])
@pytest.mark.parametrize("fitting", [1, 255, 256, 700, 1177, 10**6])
def test_chunks_on_a_gpu_are_whole_tiles_where_they_can_be(total, fitting):
    length = chunk_length(total, 40, 40 * fitting, torch.device("cuda"))
    assert 1 <= length <= fitting
    if fitting >= total:
        assert length == total
    elif fitting >= memory.TILE:
        assert length % memory.TILE == 0
        pieces = -(-total // length)
        assert pieces * (length - memory.TILE) < total  # no smaller chunks would give as few


def test_default_budget_is_an_eighth_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8 * 40 * 7)
    assert chunk_length(12, 40, None, CPU) == 6  # 256 B, the power of two below 280 B
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 50)
    assert chunk_length(1 << 40, 1, None, CPU) == 1 << 30


def test_default_on_a_gpu_is_a_tile_where_a_quarter_of_the_free_memory_holds_it(monkeypatch):
    gpu, row = torch.device("cuda"), 6 * 151_936
    for free, tiles in ((4 * memory.TILE * row, True), (4 * memory.TILE * row - 1, False)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert (chunk_length(8192, row, None, gpu) == memory.TILE) == tiles


def work(function):
    """Count floating-point operations: a GEMM over the vocabulary is 2 N D V."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


NEEDED = {(): 2, ("hidden",): 4, ("weight",): 4, ("hidden", "weight"): 6}
FP32_AND_BF16 = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(params=[None, "half"])
def head(request):
    """Return inputs, with small chunks, and N D V, N being the tokens that should cost work."""

    def make(dtype):
        n, d, v = 64, 16, 200
        hidden, weight, _, targets = draw(n, d, v, dtype=dtype)
        mask = None if request.param is None else torch.arange(n) % 2
        settings = dict(targets=targets, mask=mask, chunk_bytes=9 * v * 4)
        unit = (n if mask is None else n // 2) * d * v
        return HeadInputs(hidden.detach(), weight.detach(), **settings), unit

    return make


@FP32_AND_BF16
@pytest.mark.parametrize("needed", NEEDED)
def test_work_of_losses_known_per_token(needed, dtype, head):
    head_inputs, unit = head(dtype)
    needs = GradMask(**dict.fromkeys(needed, True))
    for loss in (
        lambda: chunked.sum_entropy(head_inputs, True, needs),
        lambda: chunked.sum_custom_loss(head_inputs, lambda stats, index: -stats.logprob, needs),
    ):
        assert work(loss) == pytest.approx(NEEDED[needed] * unit, rel=0.01)


@FP32_AND_BF16
@pytest.mark.parametrize("needed", NEEDED)
def test_work_of_statistics(needed, dtype, head):
    head_inputs, unit = head(dtype)
    needs = GradMask(**dict.fromkeys(needed, True))

    def both_ways():
        found = vocab_slabs.token_stats(head_inputs, with_collision_and_argmax=True)
        if needed:
            saved = SavedStats(found.statistics, found.m, found.log_s, found.logits)
            upstream = torch.ones_like(found.statistics)
            vocab_slabs.token_stats_backward(head_inputs, upstream, saved, needs)

    recomputed = 2 if needed else 0
    assert work(both_ways) == pytest.approx((NEEDED[needed] + recomputed) * unit, rel=0.01)


@FP32_AND_BF16
def test_work_of_one_statistic_under_a_frozen_head(dtype, head):
    head_inputs, unit = head(dtype)
    found = work(lambda: chunked.token_stats_with_gradient(head_inputs, "entropy", False))
    assert found == pytest.approx(4 * unit, rel=0.01)


def test_no_row_gradient_where_none_is_needed(monkeypatch):
    monkeypatch.setattr(kernels, "row_gradient", None)
    hidden, weight, _, _ = draw(5, 4, 9)
    with torch.no_grad():
        chunked.sum_entropy(HeadInputs(hidden, weight), True, GradMask())


@pytest.mark.parametrize(
    "sizes", [(1e-7, 1e-7), (1e7, 1e7), (1e-7, 1e7), (1e7, 1e-7), (1.0, 1e-30), (1e30, 1.0)]
)
def test_fp16_upstreams_of_any_size_keep_their_digits(sizes, monkeypatch):
    """Without a scale, fp16 would round 1e-7 to 0 and 1e7 to infinity."""
    hidden, weight, bias, _ = draw(32, 16, 200, dtype=torch.float16)
    factors = torch.tensor(sizes).repeat_interleave(16)

    @torch.no_grad()
    def gradients(*head):
        chunks = HeadInputs(*head, chunk_bytes=4 * 200 * 8)
        _, found, *_ = chunked.sum_custom_loss(
            chunks, lambda s, i: factors[i] * s.entropy, GradMask(*3 * [True])
        )
        return found[:3]

    truth = gradients(hidden.double(), weight.double(), bias.double())
    monkeypatch.setattr(inputs, "operand_dtype", lambda weight: torch.float16)  # as on a GPU
    found = gradients(hidden, weight, bias)
    for ours, true in zip(found, truth, strict=True):
        assert (ours - true).norm() <= 2e-3 * true.norm()
    small = factors == factors.min()
    assert (found[0] - truth[0])[small].norm() <= 2e-3 * truth[0][small].norm()
