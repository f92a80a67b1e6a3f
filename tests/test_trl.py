"""TRL's GRPOTrainer trains with our statistics as it does with its own, and as with autograd."""

import gc
import importlib
import os
import sys
from contextlib import nullcontext

import pytest

pytest.importorskip("trl", reason="trl needs Python 3.11")
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from spawned import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from training.tiny import make_model, make_tokenizer, save_tiny
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, __version__
from trl.trainer import grpo_trainer

from em_kernels.ops import vocab_slabs
from em_kernels.trl import FusedGRPOTrainer, _adapter_on_the_head

pytestmark = pytest.mark.slow  # each with transformers' Trainer, some seconds

TESTED = "1.16"
PROMPTS = [
    "What is 2 + 3?",
    "abc",
    "the the",
    "a",
]  # lengths differ, so they are padded on the left
LORA = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
VIRTUAL = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
CASES = {
    "policy gradient": {},
    "bonus": {"entropy_coef": 0.1, "temperature": 0.7},
    "minimised": {"entropy_coef": -0.1, "temperature": 1.5, "num_iterations": 2},
    "reference model": {"entropy_coef": -0.05, "beta": 0.1},
    "uncertain tokens": {"entropy_coef": 0.1, "top_entropy_quantile": 0.5},
    "accumulated": {"entropy_coef": 0.1, "gradient_accumulation_steps": 2},
    "adaptive": {"entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 9.0},
    "lora": {"entropy_coef": -0.1, "beta": 0.1, "peft_config": LORA},
    "virtual tokens": {"entropy_coef": -0.1, "peft_config": VIRTUAL},
}


def test_version_is_the_tested_one():
    assert __version__.startswith(f"{TESTED}."), (
        f"em_kernels.trl was tested with trl {TESTED}, this is {__version__}: read what its "
        "_get_per_token_logps_and_entropies is given and its loss expects, what _generate returns, "
        "when it computes old log-probabilities, and what DistillationTrainer's _compute_loss "
        "is given and returns, then change TESTED"
    )


class Plain(GRPOTrainer):
    """GRPOTrainer whose statistics come from full logits, differentiated by autograd."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, **others
    ):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        logp = (logits[:, -logits_to_keep - 1 : -1] / self.temperature).log_softmax(-1)
        targets = input_ids[:, -logits_to_keep:, None]
        return logp.gather(-1, targets)[..., 0], -(logp.exp() * logp).sum(-1), None


class Recorder:
    """Mixin, placed before a trainer, that records the statistics and masks of its loss."""

    def _get_per_token_logps_and_entropies(self, model, ids, mask, length, **others):
        found = super()._get_per_token_logps_and_entropies(model, ids, mask, length, **others)
        scored = mask[:, -length:] > 0
        self.__dict__.setdefault("seen", []).append(
            (ids, mask, length, *(x[scored].detach() for x in found[:2] if x is not None))
        )
        return found


def varied(completions, **others):
    return [float(sum(map(ord, text)) % 7) for text in completions]


def equal(completions, **others):
    return [1.0] * len(completions)


def make_trainer(
    kind, model, output, reward=varied, steps=3, peft_config=None, data=None, **changes
):
    model.generation_config.eos_token_id = list(range(60))  # some completions end early
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "max_steps": steps}
    settings |= {
        "max_completion_length": 12,
        "optim": "sgd",
        "learning_rate": 0.02,
        "max_grad_norm": 1e9,
    }
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1}
    settings |= {"save_strategy": "no", "disable_tqdm": True}
    dataset, processor = data or (Dataset.from_dict({"prompt": PROMPTS}), make_tokenizer())
    return type("Recorded", (Recorder, kind), {})(
        model,
        reward,
        GRPOConfig(str(output), **(settings | changes)),
        dataset,
        processing_class=processor,
        peft_config=peft_config,
    )


def weights_of(trainer):
    return {name: x.detach().clone() for name, x in trainer.model.named_parameters()}


def train(*arguments, **settings):
    """Train; return the trainer and how far each weight moved."""
    trainer = make_trainer(*arguments, **settings)
    before = weights_of(trainer)
    trainer.train()
    return trainer, {name: x - before[name] for name, x in weights_of(trainer).items()}


def assert_same_training(ours, other, rounding):
    (ours, moved), (other, expected) = ours, other
    assert len(ours.seen) == len(other.seen)
    for found, wanted in zip(ours.seen, other.seen, strict=True):
        for x, y in zip(found[:2], wanted[:2], strict=True):
            assert torch.equal(x, y)  # the same completions
        for x, y in zip(found[3:], wanted[3:], strict=False):
            assert_close(x, y, rtol=rounding, atol=rounding)
    for found, wanted in zip(ours.state.log_history[:-1], other.state.log_history, strict=False):
        for name in ("loss", "grad_norm", "entropy"):
            assert found[name] == pytest.approx(wanted[name], rel=10 * rounding, abs=rounding)
    farthest = max(x.abs().max().item() for x in expected.values())
    assert farthest > 1e-3
    for name, x in expected.items():
        assert_close(moved[name], x, rtol=0, atol=10 * rounding * max(farthest, 0.1), msg=name)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "dtype, case",
    [
        *((torch.float64, case) for case in CASES),
        (torch.float32, "minimised"),
        *(
            pytest.param(torch.float32, c, marks=pytest.mark.slow)
            for c in CASES
            if c != "minimised"
        ),
    ],
)
def test_training_is_the_same(case, dtype, tmp_path):
    """In fp32 it trains as with TRL's own statistics, in fp64 as with autograd's."""
    # A folder, as the reference model is loaded from it.
    folder = save_tiny(tmp_path / "model", dtype=dtype)
    other, rounding = (GRPOTrainer, 1e-5) if dtype == torch.float32 else (Plain, 1e-9)
    ours, other = (
        train(kind, LlamaForCausalLM.from_pretrained(folder, dtype=dtype), tmp_path, **CASES[case])
        for kind in (FusedGRPOTrainer, other)
    )
    assert_same_training(ours, other, rounding)
    masks = [mask for _, mask, *_ in ours[0].seen]
    assert all(any((mask[:, side] == 0).any() for mask in masks) for side in (0, -1))  # padded


HEADS = {
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi": {"tied": False},  # a bias
    "mixtral": {"num_local_experts": 2},
}


@pytest.mark.parametrize("kind", [slow(k) if k == "granite" else k for k in HEADS])
def test_heads(kind, tmp_path):
    ours, other = (
        train(
            trainer,
            make_model(kind, **HEADS[kind]),
            tmp_path,
            steps=1,
            entropy_coef=0.1,
            router_aux_loss_coef=0.0,
        )
        for trainer in (FusedGRPOTrainer, Plain)
    )
    assert_same_training(ours, other, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_adapter_on_the_head(tied, tmp_path):
    """TRL refuses it; the plain model's logits have it, and a disabled one is the reference."""
    adapter = LoraConfig(
        target_modules=["q_proj", "lm_head"], r=3, lora_alpha=5, init_lora_weights=False
    )
    settings = {"beta": 0.1, "entropy_coef": 0.1, "num_iterations": 2, "peft_config": adapter}
    runs = []
    for kind in (FusedGRPOTrainer, Plain):
        with _adapter_on_the_head(grpo_trainer) if kind is Plain else nullcontext():
            model = make_model(tied=tied, dtype=torch.float64)
            runs.append(train(kind, model, tmp_path, **settings))
    assert_same_training(*runs, 1e-9)
    head = [x for name, x in runs[0][1].items() if "lm_head.lora" in name]
    assert len(head) == 2 and all(x.any() for x in head)


@pytest.mark.parametrize("coefficient", [0.0, 0.5, -0.5])
def test_entropy_alone_moves_the_weights(coefficient, tmp_path):
    """Equal rewards have no policy gradient: TRL #6625, #5595, #6140."""
    settings = {"reward": equal, "steps": 1, "entropy_coef": coefficient, "learning_rate": 1e-3}
    trainer, moved = train(FusedGRPOTrainer, make_model(), tmp_path, **settings)
    ids, mask, length, _, before = trainer.seen[0]
    with torch.no_grad():
        trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, length, compute_entropy=True
        )
    change = (trainer.seen[-1][-1].mean() - before.mean()).item()
    if coefficient == 0:
        assert change == 0 and not any(x.any() for x in moved.values())
        return
    assert all(x.any() for x in moved.values())
    # The loss is the mean entropy alone: a step of length 1e-3 / 2 along its gradient.
    slope = sum(x.double().square().sum().item() for x in moved.values()) / (1e-3 * coefficient)
    assert change == pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize("kind", [FusedGRPOTrainer, Plain])
def test_no_tensor_of_the_size_of_the_logits(kind, tmp_path, monkeypatch):
    """Holds where the logits do not fit into the memory that may be used for them."""
    monkeypatch.setattr(vocab_slabs, "logits_budget", lambda *_: 0)
    rows, length, vocabulary = 4, 128, 1 << 16
    trainer = make_trainer(kind, make_model(vocab_size=vocabulary), tmp_path, temperature=0.5)
    ids = torch.randint(vocabulary, (rows, length))

    def step():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), length - 8, compute_entropy=True
        )
        (logps + entropies).sum().backward()

    logits_bytes = rows * (length - 8) * vocabulary * 4
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert largest >= logits_bytes if kind is Plain else largest < 0.6 * logits_bytes


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }  # accelerate asks for them, and does not use them
    train_both(rank, folder)
    gc.collect()  # else DDP frees the group last, holding the GIL that gloo waits for
    dist.destroy_process_group()


def train_both(rank, folder):
    settings = {"entropy_coef": -0.1, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    runs = [
        train(kind, make_model(), folder, **settings) for kind in (FusedGRPOTrainer, GRPOTrainer)
    ]
    assert isinstance(runs[0][0].model_wrapped, DistributedDataParallel)
    assert_same_training(*runs, 1e-5)
    torch.save((runs[0][1], runs[0][0].seen[0][0]), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_ranks_of_ddp_train_one_model(tmp_path):
    """Two ranks with different prompts train as with TRL's own statistics."""
    spawn(worker, str(tmp_path), nprocs=2, timeout_s=300)
    (moved, ids), (others, other_ids) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not torch.equal(ids, other_ids)
    for name, x in moved.items():
        assert torch.equal(x, others[name])


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def refuse(message, tmp_path, error=ValueError, **changes):
    with pytest.raises(error, match=message):
        make_trainer(FusedGRPOTrainer, make_model(), tmp_path, **changes)


def test_refusals(tmp_path):
    refuse("cast_lm_head_to_fp32: .* leave it False", tmp_path, cast_lm_head_to_fp32=True)
    copied = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    refuse("head is a ModulesToSaveWrapper", tmp_path, error=TypeError, peft_config=copied)
    model = Doubled(make_model().config)
    with pytest.raises(TypeError, match="Doubled's logits are not its head"):
        make_trainer(FusedGRPOTrainer, model, tmp_path)


def test_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "em_kernels.trl")
    with pytest.raises(ImportError, match="needs trl >= 1.16; install em-kernels"):
        importlib.import_module("em_kernels.trl")
