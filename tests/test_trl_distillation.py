"""TRL's DistillationTrainer with our divergence, against TRL's own and full logits in fp64."""

from contextlib import nullcontext
from math import log

import pytest

pytest.importorskip("trl", reason="trl needs Python 3.11")
import torch
from datasets import Dataset
from peft import LoraConfig
from test_trl import HEADS, LORA, PROMPTS
from test_trl_losses import assert_no_less_exact
from torch.profiler import ProfilerActivity, profile
from training.tiny import make_model, make_tokenizer
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer

from em_kernels.ops import memory
from em_kernels.trl import FusedDistillationTrainer, _adapter_on_the_head

pytestmark = pytest.mark.slow  # each with transformers' Trainer, some seconds

WIDER = {"hidden_size": 48, "initializer_range": 0.2}
ON_THE_HEAD = LoraConfig(target_modules=["q_proj", "lm_head"], r=3, init_lora_weights=False)
KINDS = ("gemma2", "cohere", "granite", "phi")
CASES = {  # the student, the teacher and the trainer's settings
    **{f"beta {beta}": ({}, WIDER, {"beta": beta}) for beta in (0.0, 0.5, 1.0)},
    "temperature": ({}, WIDER, {"beta": 0.3, "temperature": 0.6}),
    "lora": ({}, {}, {"peft_config": LORA}),
    **{kind: ({"kind": kind, **HEADS[kind]}, WIDER, {"beta": 0.5}) for kind in KINDS},
    **{
        f"{kind} teaches": ({}, {"kind": kind, **HEADS[kind]}, {"beta": 1.0, "temperature": 0.8})
        for kind in KINDS
    },
}


class Plain(DistillationTrainer):
    """DistillationTrainer whose divergence comes from full logits, differentiated by autograd."""

    def _compute_loss(self, student, inputs, num_items_in_batch):
        def log_probabilities(model):
            ids, mask = (
                torch.cat((inputs[f"prompt_{name}"], inputs[f"completion_{name}"]), 1)
                for name in ("ids", "mask")
            )
            logits = model(input_ids=ids, attention_mask=mask).logits
            length = inputs["completion_ids"].shape[1]
            return (logits[:, -length - 1 : -1] / self.temperature).log_softmax(-1)

        def kl(a, b):
            return (a.exp() * (a - b)).sum(-1)

        logp = log_probabilities(student)
        with torch.no_grad():
            logq = log_probabilities(self.teacher_model)
        if self.beta in (0, 1):
            each = kl(logp, logq) if self.beta else kl(logq, logp)
        else:
            logr = torch.logaddexp(logq + log(self.beta), logp + log(1 - self.beta))
            each = self.beta * kl(logq, logr) + (1 - self.beta) * kl(logp, logr)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        count = mask.sum() if num_items_in_batch is None else num_items_in_batch
        entropy = -(logp.exp() * logp).sum(-1)
        return (mask * each).sum() / count, (mask * entropy).sum().detach(), mask.sum()


def make_trainer(kind, student, teacher, output, peft_config=None, data=None, **changes):
    student.generation_config.eos_token_id = list(range(60))  # some completions end early
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    settings |= {"max_completion_length": 12, "optim": "sgd", "learning_rate": 0.02}
    settings |= {"use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False}
    dataset, processor = data or (Dataset.from_dict({"prompt": PROMPTS}), make_tokenizer())
    return kind(
        student,
        teacher,
        DistillationConfig(str(output), **(settings | changes)),
        dataset,
        processing_class=processor,
        peft_config=peft_config,
    )


def make_inputs(given=True, tools=False, padded=True):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 267, (4, 13), generator=generator)
    inputs = {"prompt_ids": ids[:, :5], "completion_ids": ids[:, 5:]}
    padding = torch.tensor([[0], [2], [1], [3]]) * padded
    inputs["prompt_mask"] = (torch.arange(5) >= padding).long()
    inputs["completion_mask"] = (torch.arange(8) < torch.tensor([[8], [3], [6], [5]])).long()
    if tools:
        inputs["tool_mask"] = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).expand(4, -1)
    return inputs | ({"num_items_in_batch": torch.tensor(37)} if given else {})


def loss_and_gradients(kind, shapes, folder, inputs, dtype=torch.float32, **settings):
    student, teacher = (make_model(**shape, dtype=dtype) for shape in shapes)
    with torch.no_grad():
        for model, shape, scale in zip((student, teacher), shapes, (1, 1.1), strict=True):
            model.load_state_dict(make_model(**shape).state_dict())  # in fp64 others are drawn
            head = model.get_output_embeddings()
            head.weight.mul_(scale)
            if head.bias is not None:
                head.bias.copy_(scale * torch.arange(len(head.bias)).sin())
    trainer = make_trainer(kind, student, teacher, folder, **settings)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert not any(x.grad is not None for x in trainer.teacher_model.parameters())
    (entropy,) = trainer._metrics["train"]["entropy"]
    named = trainer.model.named_parameters()
    gradients = [x.grad for _, x in named if x.grad is not None]
    return [loss.detach(), torch.tensor(entropy, dtype=dtype), *gradients]


def compare(student, teacher, folder, inputs, **settings):
    given = (student, teacher), folder, inputs
    truth = loss_and_gradients(Plain, *given, dtype=torch.float64, **settings)
    ours, theirs = (
        loss_and_gradients(kind, *given, **settings)
        for kind in (FusedDistillationTrainer, DistillationTrainer)
    )
    assert_no_less_exact(ours, theirs, truth)


@pytest.mark.parametrize("case", CASES)
def test_loss_entropy_and_gradients_are_trls(case, tmp_path):
    student, teacher, settings = CASES[case]
    # In fp64 transformers' eager attention, which gemma2 needs, gives NaN for padding.
    inputs = make_inputs(padded="gemma2" not in case)
    compare(student, teacher, tmp_path, inputs, **settings)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("tools", [False, True])
def test_tokens_that_count(given, tools, tmp_path):
    compare({}, WIDER, tmp_path, make_inputs(given, tools), beta=0.5)


@pytest.mark.parametrize("given", [False, True])
def test_no_token_counts(given, tmp_path):
    inputs = make_inputs(given, tools=True)
    inputs["tool_mask"] = torch.zeros_like(inputs["completion_mask"])
    shapes = {}, WIDER
    found = loss_and_gradients(FusedDistillationTrainer, shapes, tmp_path, inputs)
    assert len(found) > 2 and not any(x.any() for x in found)


@pytest.mark.parametrize("tied", [True, False])
def test_adapter_on_the_head(tied, tmp_path):
    """TRL refuses it; the plain model's logits have it."""
    found = []
    for kind in (FusedDistillationTrainer, Plain):
        with _adapter_on_the_head(distillation_trainer) if kind is Plain else nullcontext():
            found.append(
                loss_and_gradients(
                    kind,
                    ({"tied": tied}, WIDER),
                    tmp_path,
                    make_inputs(),
                    dtype=torch.float64,
                    peft_config=ON_THE_HEAD,
                    beta=0.5,
                )
            )
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert all(x.any() for x in found[1])


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_training_is_the_same(beta, tmp_path):
    runs = []
    for kind in (FusedDistillationTrainer, DistillationTrainer):
        trainer = make_trainer(kind, make_model(), make_model(**WIDER), tmp_path, beta=beta)
        trainer.train()
        runs.append((trainer.state.log_history, [x.detach() for x in trainer.model.parameters()]))
    (logs, weights), (their_logs, their_weights) = runs
    assert [x.keys() for x in logs] == [x.keys() for x in their_logs] and len(logs) == 3
    for ours, theirs in zip(logs[:-1], their_logs, strict=False):
        for name in ("loss", "grad_norm", "entropy", "completions/mean_length"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert logs[0]["loss"] > 0.1
    torch.testing.assert_close(weights, their_weights, rtol=0, atol=1e-5)
    moved = [x - y for x, y in zip(weights, make_model().parameters(), strict=True)]
    assert all(x.abs().max() > 1e-4 for x in moved)


@pytest.mark.parametrize("kind", [FusedDistillationTrainer, Plain])
def test_no_tensor_of_the_size_of_the_logits(kind, tmp_path, monkeypatch):
    rows, length, vocabulary = 4, 60, 1 << 15
    logits_bytes = rows * length * vocabulary * 4
    monkeypatch.setattr(memory, "logits_budget", lambda *_: logits_bytes // 4)
    models = (make_model(vocab_size=vocabulary, **shape) for shape in ({}, WIDER))
    trainer = make_trainer(kind, *models, tmp_path)
    ids = torch.randint(vocabulary, (rows, length))
    inputs = {f"{part}_mask": torch.ones_like(ids) for part in ("prompt", "completion")}
    inputs |= {"prompt_ids": ids[:, :8], "completion_ids": ids}
    inputs["prompt_mask"] = inputs["prompt_mask"][:, :8]
    trainer.model.train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.compute_loss(trainer.model, inputs).backward()
    events = profiler.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert largest >= logits_bytes if kind is Plain else largest < 0.6 * logits_bytes


def test_refusals(tmp_path):
    copied = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(TypeError, match="head is a ModulesToSaveWrapper"):
        make_trainer(
            FusedDistillationTrainer, make_model(), make_model(), tmp_path, peft_config=copied
        )
    with pytest.raises(ValueError, match="^teacher_model: is None"):
        make_trainer(FusedDistillationTrainer, make_model(), None, tmp_path)
