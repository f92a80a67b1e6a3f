"""4-bit bases: what is quantised, training on them, merging into the unquantised base."""

import sys

import pytest
import torch
from peft import PeftModel
from training.adapters import (
    ARCHITECTURES,
    IDS,
    WIDE,
    error_of,
    is_adapter,
    lora,
    loss_of,
    planned_count,
    saved,
    trained,
)
from training.tiny import PLAIN, save_tiny
from transformers import AutoModelForCausalLM

from em_kernels.hf import check_head, head_of
from em_kernels.training.models.loading import four_bit_config, load_model
from em_kernels.training.models.lora import adapted_layers, add_adapters
from em_kernels.training.rollouts.sampling import generate
from em_kernels.training.runs.merge import merge
from em_kernels.training.settings import UserError


def four_bit(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=four_bit_config(torch.bfloat16)
    )


def learn(model, adapted):
    """Yield the losses of three updates."""
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
    """All but head, embeddings and norms is quantised; training, sampling and merging work."""
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
    assert {p.dtype for p in adapters} == {model.get_output_embeddings().weight.dtype}
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
    """They equal those of the dequantised weights up to bf16's rounding, also after sampling."""
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
    config = four_bit_config(torch.bfloat16)
    config.llm_int8_skip_modules = ["nothing"]
    folder = save_tiny(tmp_path / "model", **WIDE, tied=False, vocab_size=320)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with pytest.raises(TypeError, match="its head is a Linear4bit, not a plain nn.Linear"):
        head_of(model)


def test_products_have_the_dtype_of_the_run(tmp_path):
    folder = save_tiny(tmp_path / "model", **WIDE)
    cpu = torch.device("cpu")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        model = load_model(str(folder), name, "auto", cpu, four_bit=True)
        packed = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
        assert packed and {layer.compute_dtype for layer in packed} == {dtype}
        assert model.dtype == head_of(model).weight.dtype == dtype


def test_bitsandbytes_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"^4bit: .* pip install 'em-kernels\[4bit\]'$"):
        four_bit_config(torch.bfloat16)
