"""The head of a transformers model is found, or refused rather than wrong."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from training.tiny import make_model
from transformers import LlamaForCausalLM

from em_kernels import fused_entropy_loss
from em_kernels.hf import check_head, head_of, hidden_states

GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"tied": False},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi": {"tied": False},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 2.0},
    "granite": {"logits_scaling": 8.0},
}
IDS = torch.tensor([[5, 99, 0, 7, 33, 2, 11], [3, 1, 200, 100, 0, 0, 0]])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_loss_is_the_entropy_of_the_models_logits(kind):
    """Right padding changes nothing."""
    model = make_model(kind, dtype=torch.float64, **ARCHITECTURES[kind])
    head = head_of(model)
    check_head(model, head)
    hidden = hidden_states(model, IDS)
    found = fused_entropy_loss(hidden, head.weight, reduction="none", **head.arguments())
    for row, length in ((0, 7), (1, 4)):
        logp = model(IDS[row : row + 1, :length]).logits[0].log_softmax(-1)
        expected = -(logp.exp() * logp).sum(-1)
        assert_close(found[row, :length], expected, rtol=1e-5, atol=1e-6)


def test_head_of_known_architectures():
    assert head_of(make_model("llama")).arguments() == {
        "bias": None,
        "logit_scale": 1.0,
        "softcap": None,
    }
    assert head_of(make_model("gemma2", final_logit_softcapping=20.0, **GEMMA)).softcap == 20.0
    assert head_of(make_model("cohere", logit_scale=0.25)).logit_scale == 0.25
    assert head_of(make_model("granite", logits_scaling=8.0)).logit_scale == 0.125
    biased = make_model("phi", tied=False)
    assert head_of(biased).bias is biased.lm_head.bias


def test_tied_head_is_the_embedding():
    model = make_model(tied=True)
    assert head_of(model).weight is model.model.embed_tokens.weight


class LoraLinear(nn.Linear):
    """A layer like peft's: the frozen layer inside, plus a product of two thin ones."""

    def __init__(self, base_layer):
        super().__init__(base_layer.in_features, base_layer.out_features, bias=False)
        self.base_layer = base_layer


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden) + hidden.mean()


def test_adapter_on_the_head_is_refused():
    model = make_model(tied=False)
    model.lm_head = LoraLinear(model.lm_head)
    with pytest.raises(TypeError, match=r"adapter \(LoRA\); leave lm_head out of target_modules"):
        head_of(model)


def test_head_that_is_not_linear_is_refused():
    model = make_model(tied=False)
    model.lm_head = Wrapped(model.lm_head)
    with pytest.raises(TypeError, match="its head is a Wrapped, not a plain nn.Linear"):
        head_of(model)


class Scaled(LlamaForCausalLM):
    """A head with a transform that no config setting known to us describes."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1.01 * output.logits
        return output


class Shifted(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, output.logits.shape[-1])
        return output


@pytest.mark.parametrize("kind", [Scaled, Shifted])
def test_logits_other_than_the_heads_are_refused(kind):
    model = kind(make_model().config).eval()
    with pytest.raises(TypeError, match=f"{kind.__name__}'s logits are not its head applied"):
        check_head(model, head_of(model))


def test_softcap_that_the_head_lacks_is_refused():
    model = make_model("gemma2", initializer_range=1.0, **GEMMA)
    head = head_of(model)
    check_head(model, head)
    with pytest.raises(TypeError, match="not its head"):
        check_head(model, head._replace(softcap=None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["cohere", "cohere2", "granite"])
def test_scale_that_the_head_lacks_is_refused(kind, dtype):
    model = make_model(kind, dtype=dtype, **ARCHITECTURES[kind])
    head = head_of(model)
    check_head(model, head)
    with pytest.raises(TypeError, match="not its head"):
        check_head(model, head._replace(logit_scale=1.0))


def test_setting_that_another_architecture_means_otherwise_is_refused():
    """HyperCLOVA X multiplies by the setting that Granite divides by."""
    model = make_model("hyperclovax", logits_scaling=4.0)
    with pytest.raises(TypeError, match="HyperCLOVAXForCausalLM's logits are not its head"):
        check_head(model, head_of(model))


def test_logits_that_are_not_finite_are_refused():
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(TypeError, match="differ by nan"):
        check_head(model, head_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_half_precision_models_pass(kind, dtype):
    model = make_model(kind, dtype=dtype, **ARCHITECTURES[kind])
    check_head(model, head_of(model))


def test_vocabulary_smaller_than_the_probe():
    model = make_model(vocab_size=5, eos_token_id=0, pad_token_id=2)
    check_head(model, head_of(model))
