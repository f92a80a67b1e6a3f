"""Entropy loss with all gradients on the CPU or a CUDA GPU: ours, eager, and the three GEMMs alone.

pytest benchmarks/bench_entropy.py
"""

import pytest
import torch

from em_kernels import fused_entropy_loss, reference

TOKENS, HIDDEN, VOCAB = 256, 576, 49152  # SmolLM2-135M's head
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def head():
    """Peaked rows, as a language model's: each hidden state lies near one word's row."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) / HIDDEN**0.5
    words = torch.randint(VOCAB, (TOKENS,), generator=generator)
    noise = torch.randn(TOKENS, HIDDEN, generator=generator)
    hidden = 10 * weight[words] + 2 * noise
    return hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_()


def run_gemms(hidden, weight):
    with torch.no_grad():
        logits = hidden @ weight.t()
        logits @ weight
        logits.t() @ hidden


def run_loss(loss, hidden, weight):
    hidden.grad = weight.grad = None
    loss(hidden, weight, temperature=0.5).backward()


@pytest.mark.parametrize("provider", ["gemms", "eager", "em_kernels"])
def test_entropy_loss_with_gradients(benchmark, head, provider):
    loss = {"eager": reference.entropy_loss, "em_kernels": fused_entropy_loss}.get(provider)

    def run():
        run_gemms(*head) if loss is None else run_loss(loss, *head)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(
        N=TOKENS, D=HIDDEN, V=VOCAB, dtype="float32", torch=torch.__version__
    )
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
