"""Sampling by a CUDA graph, on the simulated device, against the operations one by one."""

import logging

import pytest
import torch
from training.tiny import make_model

from em_kernels.training.rollouts import cuda_graph
from em_kernels.training.rollouts.cuda_graph import GraphedRows, rows_for
from em_kernels.training.rollouts.token_rows import TokenRows

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is there"),
    pytest.mark.usefixtures("simulated_cuda"),
]
PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 3, 4, 2], [5, 6, 1, 1, 1]]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(cuda_graph, "BUCKET", 4)


def on_gpu(kind="qwen2", **settings):
    torch.manual_seed(0)
    with torch.device("cuda"):
        return make_model(kind, **settings)


def logits_of(kind, model, prompts):
    """Return the logits of some steps, between which rows leave."""
    found, rows = [], kind(model, prompts, 12)
    with torch.no_grad():
        for step in range(12):
            logits = rows.logits()
            found.append(logits.cpu())
            rows.append(logits.argmax(-1))
            if step in (3, 8):
                rows.keep(torch.tensor([0, 2]).cuda() if step == 3 else torch.tensor([1]).cuda())
    return found, rows


@pytest.mark.parametrize(
    "kind, prompts",
    [
        ("qwen2", PROMPTS),
        *(pytest.param(kind, PROMPTS, marks=pytest.mark.slow) for kind in ("gpt2", "llama")),
        pytest.param("qwen2", [PROMPTS[0]] * 4, marks=pytest.mark.slow),
    ],
)
def test_as_without_a_graph(kind, prompts):
    model = on_gpu(kind)
    assert rows_for(model) is GraphedRows
    expected, _ = logits_of(TokenRows, model, prompts)
    found, rows = logits_of(GraphedRows, model, prompts)
    assert model not in cuda_graph.FAILED and rows.graph is not None
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def reads_the_host(model):
    def hook(module, inputs, outputs):
        assert outputs.abs().max().item() < 1e9

    model.model.layers[0].mlp.register_forward_hook(hook)


def asks_for_the_length(model):
    layer = model.model.layers[0]

    def hook(module, arguments, named, outputs):
        return outputs + named["past_key_values"].get_seq_length()

    layer.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    "change, why", [(reads_the_host, "during capture"), (asks_for_the_length, "logits differ")]
)
def test_models_that_a_graph_cannot_hold(change, why, caplog):
    model = on_gpu()
    change(model)
    expected, _ = logits_of(TokenRows, model, PROMPTS)
    with caplog.at_level(logging.WARNING):
        found, rows = logits_of(GraphedRows, model, PROMPTS)
    assert rows.graph is None and why in caplog.text and len(caplog.records) == 1
    assert all(map(torch.equal, found, expected))
    logits_of(GraphedRows, model, PROMPTS)
    assert len(caplog.records) == 1  # it is not tried again


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_a_sliding_window_has_no_graph(kind):
    assert rows_for(on_gpu(kind)) is TokenRows
