"""The entropy of a batch, and transformers' Trainer with it, against logits built in full."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from other_sums import assert_as_near, other_sums
from peft import LoraConfig, get_peft_model
from test_hf import Scaled
from torch import nn
from torch.testing import assert_close
from training.tiny import make_model
from transformers import Trainer, TrainingArguments

from em_kernels.hf import entropy_loss, head_reads
from em_kernels.hf_trainer import EntropyTrainer

TAU = 0.5
LENGTHS = (3, 9, 5, 7, 9, 2, 8, 4, 6, 9, 3, 5)  # one per example; an update has 4 examples
ARCHITECTURES = {
    "llama": {},
    "phi": {"tied": False},  # a head with a bias
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 2.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def examples():
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        ids = torch.randint(3, 267, (length,), generator=generator)
        yield {"input_ids": ids, "prompt": torch.arange(length) < length // 3}


def collate(rows, side="right", labels=True):
    """Collate as transformers does: padded, with labels of -100 at prompt and padding."""
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        empty = 9 - len(row["input_ids"])
        pad = (0, empty) if side == "right" else (empty, 0)
        ids, mask = row["input_ids"], torch.ones_like(row["input_ids"])
        values = (ids, mask, ids.masked_fill(row["prompt"], -100))
        for name, x, fill in zip(batch, values, (2, 0, -100), strict=True):
            batch[name].append(nn.functional.pad(x, pad, value=fill))
    batch = {name: torch.stack(x) for name, x in batch.items()}
    return batch if labels else {name: batch[name] for name in ("input_ids", "attention_mask")}


def eager(model, batch, divisor=None):
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / TAU
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    mask = batch["attention_mask"]
    counts = (batch.get("labels", batch["input_ids"])[:, 1:] != -100) & (mask[:, 1:] == 1)
    counts &= mask[:, :-1] == 1
    return entropy[counts].sum() / (counts.sum() if divisor is None else divisor)


class EagerTrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return eager(model, inputs, num_items_in_batch)


def arguments(folder, **changes):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    settings |= {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    settings |= {"max_grad_norm": 0.0, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    settings |= {"remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**settings, **changes})


def train(kind, folder, model=None, data_collator=collate, changes=None, **settings):
    """Return the losses of the updates, and the weights after them."""
    trainer = kind(
        make_model() if model is None else model,
        arguments(folder, **(changes or {})),
        train_dataset=list(examples()),
        data_collator=data_collator,
        **settings,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: x.detach() for name, x in trainer.model.named_parameters()}


def gradients(model, loss):
    named = {name: x for name, x in model.named_parameters() if x.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    "kind, side",
    [*((kind, "right") for kind in ARCHITECTURES), ("llama", "left"), ("gpt2", "left")],
)
def test_loss_and_gradients_are_those_of_the_logits(kind, side, labels):
    model = make_model(kind, **ARCHITECTURES[kind])
    exact = copy.deepcopy(model).double()
    batch = collate(list(examples())[:4], side, labels)
    truth, plain = eager(exact, batch), eager(model, batch)
    ours = entropy_loss(model, batch, temperature=TAU)
    assert abs(ours - truth) <= 2 * abs(plain - truth) + 1e-6
    true_gradients = gradients(exact, truth)
    plain_gradients, our_gradients = gradients(model, plain), gradients(model, ours)
    for name, true in true_gradients.items():
        error, eager_error = (
            (x[name].double() - true).norm() for x in (our_gradients, plain_gradients)
        )
        assert error <= 2 * eager_error + 1e-6 * true.norm(), name


def scored(batch):
    """Return (B, T) whether a place scores the next token, and that token's label."""
    mask = batch["attention_mask"] == 1
    following = batch.get("labels", batch["input_ids"]).roll(-1, 1)
    counts = mask & mask.roll(-1, 1) & (following != -100)
    counts[:, -1] = False
    return counts, following


def accuracy(model, batch):
    counts, following = scored(batch)
    with torch.no_grad():
        found = model(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1)
    return ((found == following) & counts).sum().item() / counts.sum().item()


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("divisor", [None, 40])
def test_statistics_of_the_same_pass(divisor, labels):
    model, batch = make_model(), collate(list(examples())[:4], labels=labels)
    settings = {"temperature": TAU, "num_items_in_batch": divisor}
    alone = entropy_loss(model, batch, **settings)
    names = ("argmax", "logprob", "entropy")
    loss, stats = entropy_loss(model, batch, return_stats=names, **settings)
    assert_close(loss, alone)
    assert_close(gradients(model, loss), gradients(model, alone))
    counts, following = scored(batch)
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.detach()
    log_p = (logits / TAU).log_softmax(-1)
    found = log_p.gather(-1, following.clamp(min=0)[..., None])[..., 0]
    entropy = torch.distributions.Categorical(logits=log_p).entropy()
    for name, truth in (("logprob", found), ("entropy", entropy)):
        assert_close(getattr(stats, name), truth.masked_fill(~counts, 0))
    assert torch.equal(stats.argmax, logits.argmax(-1).masked_fill(~counts, 0))
    assert stats.logsumexp is None
    if labels:  # any numbers mark what counts
        marked = {**batch, "labels": batch["labels"].masked_fill(counts.roll(1, 1), 10**6)}
        _, others = entropy_loss(model, marked, return_stats=("argmax",), **settings)
        assert torch.equal(others.argmax, stats.argmax)


@pytest.mark.parametrize("labels", [True, False])
def test_token_accuracy(labels, tmp_path):
    """Of all updates since the last log, and of an evaluation amid them."""
    model, everything = make_model(), list(examples())
    for row in everything[::2]:  # the model's own words, of which it is sure
        ids = row["input_ids"]
        for place in range(1, len(ids)):
            ids[place] = model(ids[None, :place]).logits[0, -1].argmax()
    changes = {"learning_rate": 0.0, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    changes["per_device_eval_batch_size"] = 2
    trainer = EntropyTrainer(
        model,
        arguments(tmp_path, **changes),
        train_dataset=everything,
        eval_dataset=everything[:5],
        data_collator=lambda rows: collate(rows, labels=labels),
    )
    trainer.train()
    found = {name: x for entry in trainer.state.log_history for name, x in entry.items()}
    expected = [
        accuracy(model, collate(rows, labels=labels)) for rows in (everything, everything[:5])
    ]
    assert 0 < expected[0] != expected[1]
    assert found["mean_token_accuracy"] == pytest.approx(expected[0])
    assert found["eval_mean_token_accuracy"] == pytest.approx(expected[1])
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda batch: trainer.evaluated.sum() and stop() or prepare(batch)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.evaluate()  # some batches have been counted
    trainer._prepare_inputs = prepare
    metrics = trainer.evaluate(metric_key_prefix="held_out")
    assert metrics["held_out_mean_token_accuracy"] == pytest.approx(expected[1])


def test_packed_rows_count_by_their_labels():
    """position_ids reach the model."""
    model = make_model()
    batch = {"input_ids": torch.arange(3, 11)[None], "labels": torch.arange(3, 11)[None].clone()}
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    batch["labels"][0, 5] = -100
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model(
        **inputs, use_cache=False
    ).logits  # a cache would let the parts of a row see each other
    entropy = torch.distributions.Categorical(logits=logits[0]).entropy()
    assert_close(entropy_loss(model, batch), entropy[[0, 1, 2, 3, 5, 6]].mean())


@pytest.mark.parametrize("labels", [True, False])
def test_first_tokens_of_packed_documents_do_not_count(labels):
    """A document begins where position_ids restart; no label need say so."""
    model, documents = make_model(), [row["input_ids"] for row in examples()][:4]
    rows = [{"input_ids": x[None], "attention_mask": torch.ones_like(x)[None]} for x in documents]
    expected = sum(eager(model, row, 1) for row in rows) / sum(len(x) - 1 for x in documents)
    batch = {"input_ids": torch.cat(documents)[None]}
    batch["position_ids"] = torch.cat([torch.arange(len(x)) for x in documents])[None]
    if labels:
        batch["labels"] = batch["input_ids"]
    assert_close(entropy_loss(model, batch, temperature=TAU), expected)


def test_batch_in_which_nothing_counts():
    model = make_model()
    batch = collate(list(examples())[:2])
    batch["labels"].fill_(-100)
    for divisor in (None, 0, torch.tensor(0)):
        loss = entropy_loss(model, batch, num_items_in_batch=divisor)
        assert loss == 0
        assert all((x == 0).all() for x in gradients(model, loss).values())


def test_lora_model():
    torch.manual_seed(0)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_model(), lora).eval()
    batch = collate(list(examples())[:4])
    with model.disable_adapter():
        assert abs(eager(model, batch) - eager(model.base_model.model, batch)) < 1e-6
        bare = eager(model, batch)
    plain, ours = eager(model, batch), entropy_loss(model, batch, temperature=TAU)
    assert abs(bare - plain) > 0.01
    expected, found = gradients(model, plain), gradients(model, ours)
    with other_sums(1):
        near = eager(model, batch)
        others = gradients(model, near)
    assert_as_near([ours.detach()], [plain.detach()], [[near.detach()]])
    assert_as_near(found.values(), expected.values(), [[*others.values()]])
    assert any("lora" in name for name in found)


@pytest.mark.parametrize("labels", [True, False])
def test_accumulated_updates_are_those_of_the_logits(labels, tmp_path):
    """An update's batches are weighted by their tokens; without labels, all tokens count."""

    def collator(rows):
        return collate(rows, labels=labels)

    class Counting(EagerTrainer):
        def _get_num_items_in_batch(self, batches, device):
            return sum((b["attention_mask"].sum(1) - 1).sum() for b in batches)

    kind = EagerTrainer if labels else Counting
    expected, weights = train(kind, tmp_path, None, collator)
    losses, ours = train(EntropyTrainer, tmp_path, None, collator, temperature=TAU)
    with other_sums(1):
        near, others = train(kind, tmp_path, None, collator)
    assert_as_near(*(map(torch.tensor, ([losses], [expected]))), [torch.tensor([near])])
    assert_as_near(ours.values(), weights.values(), [[*others.values()]])
    start = make_model().model.embed_tokens.weight
    assert (ours["model.embed_tokens.weight"] - start).abs().max() > 0.01  # the weights did move


def test_mixed_precision_and_recomputation(tmp_path):
    """The loss keeps Trainer's autocast, although the forward that it wraps is replaced."""
    model, seen = make_model(), []
    model.model.layers[0].mlp.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    changes = {"bf16": True, "gradient_checkpointing": True}
    expected, _ = train(EagerTrainer, tmp_path, make_model(), changes=changes)
    losses, _ = train(EntropyTrainer, tmp_path, model, changes=changes, temperature=TAU)
    assert set(seen) == {torch.bfloat16}
    assert losses == pytest.approx(expected, rel=0.01)


def test_evaluation(tmp_path):
    trainer = EntropyTrainer(
        make_model(),
        arguments(tmp_path, per_device_eval_batch_size=12),
        eval_dataset=list(examples()),
        data_collator=lambda rows: collate(rows, labels=False),
        temperature=TAU,
    )
    expected = eager(make_model(), collate(list(examples()), labels=False)).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_compiled_model():
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    for start in (0, 4):
        batch = collate(list(examples())[start : start + 4])
        assert_close(entropy_loss(compiled, batch, temperature=TAU), eager(model, batch))
        assert_close(eager(compiled, batch), eager(model, batch))
        loss, stats = entropy_loss(compiled, batch, temperature=TAU, return_stats=("argmax",))
        assert_close(loss, eager(model, batch))
        counts, _ = scored(batch)
        assert (stats.argmax[~counts] == 0).all() and stats.argmax.shape == counts.shape


def test_forwards_are_put_back():
    model = make_model()
    model.forward = forward = model.forward  # accelerate's mixed precision sets it on the instance
    with pytest.raises(RuntimeError, match="stopped"), head_reads(model, lambda *_: stop()):
        model(input_ids=torch.ones(1, 2, dtype=torch.int64))
    assert model.forward is forward
    assert "forward" not in vars(model.lm_head)


def test_threads_take_turns():
    model, batch = make_model(), collate(list(examples())[:4])
    fewer = batch["labels"].masked_fill(torch.arange(batch["labels"].shape[1]) % 2 == 0, -100)
    batches = [batch, {**batch, "labels": fewer}]
    expected = [eager(model, batch).item() for batch in batches]
    assert expected[0] != expected[1]

    def loss_of(turn):
        return entropy_loss(model, batches[turn % 2], temperature=TAU).item()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(loss_of, range(200))) == pytest.approx(expected * 100, rel=1e-5)
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)


def stop():
    raise RuntimeError("stopped")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pixel_values": torch.ones(2, 2)}, "batch: has pixel_values; expected input_ids, and"),
        ({"input_ids": None}, "batch: has no input_ids; expected input_ids, and"),
        ({"labels": torch.ones(2, 4)}, r"batch: labels is \(2, 4\); expected \(B, T\), as"),
        ({"input_ids": torch.ones(9).long()}, r"batch: \w+ is \(.*\); expected \(B, T\), as"),
        ({"input_ids": [[1, 2]]}, "batch: input_ids is a list; .* return_tensors"),
    ],
)
def test_bad_batches(change, message):
    batch = {**collate(list(examples())[:2]), **change}
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        entropy_loss(make_model(), {k: x for k, x in batch.items() if x is not None})


def test_bad_models():
    batch = collate(list(examples())[:2])
    with pytest.raises(TypeError, match="^model: expected a transformers model, got str"):
        entropy_loss("model", batch)
    with pytest.raises(TypeError, match="^model: there is no transformers model in this Linear"):
        entropy_loss(nn.Linear(2, 2), batch)
    with pytest.raises(TypeError, match=r"^model: is in nn\.DataParallel.* one process a GPU"):
        entropy_loss(nn.DataParallel(make_model()), batch)
    with pytest.raises(TypeError, match="^model: its head is a NoneType, not a plain nn.Linear"):
        entropy_loss(make_model().model, batch)


def test_bad_settings_of_the_trainer(tmp_path):
    with pytest.raises(TypeError, match="^model: Scaled's logits are not its head applied"):
        train(EntropyTrainer, tmp_path, Scaled(make_model().config))
    with pytest.raises(ValueError, match=r"^temperature: -1 is not > 0"):
        EntropyTrainer(make_model(), arguments(tmp_path), temperature=-1)
    with pytest.raises(ValueError, match=r"^grad_tolerance: 3 is not in"):
        EntropyTrainer(make_model(), arguments(tmp_path), grad_tolerance=3)
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"^{name}: the loss is the entropy"):
            EntropyTrainer(make_model(), arguments(tmp_path), **{name: print})
    with pytest.raises(ValueError, match="^label_smoothing_factor: the loss is the entropy"):
        EntropyTrainer(make_model(), arguments(tmp_path, label_smoothing_factor=0.1))
