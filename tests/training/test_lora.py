"""LoRA adapters: which layers get them, and that only they are trained."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from training.adapters import (
    ARCHITECTURES,
    FP32_AND_BF16,
    IDS,
    WIDE,
    error_of,
    is_adapter,
    lora,
    loss_of,
    planned_count,
    trained,
    wide,
)
from training.tiny import PLAIN, loss_and_gradients, make_model, run, save_tiny, settings
from transformers import AutoConfig, AutoModelForCausalLM

from em_kernels.hf import check_head, head_of
from em_kernels.training.config import TrainConfig
from em_kernels.training.models.lora import adapted_layers, add_adapters
from em_kernels.training.rollouts.kv_cache import check_cache
from em_kernels.training.rollouts.sampling import Rollout, generate
from em_kernels.training.settings import UserError


@FP32_AND_BF16
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_linear_layer_but_the_head_has_one(kind, dtype):
    """Adapters have the model's dtype, are as many as planned, and have no effect at first."""
    model = wide(kind, dtype=dtype)
    linear = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    (head,) = (n for n, m in model.named_modules() if m is model.get_output_embeddings())
    before = model(IDS).logits
    with torch.device("meta"):
        planned = planned_count(AutoModelForCausalLM.from_config(model.config), lora())
    adapted = add_adapters(model, lora())
    assert adapted.get_base_model() is model
    added = dict(adapted.named_parameters())
    names = {n for n in added if is_adapter(n)}
    where = {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in names}
    assert where == linear - {head} and len(where) >= 8
    assert all(added[n].dtype == dtype and added[n].requires_grad for n in names)
    assert not any(added[n].requires_grad for n in added.keys() - names)
    assert sum(added[n].numel() for n in names) == planned
    assert torch.equal(model(IDS).logits, before)
    check_head(model, head_of(model))
    check_cache(model)
    assert not any(module.training for module in adapted.modules())


@FP32_AND_BF16
@pytest.mark.parametrize("kind", ["llama", "phi", "gemma2"])
def test_only_adapters_get_gradients(kind, dtype):
    model = wide(kind, dtype=dtype)
    adapted = trained(model)
    base = {n: p.clone() for n, p in adapted.named_parameters() if not is_adapter(n)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss = loss_of(model)
    loss.backward()
    for name, parameter in adapted.named_parameters():
        if is_adapter(name):
            assert parameter.grad.dtype == dtype and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    assert loss_of(model) < loss
    assert all(torch.equal(p, base[n]) for n, p in adapted.named_parameters() if n in base)


def test_gradients_are_those_of_the_product():
    """d loss / dB = scale * G A^T and d loss / dA = scale * B^T G, where G = d loss / dW."""
    model = wide("qwen2", dtype=torch.float64)
    adapted = trained(model)
    whole = wide("qwen2", dtype=torch.float64)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        whole.get_submodule(name).weight.data += 3.0 * (b @ a).detach()
    for each in (model, whole):
        torch.special.entr(each(IDS).logits.softmax(-1)).sum(-1).mean().backward()
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        gradient = whole.get_submodule(name).weight.grad
        assert_close(b.grad, 3.0 * gradient @ a.T)
        assert_close(a.grad, 3.0 * b.T @ gradient)
    assert adapted.get_base_model() is model


@pytest.mark.parametrize(
    "targets",
    [
        ("q_proj",),
        ("v_proj",),
        pytest.param(("q_proj", "v_proj"), marks=pytest.mark.slow),
        ("layers.1.self_attn.q_proj",),
        ("layers.1.self_attn.k_proj", "layers.0.mlp.up_proj"),
        ("layers.1.mlp.down_proj",),
        ("gate_proj", "up_proj", "down_proj"),
    ],
    ids=" ".join,
)
def test_gradients_with_and_without_a_shared_prompt(targets, tmp_path):
    """Keys and values that no adapter touches need no gradient; plan and update still work."""
    model = wide("qwen2", dtype=torch.float64)
    adapted = trained(model, lora(lora_targets=targets))
    adapted.double()
    rollouts = [Rollout([5, 6, 7], [*range(8, 8 + n)], False) for n in (3, 1, 5)]
    (loss, shared), (same, alone) = (
        loss_and_gradients(model, rollouts, settings("-", tmp_path, share_prefix=share))
        for share in (True, False)
    )
    assert loss.entropy == pytest.approx(same.entropy, rel=1e-9)
    assert shared.keys() == alone.keys() and len(shared) == 2 * len(lora_layers(model))
    for name, gradient in shared.items():
        assert error_of(gradient, alone[name]) < 1e-6, name
    base = save_tiny(tmp_path / "model", "qwen2", tied=False, **WIDE)
    config = settings(base, tmp_path / "run", mode="lora", lora_targets=targets, steps=1)
    assert run(config).metrics[0]["grad_norm"] > 0


def lora_layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_A")]


@FP32_AND_BF16
def test_completions_are_sampled_through_unmerged_adapters(tokenizer, dtype):
    def sample(model):
        prompts = [[5, 6, 7]] * 4
        return generate(model, tokenizer, prompts, [(0, i) for i in range(4)], PLAIN)

    model = wide(dtype=dtype)
    before = sample(model)
    adapted = add_adapters(model, lora())
    assert sample(model) == before
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter.data, std=0.1)
    frozen = {n: p.clone() for n, p in adapted.named_parameters()}
    assert sample(model) != before
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.named_parameters())


@FP32_AND_BF16
def test_adapters_depend_on_the_seed_alone(dtype):
    def adapters(seed, noise):
        model = wide(dtype=dtype)
        torch.manual_seed(noise)
        state = torch.random.get_rng_state()
        adapted = add_adapters(model, lora(seed=seed))
        assert torch.equal(torch.random.get_rng_state(), state)
        return [p for n, p in adapted.named_parameters() if is_adapter(n)]

    first, again, other = adapters(3, 0), adapters(3, 1), adapters(2**32 - 1, 0)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_modules_that_checkpoint_activations_still_do():
    model = wide()
    model.model.layers[1].training = True
    adapted = add_adapters(model, lora())
    assert [m for m in adapted.modules() if m.training] == [model.model.layers[1]]


@pytest.mark.parametrize(
    "targets, layers",
    [
        (("q_proj", "v_proj"), {"self_attn.q_proj": 128, "self_attn.v_proj": 96}),
        (("mlp.down_proj",), {"mlp.down_proj": 192}),
    ],
)
def test_named_targets(targets, layers):
    model, config = wide(), lora(lora_targets=targets)
    found = adapted_layers(model, config)
    assert found.keys() == {f"model.layers.{i}.{name}" for i in (0, 1) for name in layers}
    planned = planned_count(model, config)
    adapted = add_adapters(model, config)
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert planned == count == 4 * 2 * sum(layers.values())


@pytest.mark.parametrize(
    "kind, target, message",
    [
        ("llama", "lm_head", "lm_head is the output head, .*; leave it out, as all-linear does$"),
        ("qwen2", "lm_head", "lm_head is the output head"),
        ("opt", "lm_head", "lm_head is the output head"),
        ("renamed", "embed_out", "embed_out is the output head"),
        ("llama", "query", "query names no linear layer; there are down_proj, gate_proj, k_proj,"),
        ("llama", "embed_tokens", "embed_tokens names no linear layer"),
        ("llama", "mlp", "mlp names no linear layer"),
        ("llama", "proj", "proj names no linear layer"),
        ("llama", "all-linear", "all-linear names no linear layer; .*; or all-linear alone$"),
    ],
)
def test_targets_that_are_refused(kind, target, message):
    """They are refused before anything is changed, on the meta device too."""
    with torch.device("meta"):
        if kind == "opt":
            model = make_model("opt", ffn_dim=48, word_embed_proj_dim=32)
        else:
            model = wide("llama" if kind == "renamed" else kind)
    if kind == "renamed":
        model.embed_out = model.lm_head
        del model.lm_head
        model.get_output_embeddings = lambda: model.embed_out
    config = lora(lora_targets=("q_proj", target))
    for refuses in (adapted_layers, add_adapters):
        with pytest.raises(UserError, match=f"^lora_targets: {message}"):
            refuses(model, config)
    assert not any(is_adapter(name) for name, _ in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_that_peft_would_adapt_instead_are_refused():
    """The first layer is dense, and its linear layers have names that experts' parts once had."""

    def model():
        shape = {**WIDE, "num_experts": 8, "moe_intermediate_size": 64, "head_dim": 16}
        return make_model("qwen3_moe", **shape, mlp_only_layers=[0])

    with pytest.raises(UserError, match="^lora_targets: in a Qwen3MoeForCausalLM, peft takes some"):
        add_adapters(model(), lora())
    add_adapters(model(), lora(lora_targets=("q_proj", "v_proj")))


@pytest.mark.parametrize(
    "shape, count",
    [
        ((1536, 8960, 28, 12, 2), 18_464_768),
        ((3584, 18944, 28, 28, 4), 40_370_176),  # at 16 bytes 0.60 GiB
    ],
    ids=["1.5B", "7B"],
)
def test_count_of_qwen25(shape, count):
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads "
    names += "num_key_value_heads"
    config = AutoConfig.for_model("qwen2", **dict(zip(names.split(), shape, strict=True)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert planned_count(model, TrainConfig()) == count
