"""The preallocated KV cache against transformers' own, and attention by groups of heads."""

import threading

import pytest
import torch
from torch import nn
from training.tiny import make_model
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from em_kernels.training.rollouts.kv_cache import PreallocatedLayer, grouped_attention, new_cache


def states(rows, tokens, seed):
    """Return keys and values of two heads; a value may be longer than a key."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, tokens, width, generator=generator) for width in (4, 6)]


def test_as_transformers_own_layer():
    ours, theirs = PreallocatedLayer(20), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(*states(1, 5, 0))
        layer.batch_repeat_interleave(4)
        layer.update(*states(4, 3, 1))
        layer.batch_select_indices(torch.tensor([0, 2, 3]))
        layer.update(*states(3, 1, 2))
        layer.batch_select_indices(torch.tensor([1]))
    found, expected = (layer.update(*states(1, 11, 3)) for layer in (ours, theirs))
    assert [x.shape[2] for x in found] == [20, 20]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ours.get_seq_length() == theirs.get_seq_length() == 20
    assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_memory_is_allocated_once():
    layer = PreallocatedLayer(40)
    layer.update(*states(4, 3, 0))
    places = [x.data_ptr() for x in (layer.keys, layer.values)]
    for step in range(30):
        layer.update(*states(len(layer.keys), 1, step))
        if step == 9:
            layer.batch_select_indices(torch.tensor([1, 3]))
    assert [x.data_ptr() for x in (layer.keys, layer.values)] == places


def test_before_the_first_token_there_is_nothing_to_repeat_or_drop():
    layer = PreallocatedLayer(3)
    layer.batch_repeat_interleave(4)
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.get_seq_length() == 0


@pytest.mark.parametrize("kind, alike", [("llama", True), ("mistral", False)])
def test_a_sliding_window_keeps_its_own_layers(kind, alike):
    model = make_model(kind, **({} if alike else {"sliding_window": 8}))
    kinds = {type(layer) for layer in new_cache(model, 10).layers}
    assert (kinds == {PreallocatedLayer}) == alike and len(kinds) == 1


@pytest.mark.parametrize("mask", [None, "rows", "heads"])
@pytest.mark.parametrize("tokens, heads", [(1, 8), (1, 2), (3, 8)])
def test_attention_by_groups(tokens, heads, mask):
    generator = torch.Generator().manual_seed(0)
    shapes = (3, heads, tokens, 16), (3, 2, 9, 16), (3, 2, 9, 16)
    inputs = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // 2, True
    allowed = None
    if mask is not None:
        allowed = (
            torch.rand(3, heads if mask == "heads" else 1, tokens, 9, generator=generator) > 0.3
        )
        allowed[..., 0] = True
    if mask is None and tokens > 1:
        inputs[1:] = [x[:, :, :tokens] for x in inputs[1:]]
    expected, _ = sdpa_attention_forward(module, *inputs, allowed, scaling=0.3)
    with grouped_attention():
        attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found, _ = attention(module, *inputs, attention_mask=allowed, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_transformers_attention_is_put_back():
    with pytest.raises(KeyboardInterrupt), grouped_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
        raise KeyboardInterrupt
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_threads_may_sample_at_once():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with grouped_attention():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with grouped_attention():
        thread.start()
        assert inside.wait(60)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    leave.set()
    thread.join(60)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
