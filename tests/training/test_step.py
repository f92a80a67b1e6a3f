"""Loss and gradient of an update against plain torch in fp64, for any split into micro-batches."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from training.tiny import loss_and_gradients, make_model, make_optimizer, settings

from em_kernels.hf import head_of
from em_kernels.training.engines.shared_prefix import can_share_prefix
from em_kernels.training.engines.step import (
    by_prompt,
    entropy_step,
    micro_batches,
)
from em_kernels.training.rollouts.sampling import Rollout

PROMPT = [58, 75, 68, 87]
ROLLOUTS = [  # one prompt of one token; EOS (0) inside a prompt and at ends; a single-token answer
    Rollout(PROMPT, [5, 9, 0], True),
    Rollout([34], [100, 101, 102, 103, 104, 105, 0], True),
    Rollout([43, 0, 1], [7], False),
    Rollout(PROMPT, [0], True),
    Rollout([261, 224], [33, 44, 55, 66], False),
    Rollout(PROMPT, [33, 44, 55, 66, 77], False),
    Rollout([34], [0], True),
    Rollout([34], [1], False),
]


def plain_entropies(model, rollout, temperature):
    """Return the entropy at every position (T,), from full logits."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    logp = (model(ids).logits[0].double() / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def plain_loss(model, rollouts, temperature=1.0):
    """Return the mean over the response tokens; the logits at t predict token t + 1."""
    found = [plain_entropies(model, r, temperature)[len(r.prompt_ids) - 1 : -1] for r in rollouts]
    return torch.cat(found).mean()


def plain_gradients(model, loss):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


def assert_same(ours, truth, tolerance):
    assert ours.keys() == {name for name, x in truth.items() if x is not None}
    for name, gradient in ours.items():
        error = (gradient - truth[name]).norm() / truth[name].norm()
        assert error < tolerance, name


MODELS = {
    "tied": ("llama", {}),
    "untied": ("qwen2", {"tied": False}),
    "bias": ("phi", {"tied": False}),
    "softcap": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "scaled": ("cohere", {"logit_scale": 0.25}),
}
TOLERANCE = 1e-6  # transformers' norms round to fp32


@pytest.mark.parametrize("micro_batch", [10**6, 14, 1])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient(name, share, micro_batch, tmp_path):
    kind, options = MODELS[name]
    model = make_model(kind, dtype=torch.float64, **options)
    share = share and can_share_prefix(model)
    config = settings("-", tmp_path, loss_temperature=0.5, share_prefix=share)
    loss, ours = loss_and_gradients(model, ROLLOUTS, config, micro_batch)
    expected = plain_loss(model, ROLLOUTS, 0.5)
    assert loss.entropy == pytest.approx(expected.item(), rel=TOLERANCE)
    assert_same(ours, plain_gradients(model, expected), TOLERANCE)


def many_rollouts(count):
    """Make rollouts of two prompts and many lengths."""
    generator = torch.Generator().manual_seed(count)
    return [
        Rollout(
            PROMPT if i % 3 else [34],
            torch.randint(3, 267, (1 + i * i % 13,), generator=generator).tolist(),
            i % 2 == 0,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("batches", [1, 3, 64])
def test_the_split_into_micro_batches_changes_nothing(batches, tmp_path):
    model = make_model(dtype=torch.float64)
    rollouts = [Rollout(PROMPT, r.response_ids, r.ended) for r in many_rollouts(64)]
    rows = -(-64 // batches)
    config = settings("-", tmp_path, micro_batch_rows=rows)
    assert len(list(micro_batches(rollouts, 10**6, len(PROMPT), rows))) == batches
    loss, ours = loss_and_gradients(model, rollouts, config)
    expected = plain_loss(model, rollouts)
    assert loss.entropy == pytest.approx(expected.item(), rel=TOLERANCE)
    assert_same(ours, plain_gradients(model, expected), TOLERANCE)


@pytest.mark.parametrize("padding", [0, 2])
def test_official_loss(padding, tmp_path):
    """Logits at t weighted by token t's mask, which leaves out padding, EOS (0) too if it is that;
    the mean of micro-batches' means, these in the order of sampling.
    """
    model = make_model(dtype=torch.float64)
    config = settings("-", tmp_path, official_loss=True, micro_batch_rows=2)
    rollouts = [Rollout(PROMPT, r.response_ids, r.ended) for r in ROLLOUTS]
    means = []
    for first in range(0, len(rollouts), 2):
        found = []
        for r in rollouts[first : first + 2]:
            mask = [0.0] * len(r.prompt_ids) + [float(token != padding) for token in r.response_ids]
            found.append(plain_entropies(model, r, 1.0)[[bool(m) for m in mask]])
        if len(torch.cat(found)):
            means.append(torch.cat(found).mean())
    expected = torch.stack(means).mean()
    truth = plain_gradients(model, expected)
    for share in (True, False):
        changed = config.model_copy(update={"share_prefix": share})
        loss, ours = loss_and_gradients(model, rollouts, changed, padding=padding)
        assert loss.entropy == pytest.approx(expected.item(), rel=TOLERANCE)
        assert_same(ours, truth, TOLERANCE)


@pytest.mark.parametrize("official", [False, True])
def test_maximising_turns_the_gradient_around(official, tmp_path):
    model = make_model(dtype=torch.float64)
    config = settings("-", tmp_path, official_loss=official, micro_batch_rows=3)
    loss, down = loss_and_gradients(model, ROLLOUTS, config)
    config = config.model_copy(update={"objective": "maximise"})
    same, up = loss_and_gradients(model, ROLLOUTS, config)
    assert same.entropy == pytest.approx(loss.entropy) and loss.entropy > 0
    assert_same(up, {name: -gradient for name, gradient in down.items()}, TOLERANCE)
    assert all(gradient.any() for gradient in up.values())


def test_prompts_are_computed_once(tmp_path):
    """A prompt is computed once, and not apart where only one rollout has it."""
    model = make_model()
    lengths = []
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: lengths.append(tuple(args[0].shape[:2])), with_kwargs=True
    )
    rollouts = [Rollout(PROMPT, [5, 6, 7], False) for _ in range(6)]
    loss_and_gradients(model, rollouts, settings("-", tmp_path, micro_batch_rows=2))
    assert lengths == [(1, 4), (2, 2), (2, 2), (2, 2)]
    lengths.clear()
    loss_and_gradients(model, rollouts[:1], settings("-", tmp_path))
    assert lengths == [(1, 6)]


def test_groups_of_prompts():
    groups = by_prompt(ROLLOUTS, True)
    assert [(ids and list(ids), len(group)) for ids, group in groups] == [
        (PROMPT, 3),
        ([34], 3),
        (None, 2),
    ]
    assert by_prompt(ROLLOUTS, False) == [(None, ROLLOUTS)]


def test_who_can_share():
    assert can_share_prefix(make_model()) and can_share_prefix(make_model("qwen2"))
    sliding = make_model("gemma2", head_dim=8, query_pre_attn_scalar=8)
    assert not can_share_prefix(sliding)


def test_a_cache_that_gives_other_states_is_not_shared():
    """Positions that ignore the cache, as some model's might, forbid sharing."""
    model = make_model()
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotary(
        x, position_ids - position_ids.min()
    )
    assert not can_share_prefix(model)


def test_micro_batches_keep_within_their_tokens():
    rollouts = [Rollout([1] * 5, [2] * (1 + i * i % 23), False) for i in range(50)]
    for budget in (1, 30, 64, 200):
        for computed in (0, 5):
            found = list(micro_batches(rollouts, budget, computed))
            assert sorted(map(id, sum(found, []))) == sorted(map(id, rollouts))
            for batch in found:
                size = len(batch) * (max(map(len, batch)) - computed)
                assert len(batch) == 1 or size <= budget


@pytest.mark.parametrize("share", [True, False])
def test_recomputation_gives_the_same_gradient(share, tmp_path):
    found = {}
    for on in (False, True):
        config = settings("-", tmp_path, gradient_checkpointing=on, share_prefix=share)
        model = make_model()
        calls = []
        layer = model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *args, calls=calls: calls.append(args))
        loss, gradients = loss_and_gradients(model, many_rollouts(8), config)
        found[on] = loss, gradients, len(calls)
    assert found[True][2] == 2 * found[False][2]
    assert found[False][0] == found[True][0]
    for name, gradient in found[False][1].items():
        assert torch.equal(gradient, found[True][1][name])


def allocations(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_logits_and_their_weights_gradient_are_never_made(dtype, tmp_path):
    words = 8192
    model = make_model(vocab_size=words, tied=False, dtype=dtype)
    model.model.embed_tokens.requires_grad_(False)  # its gradient would be one large tensor
    rollouts = [Rollout([5] * 10, [6 + i] * 40, False) for i in range(16)]
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(args))
    config = settings("-", tmp_path, chunk_bytes=2**18)
    optimizer = make_optimizer(model, config)
    arguments = model, head_of(model), rollouts, config, optimizer, 10**6, lambda: None
    largest = max(allocations(lambda: entropy_step(*arguments)))
    assert not calls
    assert largest <= words * 32 * 4  # one slab of at most 64 MiB holds it all
    naive = allocations(
        lambda: model(torch.tensor([r.prompt_ids + r.response_ids for r in rollouts]))
    )
    assert max(naive) >= 16 * 40 * words * dtype.itemsize


def test_real_model(demo, tmp_path):
    """Loss and gradient of the 135M model in fp32, two micro-batches behind one prompt."""
    model, tokenizer = demo
    prompt = tokenizer("2 + 3 =").input_ids
    rollouts = [Rollout(prompt, tokenizer(text).input_ids, True) for text in (" 5\n", " five. So")]
    loss, ours = loss_and_gradients(model, rollouts, settings("-", tmp_path), micro_batch=1)
    expected = plain_loss(model, rollouts)
    truth = plain_gradients(model, expected)
    assert loss.entropy == pytest.approx(expected.item(), rel=1e-5)
    error = sum((ours[name] - truth[name]).square().sum() for name in truth)
    # fp32 dhidden, a sum over the vocabulary, is exact to 7e-5, as is eager's; the truth is fp64.
    assert error < (2e-4) ** 2 * sum(gradient.square().sum() for gradient in truth.values())
