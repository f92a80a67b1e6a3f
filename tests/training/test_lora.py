"""Adapters: where they are, that they alone learn, that they open elsewhere and merge exactly."""

import json
import shutil
import socket
import sys

import huggingface_hub.constants
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from training.tiny import PLAIN, make_model, make_tokenizer, rounded, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from em_kernels import fused_entropy_loss
from em_kernels.hf import check_head, head_of, hidden_states
from em_kernels.training.config import TrainConfig, UserError
from em_kernels.training.lora import (
    adapted_layers,
    add_adapters,
    four_bit_config,
    merge,
    merge_command,
    write_adapter,
)
from em_kernels.training.rollout import check_cache, generate

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes wants blocks of 64
ARCHITECTURES = {
    "llama": {"tied": True},
    "qwen2": {"tied": False},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi": {"tied": False},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},  # its layers are Conv1D
    "gpt_neox": {"tied": False},
    "mixtral": {"num_local_experts": 2},  # its experts and their gate are no linear layers
}
IDS = torch.arange(24).reshape(2, 12)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def lora(**changes):
    return TrainConfig(**{"mode": "lora", "lora_rank": 4, "lora_alpha": 12, **changes})


def wide(kind="llama", **changes):
    return make_model(kind, **{**WIDE, **ARCHITECTURES[kind], **changes})


def error_of(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def planned_count(model, config):
    """Of the adapters' parameters, from the layers that a plan takes; on the meta device too."""
    layers = adapted_layers(model, config).values()
    return config.lora_rank * sum(sum(layer.weight.shape) for layer in layers)


def is_adapter(name):
    return ".lora_A." in name or ".lora_B." in name


def trained(model, config=None):
    """Adapters that do something: as made, the second factor is zero."""
    adapted = add_adapters(model, config or lora())
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter.data, std=0.1)
    return adapted


def saved(adapted, folder):
    folder.mkdir(parents=True)
    write_adapter(adapted, make_tokenizer())(folder)
    return folder


def loss_of(model):
    head = head_of(model)
    hidden = hidden_states(model, IDS)
    return fused_entropy_loss(hidden, head.weight, **head.arguments())


@DTYPES
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_linear_layer_but_the_head_has_one(kind, dtype):
    """In fp32, counted beforehand, and at first without effect."""
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
    assert all(added[n].dtype == torch.float32 and added[n].requires_grad for n in names)
    assert not any(added[n].requires_grad for n in added.keys() - names)
    assert sum(added[n].numel() for n in names) == planned
    assert torch.equal(model(IDS).logits, before)
    check_head(model, head_of(model))
    check_cache(model)
    assert not any(module.training for module in adapted.modules())


@DTYPES
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
            assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    assert loss_of(model) < loss
    assert all(torch.equal(p, base[n]) for n, p in adapted.named_parameters() if n in base)


def test_gradients_are_those_of_the_product(tokenizer):
    """d loss / dB = scale * G A^T and d loss / dA = scale * B^T G, with G the sum's gradient."""
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


@DTYPES
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


@DTYPES
def test_adapters_depend_on_the_seed_alone(dtype):
    def adapters(seed, noise):
        model = wide(dtype=dtype)
        torch.manual_seed(noise)
        state = torch.random.get_rng_state()
        adapted = add_adapters(model, lora(seed=seed))
        assert torch.equal(torch.random.get_rng_state(), state)
        return [p for n, p in adapted.named_parameters() if is_adapter(n)]

    first, again, other = adapters(3, 0), adapters(3, 1), adapters(2**63 - 1, 0)
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
    """Before anything is changed, and on the meta device too."""
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


def four_bit(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=four_bit_config()
    )


def learn(model, adapted):
    """Losses of three updates."""
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = loss_of(model)
        loss.backward()
        for name, parameter in adapted.named_parameters():
            assert (parameter.grad is not None) == is_adapter(name), name
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi", "gpt_neox"])
def test_base_in_four_bits(kind, tmp_path, tokenizer):
    """Everything but the head, the embeddings and the norms is packed; it learns and samples; what
    it learned is merged into the unquantised base.
    """
    settings = {**WIDE, **ARCHITECTURES[kind]}
    folder = save_tiny(tmp_path / "model", kind, dtype=torch.bfloat16, **settings)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    planned = planned_count(whole, lora())
    model = four_bit(folder)
    packed = {n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert packed == adapted_layers(whole, lora()).keys() == adapted_layers(model, lora()).keys()
    adapted = add_adapters(model, lora())
    check_head(model, head_of(model))
    adapters = [p for n, p in adapted.named_parameters() if is_adapter(n)]
    assert sum(p.numel() for p in adapters) == planned
    assert {p.dtype for p in adapters} == {torch.float32}
    first, *_, last = learn(model, adapted)
    assert last < first
    for rollout in generate(model, tokenizer, [[5, 6, 7]] * 2, [(0,), (1,)], PLAIN):
        assert rollout.response_ids
    output = merge(saved(adapted, tmp_path / "adapter"), tmp_path / "merged")
    expected = PeftModel.from_pretrained(whole, tmp_path / "adapter")(IDS).logits
    found = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert getattr(found.config, "quantization_config", None) is None
    assert error_of(found(IDS).logits, expected) < 0.02


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gradients_pass_through_four_bits(kind, tmp_path, tokenizer):
    """As through the same weights unpacked, to bf16's rounding; after sampling, too."""
    from bitsandbytes.functional import dequantize_4bit

    folder = save_tiny(
        tmp_path / "model", kind, **{**WIDE, **ARCHITECTURES[kind]}, initializer_range=0.1
    )
    model = four_bit(folder)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            exact.get_submodule(name).weight.data = weight.to(torch.bfloat16)
    gradients = []
    for each in (exact.float(), model):
        adapted = trained(each)
        generate(each, tokenizer, [[5, 6, 7]], [(0,)], PLAIN)
        loss_of(each).backward()
        found = {n: p.grad for n, p in adapted.named_parameters() if is_adapter(n)}
        gradients.append(torch.cat([found[name].flatten() for name in sorted(found)]))
    assert error_of(gradients[1], gradients[0]) < 0.1


def test_head_in_four_bits_is_refused(tmp_path):
    config = four_bit_config()
    config.llm_int8_skip_modules = ["nothing"]
    folder = save_tiny(tmp_path / "model", **WIDE, tied=False, vocab_size=320)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(TypeError, match="its head is a Linear4bit, not a plain nn.Linear"):
        head_of(model)


def test_bitsandbytes_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"^4bit: .* pip install 'em-kernels\[4bit\]'$"):
        four_bit_config()


def test_adapter_folder_is_written_without_the_network(tmp_path, monkeypatch):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = wide()
    model.name_or_path = "somebody/a-model"
    adapted = trained(model)
    folder = saved(adapted, tmp_path / "adapter")
    assert not asked
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/a-model"
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 12, True)
    assert adapted.peft_config["default"].inference_mode is False
    opened = PeftModel.from_pretrained(wide(), folder)
    assert torch.equal(opened(IDS).logits, model(IDS).logits)
    assert not asked


@DTYPES
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
def test_peft_opens_the_folder(targets, dtype, tmp_path):
    base = save_tiny(tmp_path / "model", **WIDE, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    adapted = trained(model, lora(lora_targets=targets))
    folder = saved(adapted, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    opened = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype)
    here, there = dict(adapted.named_parameters()), dict(opened.named_parameters())
    assert here.keys() == there.keys()
    assert all(torch.equal(here[n], there[n]) and here[n].dtype == there[n].dtype for n in here)
    assert torch.equal(opened(IDS).logits, model(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == make_tokenizer().chat_template


def test_name_is_the_settings_where_the_model_has_none(tmp_path):
    folder = saved(add_adapters(wide(), lora(model="./here")), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./here"


@pytest.fixture
def adapter(tmp_path):
    """Of a bf16 base."""
    base = save_tiny(tmp_path / "model", dtype=torch.bfloat16, **WIDE)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return saved(trained(model), tmp_path / "adapter")


@DTYPES
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_merged_weights_are_the_exact_sums_rounded_once(kind, dtype, tmp_path):
    base = save_tiny(tmp_path / "model", kind, dtype=dtype, **WIDE, **ARCHITECTURES[kind])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.mul(2**16).round() / 2**16  # so that fp32 sums are exact
    model.to(dtype).save_pretrained(base)
    model.float()
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    adapted = trained(model)
    for name, parameter in adapted.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.mul(64).round() / 64
    logits = model(IDS).logits
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    output = merge(saved(adapted, tmp_path / "adapter"), tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(output)
    assert found.dtype == torch.bfloat16 and type(found) is type(model)
    for name, parameter in found.named_parameters():
        layer, exact = layers.get(name.removesuffix(".weight")), before[name]
        if layer is not None:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            delta = 3.0 * (b.double() @ a.double())
            exact = exact + (delta.T if kind == "gpt2" else delta)
            assert not torch.equal(rounded(before[name]), parameter)
        assert torch.equal(parameter, rounded(exact)), name
    merged = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)(IDS).logits
    assert 0 < error_of(merged, logits) < 0.04


def test_deltas_that_bf16_would_round_away(tmp_path):
    """1 + 2^-11 is 1, to the nearest; one in sixteen weights has to become 1 + 2^-7."""
    base = save_tiny(tmp_path / "model", dtype=torch.bfloat16, **WIDE)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1.0)
    model.save_pretrained(base)
    adapted = add_adapters(model, lora(lora_rank=1, lora_alpha=1, lora_targets=("up_proj",)))
    layer = model.model.layers[0].mlp.up_proj
    layer.lora_A["default"].weight.data.fill_(1.0)
    layer.lora_B["default"].weight.data.fill_(2**-11)
    output = merge(saved(adapted, tmp_path / "adapter"), tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(output).model.layers[0].mlp.up_proj.weight
    assert set(found.unique().tolist()) == {1.0, 1 + 2**-7}
    assert (found.float().mean() - 1).item() == pytest.approx(2**-11, rel=0.1)


def test_experts_that_peft_would_adapt_instead_are_refused():
    """The first layer here is dense, and its layers are named as experts' parts once were."""

    def model():
        shape = {**WIDE, "num_experts": 8, "moe_intermediate_size": 64, "head_dim": 16}
        return make_model("qwen3_moe", **shape, mlp_only_layers=[0])

    with pytest.raises(UserError, match="^lora_targets: of a Qwen3MoeForCausalLM peft adapts the"):
        add_adapters(model(), lora())
    add_adapters(model(), lora(lora_targets=("q_proj", "v_proj")))


def test_merged_folder_is_complete(tmp_path, adapter):
    shutil.copytree(tmp_path / "model", tmp_path / "model2")
    (tmp_path / "merged").mkdir()  # empty is as good as none
    output = merge(adapter, tmp_path / "merged")
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.startswith("adapter") for name in names)
    assert AutoConfig.from_pretrained(output).dtype == torch.bfloat16
    assert {w.dtype for w in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.generation_config.eos_token_id == 0
    check_head(model, head_of(model))
    assert head_of(model).weight is model.model.embed_tokens.weight  # still tied
    assert AutoTokenizer.from_pretrained(output).chat_template == make_tokenizer().chat_template


def test_command_takes_a_runs_newest_checkpoint(tmp_path, adapter, capsys):
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step-00009", "step-99999", "step-100000", ".step-100001.partial"):
        shutil.copytree(adapter, checkpoints / name)
    for folder in checkpoints.iterdir():
        if folder.name != "step-100000":
            (folder / "adapter_model.safetensors").write_bytes(b"")
    assert merge_command([str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'merged'}\n"
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with pytest.raises(SystemExit, match="0"):
        merge_command(["--help"])
    assert "usage: em-kernels merge [-h] --output DIR RUN_OR_CHECKPOINT" in capsys.readouterr().out


def test_output_that_holds_something_is_refused(tmp_path, adapter):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="^output: .*merged already holds"):
        merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged" / "notes.txt").read_text() == "mine"


def test_what_cannot_be_merged_leaves_nothing(tmp_path, adapter, folder):
    def refused(where, message):
        with pytest.raises(UserError, match=message) as caught:
            merge(where, tmp_path / "merged")
        assert "\n" not in str(caught.value)
        assert not [p for p in tmp_path.iterdir() if "merged" in p.name]

    refused(folder, r"^merge: .* has no adapter_config.json; name a run of mode lora$")
    refused(tmp_path / "nothing", "has no adapter_config.json")
    file = adapter / "adapter_model.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    first = next(name for name in weights if ".lora_A." in name)
    save_file({n: w for n, w in weights.items() if n != first}, file)
    refused(adapter, "it is not a plain LoRA")
    save_file({n.replace("layers.1", "layers.7"): w for n, w in weights.items()}, file)
    refused(adapter, "7")
    save_file({**weights, first: torch.zeros(4, 3)}, file)
    refused(adapter, f"^merge: {adapter}: .*3")
    file.write_bytes(whole[:-8])
    refused(adapter, f"^merge: {adapter}: ")
    file.write_bytes(whole)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    refused(adapter, f"^merge: {adapter}: .*{tmp_path / 'model'}")
