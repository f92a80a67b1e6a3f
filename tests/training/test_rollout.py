"""Completions equal transformers' plain generate, whatever is sampled beside them."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from training.tiny import make_model, make_tokenizer
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from em_kernels.training.config import Sampling
from em_kernels.training.presets import DEMO_SHOTS
from em_kernels.training.rollouts.sampling import generate

PLAIN = Sampling(temperature=1, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=24)
GREEDY = PLAIN.model_copy(update={"temperature": 0})
TEXTS = ["What is 2 + 3?", "What is 2 + 9?", "What is 2 + 3?", "Hello", "the abc\n\nthe 3\n", "?"]
WINDOW = {"sliding_window": 8}
GEMMA = {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"tied": False},
    "mistral": WINDOW,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "cohere": {"logit_scale": 0.25},
}
OLD_NAME = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


@pytest.fixture
def prompts(tokenizer):
    return [tokenizer(text).input_ids for text in TEXTS]


def seeds(count):
    return [(7, i) for i in range(count)]


def responses(rollouts):
    return [rollout.response_ids for rollout in rollouts]


def plain_generate(model, prompt, **options):
    """Complete one prompt with its own cache and without segments."""
    output = model.generate(torch.tensor([prompt]), do_sample=False, **options)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_is_plain_generate(kind, penalty, tokenizer, prompts):
    model = make_model(kind, dtype=torch.float64, **ARCHITECTURES[kind])
    sampling = GREEDY.model_copy(update={"repetition_penalty": penalty})
    found = generate(model, tokenizer, prompts, seeds(len(prompts)), sampling)
    for prompt, rollout in zip(prompts, found, strict=True):
        expected = plain_generate(model, prompt, max_new_tokens=24, repetition_penalty=penalty)
        assert rollout.prompt_ids == prompt
        assert rollout.response_ids == expected


def test_greedy_is_plain_generate_when_rows_leave(tokenizer, exact_model, prompts):
    """A third of the tokens are EOS, so that a batch goes through many segments."""
    exact_model.generation_config.eos_token_id = list(range(0, 267, 3))
    many = prompts + [tokenizer(f"What is {a} + {b}?").input_ids for a in "123" for b in "56789"]
    found = generate(exact_model, tokenizer, many, seeds(len(many)), GREEDY)
    assert responses(found) == [plain_generate(exact_model, p, max_new_tokens=24) for p in many]
    assert len(set(map(len, found))) > 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_completion_does_not_depend_on_its_company(dtype, tokenizer, prompts):
    model = make_model(dtype=dtype)
    model.generation_config.eos_token_id = list(range(0, 267, 9))
    many = prompts * 4
    together = responses(generate(model, tokenizer, many, seeds(24), PLAIN))
    assert len(set(map(tuple, together))) == 24
    small = generate(model, tokenizer, many, seeds(24), PLAIN, batch_size=3)
    assert responses(small) == together
    turned = generate(model, tokenizer, many[::-1], seeds(24)[::-1], PLAIN, batch_size=5)
    assert responses(turned) == together[::-1]
    for i in (0, 9, 22):
        alone = generate(model, tokenizer, [many[i]], [seeds(24)[i]], PLAIN)
        assert responses(alone) == [together[i]]


def test_same_seeds_same_tokens_other_seeds_others(tokenizer, exact_model, prompts):
    first = generate(exact_model, tokenizer, prompts[:1] * 8, seeds(8), PLAIN)
    again = generate(exact_model, tokenizer, prompts[:1] * 8, seeds(8), PLAIN)
    other = generate(exact_model, tokenizer, prompts[:1] * 8, [(8, i) for i in range(8)], PLAIN)
    assert responses(first) == responses(again)
    assert not set(map(tuple, responses(first))) & set(map(tuple, responses(other)))


def distribution(model, prompt, sampling):
    """Return the next token's probabilities by transformers' processors."""
    processors = LogitsProcessorList()
    processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    return processors(ids, logits)[0].softmax(-1)


def assert_drawn_from(counts, probabilities):
    """Chi-square test, one false alarm in a million; rare outcomes are pooled."""
    draws = sum(counts.values())
    keys = sorted(probabilities, key=probabilities.get)
    assert set(counts) <= {key for key in keys if probabilities[key] > 0}
    observed, expected = [0], [0.0]
    for key in keys:
        if expected[-1] >= 10:
            observed.append(0)
            expected.append(0.0)
        observed[-1] += counts[key]
        expected[-1] += draws * probabilities[key]
    assert len(expected) > 2
    assert chisquare(observed, expected).pvalue > 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"repetition_penalty": 3.0},
        {"temperature": 0.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.15},
    ],
    ids=str,
)
def test_first_token_has_the_processors_distribution(changes, tokenizer, exact_model, prompts):
    sampling = PLAIN.model_copy(update={**changes, "max_new_tokens": 1})
    draws = 4000
    many = generate(
        exact_model, tokenizer, prompts[:1] * draws, seeds(draws), sampling, batch_size=draws
    )
    counts = Counter(rollout.response_ids[0] for rollout in many)
    expected = distribution(exact_model, prompts[0], sampling).tolist()
    assert_drawn_from(counts, dict(enumerate(expected)))


def test_pairs_of_tokens_have_the_joint_distribution(tokenizer, exact_model, prompts):
    sampling = PLAIN.model_copy(update={"max_new_tokens": 2, "top_k": 4})
    draws = 3000
    many = generate(
        exact_model, tokenizer, prompts[:1] * draws, seeds(draws), sampling, batch_size=draws
    )
    first = distribution(exact_model, prompts[0], sampling)
    joint = {}
    for a in first.nonzero()[:, 0].tolist():
        second = distribution(exact_model, [*prompts[0], a], sampling)
        joint.update({(a, b): (first[a] * p).item() for b, p in enumerate(second) if p > 0})
    assert len(joint) == 16
    assert_drawn_from(Counter(tuple(rollout.response_ids) for rollout in many), joint)


def test_every_eos_ends_and_is_kept(tokenizer, exact_model, prompts):
    listed = list(range(4, 60, 4))
    exact_model.generation_config.eos_token_id = listed
    ends = {*listed, tokenizer.eos_token_id}
    found = generate(exact_model, tokenizer, prompts * 40, seeds(240), PLAIN)
    for rollout in found:
        *body, last = rollout.response_ids
        assert not ends & set(body)
        assert rollout.ended == (last in ends)
        assert rollout.ended or len(rollout.response_ids) == 24
    assert {rollout.response_ids[-1] for rollout in found if rollout.ended} == ends


def test_without_any_eos_the_longest(exact_model, prompts):
    exact_model.generation_config.eos_token_id = None
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    found = generate(exact_model, tokenizer, prompts, seeds(6), PLAIN)
    assert all(len(rollout.response_ids) == 24 and not rollout.ended for rollout in found)


@pytest.mark.parametrize("stop", [("\n",), ("the", "\n\n"), ("b", "c")], ids=repr)
def test_stop_string_ends_with_the_token_that_holds_it(stop, tokenizer, exact_model):
    """A stop string in the prompt, even at its end, does not count."""
    exact_model.generation_config.eos_token_id = None
    starts = ["the abc\n\nthe 3\n", "abc\nabc\n", "the\n\n 3?"]
    prompts = [tokenizer(text).input_ids for text in starts] * 60
    sampling = PLAIN.model_copy(update={"stop": stop})
    found = generate(exact_model, tokenizer, prompts, seeds(len(prompts)), sampling)
    last_tokens = set()
    for rollout in found:
        ids = rollout.response_ids
        before, whole = tokenizer.decode(ids[:-1]), tokenizer.decode(ids)
        assert not any(s in before for s in stop)
        if not rollout.ended:
            assert len(ids) == 24 and not any(s in whole for s in stop)
        elif ids[-1] != tokenizer.eos_token_id:
            assert any(s in whole for s in stop)
            last_tokens.add(ids[-1])
    assert len(last_tokens) > 1
    assert max(len(rollout.response_ids) for rollout in found) > 3


@pytest.mark.parametrize("longest", [1, 2, 9])
def test_max_new_tokens(longest, tokenizer, exact_model, prompts):
    sampling = PLAIN.model_copy(update={"max_new_tokens": longest})
    found = generate(exact_model, tokenizer, prompts, seeds(6), sampling)
    assert max(len(rollout.response_ids) for rollout in found) == longest
    assert min(len(rollout.response_ids) for rollout in found) >= 1


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN], ids=["greedy", "sampled"])
def test_the_models_generation_config_changes_nothing_else(
    sampling, tokenizer, exact_model, prompts
):
    clean = generate(exact_model, tokenizer, prompts * 4, seeds(24), sampling)
    seen = sorted({i for rollout in clean for i in rollout.response_ids[:2]})
    poison = {"eos_token_id": 0, "do_sample": True, "temperature": 0.1, "top_k": 2, "top_p": 0.1}
    poison |= {"min_p": 0.3, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    poison |= {"bad_words_ids": [[seen[0]]], "suppress_tokens": seen, "begin_suppress_tokens": seen}
    poison |= {"forced_eos_token_id": 5, "min_length": 120, "min_new_tokens": 20, "max_length": 3}
    poison |= {"max_new_tokens": 2, "max_time": 1e-9, "stop_strings": ["a"], "num_beams": 3}
    poison |= {"num_return_sequences": 2, "use_cache": False, "cache_implementation": "static"}
    poison |= {"output_scores": True, "renormalize_logits": True, "guidance_scale": 2.0}
    exact_model.generation_config = GenerationConfig(**poison)
    again = generate(exact_model, tokenizer, prompts * 4, seeds(24), sampling)
    assert responses(again) == responses(clean)


def test_finished_rows_leave_the_batch(tokenizer, exact_model, prompts):
    exact_model.generation_config.eos_token_id = list(range(0, 267, 5))
    rows = []
    exact_model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    sampling = PLAIN.model_copy(update={"max_new_tokens": 60})
    found = generate(exact_model, tokenizer, prompts[:1] * 64, seeds(64), sampling)
    prefix, *rows = rows
    lengths = np.array([len(rollout.response_ids) for rollout in found])
    alive = [int((lengths > step).sum()) for step in range(lengths.max())]
    # Fewer than 1/8 of a batch's rows may have finished.
    assert all(ran <= a / (1 - 1 / 8) for ran, a in zip(rows, alive, strict=True))
    assert sum(rows) < 64 * lengths.max() / 2 and prefix == 1


def test_the_common_prefix_is_computed_once(tokenizer, exact_model):
    texts = [f"A long and common start, and then {n}?" for n in "123"]
    prompts = [tokenizer(text).input_ids for text in texts]
    shapes = []
    exact_model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape))
    )
    generate(exact_model, tokenizer, prompts, seeds(3), PLAIN)
    (common, prefix), (every, rest) = shapes[:2]
    assert (common, every) == (1, 3) and rest < 3 and prefix + rest == len(prompts[0])


class Abandoned(Exception):
    pass


@OLD_NAME
@pytest.mark.parametrize("after", [None, 1, 7])
def test_the_model_is_left_as_it_was(after, tokenizer, exact_model, prompts):
    exact_model.gradient_checkpointing_enable()
    exact_model.train()
    exact_model.model.layers[0].mlp.eval()
    modes = [module.training for module in exact_model.modules()]
    config = exact_model.generation_config
    checks = []

    def check():
        checks.append(exact_model.training)
        if len(checks) == after:
            raise Abandoned

    try:
        generate(exact_model, tokenizer, prompts[:1], seeds(1), PLAIN, check=check)
        assert after is None
    except Abandoned:
        assert len(checks) == after
    assert not any(checks)
    assert [module.training for module in exact_model.modules()] == modes
    assert exact_model.generation_config is config
    assert all(layer.gradient_checkpointing for layer in exact_model.model.layers)


@OLD_NAME
def test_gradient_checkpointing_changes_no_token(tokenizer, exact_model, prompts):
    clean = generate(exact_model, tokenizer, prompts, seeds(6), PLAIN)
    exact_model.gradient_checkpointing_enable()
    exact_model.train()
    assert responses(generate(exact_model, tokenizer, prompts, seeds(6), PLAIN)) == responses(clean)


def test_dropout_is_off(tokenizer, prompts):
    model = make_model(dtype=torch.float64, attention_dropout=0.5)
    clean = generate(model, tokenizer, prompts, seeds(6), PLAIN)
    again = generate(model.train(), tokenizer, prompts, seeds(6), PLAIN)
    assert responses(again) == responses(clean)
    assert model.training and isinstance(model.lm_head, nn.Linear)


def test_progress_counts_every_completion(tokenizer, exact_model, prompts):
    exact_model.generation_config.eos_token_id = list(range(0, 267, 4))
    done = {}
    on_done = lambda index, rollout: done.update({index: rollout})  # noqa: E731
    options = {"batch_size": 4, "on_done": on_done}
    found = generate(exact_model, tokenizer, prompts * 5, seeds(30), PLAIN, **options)
    assert [done[i] for i in range(30)] == found


def test_nothing_to_do(tokenizer, exact_model):
    assert generate(exact_model, tokenizer, [], [], PLAIN) == []


def test_real_model(demo):
    """The 135M model decodes greedily up to a stop string of several tokens."""
    model, tokenizer = demo
    prompt = tokenizer(f"{DEMO_SHOTS}Q: What is 31 + 52?\nA:").input_ids
    sampling = GREEDY.model_copy(update={"max_new_tokens": 16, "stop": ("= 8",)})
    (found,) = generate(model, tokenizer, [prompt], seeds(1), sampling)
    assert found.ended and tokenizer.decode(found.response_ids) == " 31 + 52 = 8"
    length = len(found.response_ids)
    assert found.response_ids == plain_generate(model, prompt, max_new_tokens=length)
