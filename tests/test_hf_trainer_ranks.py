"""EntropyTrainer and entropy_loss on two processes, each with half of the batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from other_sums import assert_as_near, other_sums
from test_hf_trainer import TAU, arguments, collate, eager, examples, gradients, train
from torch.distributed.fsdp import fully_shard
from training.tiny import make_model

from em_kernels.hf import check_head, entropy_loss, head_of
from em_kernels.hf_trainer import EntropyTrainer


def accuracy_of_five(folder, **changes):
    """Evaluate five rows one by one: of two processes one has to repeat a row."""
    rows, model = list(examples())[:5], make_model()
    ids = rows[0]["input_ids"]
    for place in range(1, len(ids)):
        ids[place] = model(ids[None, :place]).logits[0, -1].argmax()
    settings = arguments(folder, per_device_eval_batch_size=1, **changes)
    trainer = EntropyTrainer(model, settings, eval_dataset=rows, data_collator=collate)
    return trainer.evaluate()["eval_mean_token_accuracy"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of two processes, each with half of the batches."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [__file__, str(folder)]
    subprocess.run(command, env=environment, timeout=120, check=True, capture_output=True)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def worker(folder):
    rank = int(os.environ["RANK"])
    halves = {"per_device_train_batch_size": 1, "ddp_backend": "gloo"}
    results = {"ddp": train(EntropyTrainer, folder, changes=halves, temperature=TAU)}
    results["accuracy"] = accuracy_of_five(folder, ddp_backend="gloo")
    model = make_model(tied=False)
    for module in (*model.model.layers, model.lm_head, model):
        fully_shard(module)
    check_head(model, head_of(model))
    batch = collate(list(examples())[2 * rank : 2 * rank + 2])
    loss = entropy_loss(model, batch, temperature=TAU)
    loss.backward()
    full = {name: x.grad.full_tensor() for name, x in model.named_parameters()}
    results["fsdp"] = loss.detach(), full
    torch.save(results, folder / f"{rank}.pt")


@pytest.mark.slow
def test_processes_with_ddp_equal_one(ranks, tmp_path):
    losses, weights = train(EntropyTrainer, tmp_path, temperature=TAU)
    with other_sums(1):
        near, others = train(EntropyTrainer, tmp_path, temperature=TAU)
    expected = accuracy_of_five(tmp_path)
    assert expected > 0 and [rank["accuracy"] for rank in ranks] == [pytest.approx(expected)] * 2
    for found, ours in (rank["ddp"] for rank in ranks):
        assert_as_near(*(map(torch.tensor, ([found], [losses]))), [torch.tensor([near])])
        assert_as_near(ours.values(), weights.values(), [[*others.values()]])


@pytest.mark.slow
def test_sharded_model_equals_a_whole_one(ranks):
    """FSDP's ranks average the gradients of their own losses."""
    model = make_model(tied=False)
    batches = [collate(list(examples())[i : i + 2]) for i in (0, 2)]

    def whole():
        losses = [eager(model, batch) for batch in batches]
        return [x.detach() for x in losses], gradients(model, sum(losses) / 2)

    losses, expected = whole()
    with other_sums(1):
        near, others = whole()
    for i, rank in enumerate(ranks):
        assert_as_near([rank["fsdp"][0]], [losses[i]], [[near[i]]])
        assert_as_near(rank["fsdp"][1].values(), expected.values(), [[*others.values()]])


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
