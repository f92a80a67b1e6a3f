"""A vocabulary split over real processes (gloo) gives the results of a whole one."""

import pytest
import torch
import torch.distributed as dist
from spawned import spawn
from torch.testing import assert_close
from truth import draw

from em_kernels import (
    TokenStats,
    fused_divergence,
    fused_entropy_loss,
    fused_token_loss,
    fused_token_stats,
    gradient_report,
)
from em_kernels.ops import memory

N, D, V = 9, 8, 61
# Ranks, and how many vocabulary entries each holds.
SPLITS = {"three": ([0, 1, 2], (20, 2, 39)), "two": ([1, 2], (60, 1))}
MASK = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 1.0, 1.0, 3.0])
TAU = torch.linspace(0.4, 1.6, N)
UPSTREAM = torch.linspace(-1.0, 1.0, 5 * N).reshape(5, N)
TOP = TokenStats._fields[6:]
CALLS = [
    "mean",
    "none",
    "token_stats",
    "token_loss",
    "frozen head",
    "masked words",
    "small chunks",
    "unequal memory",
    "divergence",
    "divergence of each",
    "several targets",
    "top k",
    "several targets in small chunks",
    "a loss of the top k",
]
SEVERAL = torch.arange(3 * N).view(N, 3) * 7 % V  # in all shards
SEVERAL[2:4, 1], SEVERAL[5] = -100, 40


def call(name, hidden, weight, bias, targets, group):
    """Return outputs, and gradients of hidden, weight and bias, for one way to use the library."""
    head = {"bias": bias, "process_group": group, "temperature": TAU, "softcap": 20.0}
    if name.endswith("small chunks"):
        head["chunk_bytes"] = 2 * V * 4
    if name in ("mean", "none"):
        outputs = (fused_entropy_loss(hidden, weight, mask=MASK, reduction=name, **head),)
        total = (outputs[0] * UPSTREAM[0]).sum()
    elif name == "token_loss":
        loss_fn = lambda s, i: (s.logprob.exp() + s.entropy) * UPSTREAM[0, i]  # noqa: E731
        names = ("entropy", "logprob", "argmax")
        total, stats = fused_token_loss(
            hidden, weight, targets, loss_fn, mask=MASK, return_stats=names, **head
        )
        outputs = (total, *(getattr(stats, name) for name in names))
    elif "divergence" in name:
        ref = hidden.detach().flip(1), 0.9 * weight.detach() + 0.1
        reduction = "none" if "each" in name else "mean"
        head |= {"ref_bias": 0.5 * bias.detach(), "beta": 0.3, "reduction": reduction, "mask": MASK}
        outputs = (fused_divergence(hidden, weight, *ref, **head),)
        total = (outputs[0] * UPSTREAM[0]).sum()
    elif name == "several targets in small chunks":
        loss_fn = lambda s, i: s.logprob.exp().sum(1) + UPSTREAM[0, i] * s.entropy  # noqa: E731
        total = fused_token_loss(hidden, weight, SEVERAL, loss_fn, mask=MASK, **head)
        outputs = (total,)
    elif name == "a loss of the top k":
        loss_fn = lambda s, i: (s.top_logprobs * UPSTREAM.T[i]).sum(1) + s.logprob.exp()  # noqa: E731
        total, stats = fused_token_loss(
            hidden, weight, targets, loss_fn, mask=MASK, top_k=5, return_stats=TOP, **head
        )
        outputs = (total, *stats[6:])
    elif name in ("several targets", "top k"):
        chosen = {"targets": SEVERAL} if name == "several targets" else {"targets": targets}
        # More than two ranks have, and ties across shards.
        stats = fused_token_stats(hidden, weight, top_k=5, mask=MASK, **chosen, **head)
        outputs = (stats.entropy, stats.logprob, *stats[6:])
        total = (UPSTREAM[0] * stats.entropy).sum() + stats.logprob.exp().sum()
        total = total + (UPSTREAM.T * stats.top_logprobs).sum()
    elif name == "frozen head":
        weight, bias = weight.detach(), bias.detach()
        head["bias"] = bias
        stats = fused_token_stats(hidden, weight, stats=["entropy"], mask=MASK, **head)
        (dh,) = torch.autograd.grad(stats.entropy, hidden, UPSTREAM[0])
        return (stats.entropy.detach(),), (dh, torch.zeros_like(weight), torch.zeros_like(bias))
    else:
        stats = fused_token_stats(hidden, weight, targets, stats=TokenStats._fields, **head)
        loss = fused_entropy_loss(hidden, weight, **head)
        kept = [s for s in stats[:5] if s.isfinite().all()]
        total = loss + sum((g * s).sum() for g, s in zip(UPSTREAM, kept, strict=False))
        outputs = (loss, *stats[:6])
    return outputs, torch.autograd.grad(total, (hidden, weight, bias))


def sparse(hidden, weight, bias, group, tolerance=0.03):
    """Return gradients with a tolerance, and the share of this rank's entries that was kept."""
    inputs = [(4 * hidden).detach(), weight.detach(), bias.detach()]
    h, w, b = (x.requires_grad_() for x in inputs)
    loss = fused_token_loss(
        h,
        w,
        torch.arange(N) * 7 % V,
        lambda s, i: s.entropy + TAU[i] * s.logprob,
        bias=b,
        process_group=group,
        grad_tolerance=tolerance,
        chunk_bytes=4 * V * 4,
    )
    return torch.autograd.grad(loss, inputs), gradient_report(loss).active_share


def inputs_of(name):
    hidden, weight, bias, targets = draw(N, D, V)
    targets[4] = -100
    if name == "masked words":
        bias.data[:25] = -torch.inf  # the whole first shard of three
        targets.clamp_(min=25)
    if name not in ("token_stats", "several targets", "top k", "a loss of the top k"):
        return hidden, weight, bias, targets
    weight.data[-1] = weight.data[3]  # a tie across shards
    bias.data[-1] = bias.data[3] = 40.0
    return hidden, weight, bias, targets


def refused(results, function, *arguments, **settings):
    """Ranks that differ in what they ask for must all raise."""
    try:
        function(*arguments, **settings)
    except ValueError as error:
        results.setdefault("refusals", []).append(str(error))


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3
    )
    free_bytes = memory.free_bytes
    for split, (members, sizes) in SPLITS.items():
        group = dist.new_group(members)
        if rank not in members:
            continue
        place = members.index(rank)
        start = sum(sizes[:place])
        vocab_slice = slice(start, start + sizes[place])
        results = {}
        for name in CALLS:
            hidden, weight, bias, targets = inputs_of(name)
            shard = (x.detach()[vocab_slice].clone().requires_grad_() for x in (weight, bias))
            unequal = name == "unequal memory"
            memory.free_bytes = (lambda _: 8 * V * 4 * (rank + 1)) if unequal else free_bytes
            results[name] = call(name, hidden, *shard, targets, group)
        memory.free_bytes = free_bytes
        hidden, *head, _ = inputs_of("mean")
        results["sparse"] = sparse(hidden, *(x.detach()[vocab_slice].clone() for x in head), group)
        hidden, weight, *_ = inputs_of("mean")
        shard = weight[vocab_slice].detach().clone()
        for x in (hidden, shard):
            # Ranks that differ must be refused, as they would wait for each other for ever.
            x.requires_grad_(place > 0)
            refused(results, fused_entropy_loss, hidden, shard, process_group=group)
            x.requires_grad_(True)
        differ = {"process_group": group, "grad_tolerance": 0.01 * place}
        refused(results, fused_entropy_loss, hidden, shard, **differ)
        asks = {"process_group": group, "top_k": 1 + place}, {"process_group": group}
        refused(results, fused_token_stats, hidden, shard, **asks[0])
        stats = ["argmax" if place > 0 else "entropy"]
        refused(results, fused_token_stats, hidden, shard, stats=stats, **asks[1])
        targets = torch.zeros(len(hidden), 1 + place, dtype=torch.int64)
        refused(results, fused_token_stats, hidden, shard, targets, **asks[1])
        asks[1]["reduction"] = "sum" if place > 0 else "none"
        refused(results, fused_divergence, hidden, shard, hidden, shard, **asks[1])
        torch.save(results, f"{folder}/{split}-{place}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of every rank, in files."""
    path = tmp_path_factory.mktemp("ranks")
    spawn(worker, str(path), nprocs=3)
    return path


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("split", SPLITS)
def test_shards_equal_the_whole(split, name, folder):
    outputs, (dh, dw, db) = call(name, *inputs_of(name), None)
    found = [torch.load(folder / f"{split}-{i}.pt")[name] for i in range(len(SPLITS[split][0]))]
    for ours, (our_dh, _, _) in found:
        assert_close(ours, outputs, rtol=2e-6, atol=2e-6)
        assert_close(our_dh, dh, rtol=1e-5, atol=2e-6)
        assert all(torch.equal(a, b) for a, b in zip(ours, found[0][0], strict=True))
    assert_close(torch.cat([gradients[1] for _, gradients in found]), dw, rtol=1e-5, atol=2e-6)
    assert_close(torch.cat([gradients[2] for _, gradients in found]), db, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("split", SPLITS)
def test_sparse_gradients_are_each_shards_own(split, folder):
    (dh, *whole), _ = sparse(*inputs_of("mean")[:3], None, tolerance=0.0)
    found = [torch.load(folder / f"{split}-{i}.pt")["sparse"] for i in range(len(SPLITS[split][0]))]
    assert min(share for _, share in found) < 0.7
    assert all(torch.equal(gradients[0], found[0][0][0]) for gradients, _ in found)
    assert 0 < (found[0][0][0] - dh).norm() <= 0.09 * dh.norm()
    for i, true in enumerate(whole, 1):
        ours = torch.cat([gradients[i] for gradients, _ in found])
        assert 0 < (ours - true).norm() <= 0.06 * true.norm()


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_that_differ_are_refused_on_every_rank(split, folder):
    for i in range(len(SPLITS[split][0])):
        refusals = torch.load(folder / f"{split}-{i}.pt")["refusals"]
        line = (
            "process_group: its ranks differ in what they ask for, or in requires_grad of hidden "
            "or of the head; give all ranks the same"
        )
        assert refusals == [line] * 7
