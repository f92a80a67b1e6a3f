"""Prompts of different lengths in one batch, padded behind their common prefix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training.tiny import make_model

from em_kernels.training.config import Sampling
from em_kernels.training.rollouts.padding import PADS, can_pad, check_sampling, in_fp32
from em_kernels.training.rollouts.sampling import _batches, generate

GREEDY = Sampling(temperature=0, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=20)
KINDS = {
    "llama": {},
    "qwen2": {"tied": False},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},  # learned positions
}
WINDOW = {"sliding_window": 8}
SLIDING = {
    "mistral": WINDOW,
    "gemma3_text": {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8},
}
COMMON = [
    "the abc\n\nWhat is 2 + 3?",
    "the abc\n\nWhat is the 12 + 13?",
    "the abc\n\nWhat is 7?",
    "the abc\n\nWhat is 2 + 3",  # the first without its end
    "the abc\n\nWhat is 2 + 3?",
]
APART = ["What is 2 + 3?", "Hello to the abc\n\n3", "abc 12 + 13 = 25", "?!? and 3 + 4"]
BOTH = pytest.mark.parametrize("texts", [COMMON, APART], ids=["common", "apart"])


def prompts_of(tokenizer, texts):
    return [tokenizer(text).input_ids for text in texts]


def batches_seen(model):
    """Return a list that collects the shapes of what the model's decoder is given."""
    shapes = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape))
    )
    return shapes


def responses(rollouts):
    return [rollout.response_ids for rollout in rollouts]


def together_and_alone(model, tokenizer, prompts, sampling):
    seeds = [(7, i) for i in range(len(prompts))]
    pairs = zip(prompts, seeds, strict=True)
    alone = [generate(model, tokenizer, [p], [seed], sampling)[0] for p, seed in pairs]
    can_pad(model, 128)  # measures once
    shapes = batches_seen(model)
    together = generate(model, tokenizer, prompts, seeds, sampling)
    assert [rollout.prompt_ids for rollout in together] == prompts
    return together, alone, shapes


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_as_each_prompt_alone(temperature, penalty, kind, texts, tokenizer):
    model = make_model(kind, dtype=torch.float64, **KINDS[kind])
    prompts = prompts_of(tokenizer, texts)
    change = {"temperature": temperature, "repetition_penalty": penalty}
    sampling = GREEDY.model_copy(update=change)
    together, alone, shapes = together_and_alone(model, tokenizer, prompts, sampling)
    assert together == alone
    lengths, rows = [len(ids) for ids in prompts], len(prompts)
    assert len(set(lengths)) > 2 and len({tuple(r) for r in responses(together)}) > 2
    same = len(tokenizer("the abc\n\nWhat is ").input_ids) if texts is COMMON else 0
    assert shapes[: 1 + bool(same)] == [(1, same)] * bool(same) + [(rows, max(lengths) - same)]
    assert all(shape == (rows, 1) for shape in shapes[1 + bool(same) :][:5])
    if temperature == 0:
        for prompt, rollout in zip(prompts, together, strict=True):
            options = {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": penalty}
            plain = model.generate(torch.tensor([prompt]), **options)
            assert rollout.response_ids == plain[0, len(prompt) :].tolist()


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_leave_at_different_times(temperature, texts, tokenizer, exact_model):
    exact_model.generation_config.eos_token_id = list(range(0, 267, 6))
    prompts = prompts_of(tokenizer, [f"{text} {n}" for n in "1234" for text in texts])
    sampling = GREEDY.model_copy(update={"temperature": temperature})
    together, alone, shapes = together_and_alone(exact_model, tokenizer, prompts, sampling)
    assert together == alone and len(set(map(len, responses(together)))) > 3
    rows = [shape[0] for shape in shapes if shape[0] > 1]
    assert rows[0] == len(prompts) and rows == sorted(rows, reverse=True) and len(set(rows)) > 3


@BOTH
def test_stop_strings(texts, tokenizer, exact_model):
    """Stop strings in the padding and in the prompts do not count."""
    exact_model.generation_config.eos_token_id = None
    prompts = prompts_of(tokenizer, texts) * 10
    stop = ("\n", "the", "W", "a", "3")
    sampling = GREEDY.model_copy(update={"temperature": 1.0, "stop": stop})
    together, alone, _ = together_and_alone(exact_model, tokenizer, prompts, sampling)
    assert together == alone
    for rollout in together:
        before, last = [tokenizer.decode(rollout.response_ids[:n]) for n in (-1, None)]
        assert not any(s in before for s in stop)
        assert rollout.ended == any(s in last for s in (*stop, tokenizer.eos_token))
    assert 0 < sum(rollout.ended for rollout in together) < len(together)


def test_one_token_is_a_prompt_too(tokenizer, exact_model):
    prompts = [[5], [5, 6], [6], [7, 8]]
    together, alone, shapes = together_and_alone(exact_model, tokenizer, prompts, GREEDY)
    assert together == alone and shapes[0] == (4, 2)


@pytest.mark.parametrize("kind", SLIDING)
def test_a_sliding_window_would_count_padding_in(kind, tokenizer):
    model = make_model(kind, dtype=torch.float64, **SLIDING[kind])
    prompts = prompts_of(tokenizer, COMMON)
    together, alone, shapes = together_and_alone(model, tokenizer, prompts, GREEDY)
    assert together == alone
    lengths = sorted({len(ids) for ids in prompts})
    first = [columns for _, columns in shapes if columns > 1]
    assert first == [n - 1 for n in lengths]  # all but the last token, once for each length


@pytest.mark.parametrize("pad", [True, False])
@given(lengths=st.lists(st.integers(1, 40)), new=st.integers(1, 30), size=st.integers(1, 6))
def test_batches(pad, lengths, new, size):
    found = list(_batches(lengths, new, size, pad))
    assert sorted(sum(found, [])) == list(range(len(lengths)))
    sizes = [[lengths[i] for i in batch] for batch in found]

    def fits(shortest, longest):
        return longest + new <= 2 * (shortest + new) if pad else longest == shortest

    for batch in sizes:
        assert 0 < len(batch) <= size and fits(min(batch), max(batch))
    for batch, after in zip(sizes, sizes[1:], strict=False):  # No batch could have taken one more.
        assert max(batch) <= after[0]
        assert len(batch) == size or not fits(min(batch), after[0])


def test_half_of_a_row_may_be_padding():
    assert list(_batches([10, 20, 21, 5], 1, 64, True)) == [[3, 0], [1, 2]]
    assert list(_batches([10, 20, 21, 5], 16, 64, True)) == [[3, 0, 1, 2]]
    assert list(_batches([22, 10, 10], 1, 64, True)) == [[1, 2], [0]]
    assert list(_batches([21, 10, 10], 1, 64, True)) == [[1, 2, 0]]


PLACES = {  # Padding would change ALiBi's positions, and a window that the cache does not know.
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    | {"window_size": 8},
}


@BOTH
@pytest.mark.parametrize("kind", PLACES)
def test_what_padding_would_change_is_sampled_by_length(kind, texts, tokenizer):
    model = make_model(kind, dtype=torch.float64, **PLACES[kind])
    prompts = prompts_of(tokenizer, [*texts, texts[0]])
    sampling = GREEDY.model_copy(update={"temperature": 1.0})
    together, alone, shapes = together_and_alone(model, tokenizer, prompts, sampling)
    assert together == alone
    lengths = [*map(len, prompts)]
    assert max(rows for rows, _ in shapes) == max(map(lengths.count, lengths))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_padding_is_measured_in_fp32(kind, dtype):
    """bf16's rounding neither hides a difference nor counts as one; the model is not changed."""
    model = make_model(kind, dtype=dtype, **KINDS[kind])
    before = dict(model.named_parameters())
    assert check_sampling(model) is True and PADS[model] is True
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)
    assert model.dtype == dtype and can_pad(model, 100)
    ids = torch.arange(20)[None]
    with in_fp32(model) as computed:
        found = model(ids).logits
    exact = make_model(kind, dtype=dtype, **KINDS[kind]).float()(ids).logits
    assert computed == found.dtype == torch.float32 and torch.equal(found, exact)
    assert model(ids).logits.dtype == dtype


def test_a_model_that_looks_at_what_is_beside_it_is_refused(tokenizer):
    """Each row reads the mean of the batch here, which is wrong even for rows of one length."""
    model = make_model()
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda _, args, out: out + 0.1 * out.mean(0, keepdim=True))
    with pytest.raises(TypeError, match="completions depend on what is sampled beside them"):
        check_sampling(model)
