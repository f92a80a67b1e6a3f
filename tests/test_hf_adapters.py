"""LoRA adapters on the head, and virtual tokens, against the logits of peft's own layers."""

import copy

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_hf import GEMMA
from test_hf_trainer import TAU, collate, eager, examples, gradients, train
from torch.testing import assert_close
from training.tiny import make_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from em_kernels.hf import check_head, entropy_loss
from em_kernels.hf_trainer import EntropyTrainer

pytestmark = pytest.mark.slow  # peft takes seconds to import

ON_HEAD = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
KINDS = {"llama": {}, "phi": {"tied": False}, "gemma2": {**GEMMA, "final_logit_softcapping": 5.0}}


def batch_of(count=4):
    return collate(list(examples())[:count])


def adapted(model, *more, **first):
    """Put LoRA adapters on a model's head and q_proj, all of them active."""
    torch.manual_seed(1)
    found = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **ON_HEAD, **first))
    for i, config in enumerate(more):
        found.add_adapter(f"more{i}", LoraConfig(**ON_HEAD, **config))
    found.base_model.set_adapter([*found.peft_config])
    return found.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", ["one", "two", "dropout", "disabled", "merged", "both"])
def test_adapter_on_the_head(state, kind):
    model = make_model(kind, dtype=torch.float64, **KINDS[kind])
    bare = eager(model, batch_of()).item()
    more = [{"lora_alpha": 7, "r": 2, "use_rslora": True}] if state == "two" else []
    dropout = 0.5 if state == "dropout" else 0.0
    model = adapted(model, *more, r=3, lora_alpha=5, lora_dropout=dropout)
    check_head(model)
    model.train(state == "dropout")
    if state in ("merged", "both"):
        model.merge_adapter()
    if state in ("disabled", "both"):
        model.base_model.disable_adapter_layers()
    torch.manual_seed(2)
    ours = entropy_loss(model, batch_of(), temperature=TAU)
    torch.manual_seed(2)
    plain = eager(model, batch_of())
    assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    assert (abs(ours.item() - bare) > 1e-3) == (state not in ("disabled", "both"))
    if state in ("disabled", "merged", "both"):
        return
    expected, found = gradients(model, plain), gradients(model, ours)
    assert sum("lm_head" in name for name in found) == 2 * (1 + len(more))
    for name, x in expected.items():
        assert x.any()
        assert_close(found[name], x, rtol=1e-9, atol=1e-9 * x.abs().max().item(), msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_adapter_on_a_bf16_head_is_no_less_exact_than_its_logits(autocast):
    """peft's adapters are fp32 on a bf16 model; autocast takes an fp32 one."""
    model = adapted(make_model(dtype=torch.float32 if autocast else torch.bfloat16), r=3)
    batch, exact = batch_of(), copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, plain = entropy_loss(model, batch, temperature=TAU), eager(model, batch)
    truth = eager(exact, batch)
    assert abs(ours - truth) <= 2 * abs(plain - truth) + 1e-3
    found, near = gradients(model, ours), gradients(model, plain)
    for name, true in gradients(exact, truth).items():
        error, allowed = ((x[name].double() - true).norm() for x in (found, near))
        assert error <= 2 * allowed + 1e-2 * true.norm(), name


def test_training_with_an_adapter_on_the_head(tmp_path):
    losses, weights = train(EntropyTrainer, tmp_path, adapted(make_model(), r=3), temperature=TAU)
    start = dict(adapted(make_model(), r=3).named_parameters())
    moved = {name for name, x in weights.items() if not torch.equal(x, start[name])}
    assert moved == {name for name in weights if "lora_" in name} and losses[-1] < losses[0]


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(**ON_HEAD, use_dora=True), "adapter default is a variant of LoRA .* or has a"),
        (LoraConfig(**ON_HEAD, lora_bias=True), "adapter default is a variant of LoRA .* or has a"),
        (LoHaConfig(target_modules=["lm_head"]), "an adapter other than peft's LoRA .*; leave"),
    ],
)
def test_adapters_that_are_refused(config, message):
    model = get_peft_model(make_model("phi", tied=False), config)
    for function in (check_head, lambda model: entropy_loss(model, batch_of())):
        with pytest.raises(TypeError, match=f"^model: its head.*{message}"):
            function(model)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens(config, tmp_path):
    model = get_peft_model(make_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=5))
    check_head(model)
    batch = batch_of()
    mask, inputs = batch["attention_mask"], {k: x for k, x in batch.items() if k != "labels"}
    logits = model(**inputs).logits[:, -mask.shape[1] :][:, :-1] / TAU
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    plain = entropy[(batch["labels"][:, 1:] != -100) & (mask[:, :-1] == 1)].mean()
    ours = entropy_loss(model, batch, temperature=TAU)
    assert_close(ours, plain)
    for x, y in zip(gradients(model, ours).values(), gradients(model, plain).values(), strict=True):
        assert y.any()
        assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())
    positions = mask.cumsum(1)
    with pytest.raises(ValueError, match="^position_ids: peft leaves them out"):
        entropy_loss(model, {**batch, "position_ids": positions})
    losses, _ = train(EntropyTrainer, tmp_path, model, temperature=TAU)
    assert len(losses) == 3


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}


@pytest.mark.parametrize("divisor", [None, 40])
def test_load_balancing_loss(divisor):
    """As transformers adds it where the config asks for router logits, and only there."""
    model = make_model("mixtral", output_router_logits=True, **MOE)
    batch = batch_of()
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    count = (batch["labels"][:, 1:] != -100).sum()
    share = 1 if divisor is None else count / divisor
    plain = eager(model, batch, divisor) + 0.1 * share * model(**inputs).aux_loss
    ours = entropy_loss(model, batch, temperature=TAU, num_items_in_batch=divisor)
    assert_close(ours, plain)
    expected, found = gradients(model, plain), gradients(model, ours)
    for name, x in expected.items():
        assert_close(found[name], x, rtol=1e-3, atol=1e-5 * x.abs().max().item(), msg=name)
    model.config.output_router_logits = False
    ours = entropy_loss(model, batch, temperature=TAU, num_items_in_batch=divisor)
    assert_close(ours, eager(model, batch, divisor))


def test_encoder_decoders_are_refused(tmp_path):
    config = AutoConfig.for_model("t5", vocab_size=267, d_model=32, d_kv=8, d_ff=48, num_layers=1)
    model = AutoModelForSeq2SeqLM.from_config(config)
    for function in (
        check_head,
        lambda model: entropy_loss(model, batch_of()),
        lambda model: train(EntropyTrainer, tmp_path, model),
    ):
        with pytest.raises(TypeError, match="^model: T5ForConditionalGeneration is an encoder-dec"):
            function(model)
