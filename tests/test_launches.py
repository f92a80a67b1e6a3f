"""Launches per chunk of logits on a GPU, counted on tensors without memory that say they are CUDA.

An operation counts once if it launches work on a device or copies; views and empty memory do not.
"""

import pytest
import torch
from says_cuda import say_cuda
from torch.utils._python_dispatch import TorchDispatchMode

from em_kernels.ops import chunked, sparse, vocab_slabs
from em_kernels.ops.inputs import GradMask, HeadInputs, SavedStats

ROWS, D, V = 48, 1536, 151936
CHUNK_BYTES = ROWS * V * 6  # fp32 logits and bf16 dy
BOTH = GradMask(hidden=True, weight=True)
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "scalar_tensor")


class Launches(TorchDispatchMode):
    """Record what would be launched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if not function.is_view and function._schema.name.split("::")[1] not in FREE:
            self.names.append(str(function))
        return function(*arguments, **(named or {}))


class Recorded:
    """Stand-in for a Triton kernel."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *arguments, **named: self.launches.names.append(self.name)


@pytest.fixture
def launches(monkeypatch):
    launches = Launches()
    say_cuda(monkeypatch, lambda name: Recorded(name, launches))
    return launches


def head(tokens, vocab=V, **named):
    hidden, weight = (
        torch.empty(n, D, dtype=torch.bfloat16, device="meta") for n in (tokens, vocab)
    )
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    return HeadInputs(hidden, weight, targets=targets, chunk_bytes=CHUNK_BYTES, **named)


def per_chunk(launches, run, marker="row_statistics_kernel"):
    """Return the launches of each chunk more; a chunk launches the marker once."""
    counts = []
    for chunks in (24, 56):
        launches.names.clear()
        with launches:
            run(chunks)
        counts.append((len(launches.names), launches.names.count(marker)))
    (few, few_chunks), (many, many_chunks) = counts
    assert many_chunks >= few_chunks + 4
    return (many - few) / (many_chunks - few_chunks)


@pytest.mark.parametrize("keep_dy", [True, False])
def test_entropy(launches, keep_dy):
    def run(chunks):
        inputs = head(chunks * ROWS)._replace(targets=None)
        assert inputs.keeps_dy(BOTH)
        chunked.sum_entropy(inputs, True, BOTH, keep_dy=keep_dy)

    assert per_chunk(launches, run) <= 12


def test_token_loss(launches):
    """The caller's own loss and its derivative are one operation each here, and count too."""

    def run(chunks):
        chunked.sum_custom_loss(head(chunks * ROWS), lambda stats, i: -stats.logprob, BOTH)

    assert per_chunk(launches, run) <= 25


@pytest.mark.parametrize("keeps_logits", [True, False])
def test_statistics(launches, keeps_logits, monkeypatch):
    """Forward and backward of a slab of vocabulary entries."""
    length = 9600
    monkeypatch.setattr(vocab_slabs, "chunk_length", lambda *_: length)
    monkeypatch.setattr(vocab_slabs, "MAX_KEPT_SLAB_BYTES", length * (ROWS * 2 + D * 4))

    def run(slabs):
        inputs = head(ROWS, slabs * length)._replace(chunk_bytes=1 << 30)
        out = vocab_slabs.token_stats(inputs, True, may_keep_logits=keeps_logits)
        assert (out.logits.numel() > 0) == keeps_logits
        upstream = torch.empty(5, ROWS, device="meta")
        saved = SavedStats(out.statistics, out.m, out.log_s, out.logits)
        vocab_slabs.token_stats_backward(inputs, upstream, saved, BOTH)

    assert per_chunk(launches, run, "row_gradient_kernel") <= 14


@pytest.mark.parametrize("new", [0, 7])
@pytest.mark.parametrize("slabs", [1, 3])
def test_sparse(launches, slabs, new, monkeypatch):
    kept = V // 50

    class Counts:
        def __init__(self, counts):
            launches.names.append("copy to the host")

        def read(self):
            return [kept, new]

    monkeypatch.setattr(sparse, "AsyncCounts", Counts)
    monkeypatch.setattr(sparse.ColumnSelector, "_probe", lambda self, terms: True)
    monkeypatch.setattr("em_kernels.ops.gradients.slab_length", lambda *_, **__: -(-kept // slabs))

    def run(chunks):
        inputs = head(chunks * ROWS, grad_tolerance=2**-9)
        chunked.sum_entropy(inputs._replace(targets=None), True, BOTH)

    assert per_chunk(launches, run) <= 18 + 6 * slabs
