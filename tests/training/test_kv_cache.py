"""The preallocated KV cache against transformers' own, and attention by groups of heads."""

import threading

import pytest
import torch
from torch import nn
from training.tiny import make_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from em_kernels.training.engines.shared_prefix import SharedPrefix
from em_kernels.training.rollouts import kv_cache
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


PREFIX = [7, 30, 99, 12, 41]
CONTINUED = torch.tensor([[5, 9, 40], [100, 101, 0], [44, 3, 3]])  # padding may be any token


def states_and_gradients(model):
    """Return hidden states of rows behind a shared prompt, and all gradients of their sum."""
    model.zero_grad()
    prompt = SharedPrefix(model, PREFIX)
    found = prompt.continued(CONTINUED)
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    prompt.backward()
    return found.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["qwen2", "cohere", "gpt2"])  # gpt2 has no groups
def test_lower_right_attention_equals_the_masked(kind, dtype, monkeypatch):
    model, masked = make_model(kind, dtype=dtype), []

    def counted(module, query, *arguments, **options):
        masked.append(query.shape[0] > 1)  # a row of the shared prompt is alone
        return sdpa_attention_forward(module, query, *arguments, **options)

    monkeypatch.setattr(kv_cache, "sdpa_attention_forward", counted)
    found, gradients = states_and_gradients(model)
    assert not any(masked)
    monkeypatch.setattr(kv_cache, "_mask", sdpa_mask)  # nothing is marked
    expected, truth = states_and_gradients(model)
    assert sum(masked) == 2  # layers
    close = (
        {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
    )
    torch.testing.assert_close(found, expected, **close)
    assert gradients.keys() == truth.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, truth[name], **close)


def test_only_causal_masks_are_marked():
    config, states = make_model("mistral", sliding_window=8).config, torch.zeros(2, 3, 32)
    cache = DynamicCache()
    cache.update(*(torch.zeros(2, 2, 5, 8) for _ in range(2)), 0)
    given = {"config": config, "inputs_embeds": states, "past_key_values": cache}
    padded = torch.ones(2, 8, dtype=torch.int64)
    padded[0, :2] = 0
    with grouped_attention():
        plain = create_causal_mask(**given, attention_mask=None)
        others = [
            create_causal_mask(**given, attention_mask=padded),
            create_causal_mask(
                **given, attention_mask=None, and_mask_function=lambda b, h, q, k: k > 0
            ),
            create_sliding_window_causal_mask(**given, attention_mask=None),
        ]
    assert plain.is_lower_right and torch.equal(plain[0, 0], torch.ones(3, 8).bool().tril(5))
    assert not any(getattr(mask, "is_lower_right", False) for mask in others)


def test_transformers_attention_is_put_back():
    with pytest.raises(KeyboardInterrupt), grouped_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
        raise KeyboardInterrupt
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask


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
