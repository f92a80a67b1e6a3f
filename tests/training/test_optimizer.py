"""Updates against torch.optim.AdamW after clip_grad_norm_, wherever the state is kept.

The way through the pinned buffers and their thread is forced on the CPU; the copies that a GPU
makes are in tests/gpu.
"""

import copy
import time

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from training.tiny import make_model, rounded
from training.updates import (
    ADAMW,
    BF16,
    CPU,
    FP32,
    FP64,
    Net,
    assert_same,
    backwards,
    make,
    run,
    weights,
)

from em_kernels.training.engines import offload, optimizer
from em_kernels.training.engines.offload import Bounce
from em_kernels.training.engines.optimizer import MasterAdamW

NO_CLIP = 1e9


def run_torch(model, numbers, clip, norms=None, fused=True):
    """Run the updates in torch, with fp32 copies of bf16 weights; clip with these norms, or
    with torch's own.
    """
    masters = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    masters = [m.float() if m.dtype == BF16 else m for m in masters]
    reference = torch.optim.AdamW(masters, fused=fused, **ADAMW)
    found = []
    for update in numbers:
        for micro_batch in range(3):
            model.loss(update, micro_batch).backward()
            trained = [p for p in model.parameters() if p.requires_grad]
            for master, p in zip(masters, trained, strict=True):
                if p.grad is not None:
                    grad = p.grad.to(master.dtype)
                    master.grad = grad.clone() if master.grad is None else master.grad + grad
                p.grad = None
        if norms is None:
            found.append(nn.utils.clip_grad_norm_(masters, clip).item())
        else:
            norm = torch.tensor(norms[len(found)], dtype=FP64)
            nn.utils.clip_grads_with_norm_(masters, clip, norm)
            found.append(norm.item())
        reference.step()
        reference.zero_grad()
        for master, p in zip(masters, trained, strict=True):
            p.data.copy_(rounded(master) if p.dtype == BF16 else master)
    return found


@pytest.fixture
def small(monkeypatch):
    """Make slabs end inside parameters, and three rows fill a buffer."""
    monkeypatch.setattr(optimizer, "SLAB", 45)
    monkeypatch.setattr(offload, "BUFFER_BYTES", 3 * 32 * 4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16])
@pytest.mark.parametrize("clip", [0.5, NO_CLIP])
def test_equals_torch(clip, dtype, fused):
    model = Net(dtype)
    reference, start = copy.deepcopy(model), weights(model)
    ours = make(model, clip)
    norms = run(model, ours, range(6))
    expected = run_torch(reference, range(6), clip, norms, fused)
    assert min(expected) > 0.5
    assert torch.equal(model.frozen, start["frozen"])
    assert not torch.equal(model.words, start["words"])
    if fused:
        assert_same(weights(model), weights(reference))
    elif dtype != BF16:
        epsilon = torch.finfo(dtype).eps
        for name, tensor in weights(reference).items():
            assert (weights(model)[name] - tensor).norm() <= 20 * epsilon * tensor.norm()
    state = ours.state()
    assert state["step.words"] == 6 and state["step.sometimes"] == 3
    assert "master.frozen" not in state


def test_clips_as_torch():
    model = Net()
    reference = copy.deepcopy(model)
    norms = run(model, make(model, 0.5), range(6))
    assert norms == pytest.approx(run_torch(reference, range(6), 0.5), rel=1e-6)
    for name, tensor in weights(reference).items():
        assert_close(weights(model)[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_tied_weights(dtype):
    """Embedding and head share one gradient, complete after both."""
    model = make_model(dtype=dtype, tied=True)

    def loss(update, micro_batch):
        generator = torch.Generator().manual_seed(10 * update + micro_batch)
        ids = torch.randint(267, (2, 9), generator=generator)
        return model(ids, labels=ids).loss

    model.loss = loss
    start = weights(model)
    ours = make(model, 0.5)
    norms = run(model, ours, range(3))
    found = weights(model)
    assert found.keys() == start.keys() and "lm_head.weight" not in found
    model.load_state_dict(start, strict=False)
    ours.close()
    run_torch(model, range(3), 0.5, norms)
    assert_same(found, weights(model))


@pytest.mark.parametrize("slabs", ["large", "small"])
@pytest.mark.parametrize("moments, gradients", [(FP32, FP32), (BF16, BF16)])
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16])
@pytest.mark.parametrize("where", ["files", "bounce"])
def test_where_the_state_lies(where, dtype, moments, gradients, slabs, tmp_path, request):
    if slabs == "small":
        request.getfixturevalue("small")
    model, options = Net(dtype), {"moments": moments, "gradients": gradients}
    other = copy.deepcopy(model)
    norms = run(model, make(model, 0.5, **options), range(4))
    folder = tmp_path / "new" if where == "files" else None
    ours = make(other, 0.5, where == "bounce", folder=folder, **options)
    assert run(other, ours, range(4)) == norms
    assert_same(weights(model), weights(other))
    ours.close()


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16])
def test_slabs_end_inside_parameters(dtype, small):
    """SIMD vectors end elsewhere than in torch's own update, and round otherwise."""
    model = Net(dtype)
    reference = copy.deepcopy(model)
    norms = run(model, make(model, 0.5), range(4))
    expected = run_torch(reference, range(4), 0.5, None if dtype == FP64 else norms)
    assert norms == pytest.approx(expected, rel=1e-12)
    epsilon = torch.finfo(dtype).eps
    for name, tensor in weights(reference).items():
        assert_close(weights(model)[name], tensor, rtol=20 * epsilon, atol=2 * epsilon)


def test_bf16_moments():
    """bf16 moments change ten updates by 0.2% here, with bf16 gradients by 0.4%."""
    changes = []
    for moments, gradients in [(FP32, FP32), (BF16, FP32), (BF16, BF16)]:
        model = make_model()
        start = weights(model)
        ours = make(model, moments=moments, gradients=gradients, lr=2e-5, betas=(0.9, 0.999))
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            for _ in range(2):
                logp = model(torch.randint(267, (4, 32), generator=generator)).logits.log_softmax(
                    -1
                )
                (-(logp.exp() * logp).sum(-1).mean() / 2).backward()
            ours.step(ours.norm())
        changes.append(torch.cat([(p - start[n]).flatten() for n, p in weights(model).items()]))
    exact, moments, both = changes
    assert 1e-4 < (moments - exact).norm() / exact.norm() < 5e-3
    assert 1e-4 < (both - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("gradients", [FP32, BF16])
def test_norm(gradients):
    """The norm of a long parameter, of which torch's own has four correct digits."""
    parameter = nn.Parameter(torch.zeros(2**22 + 77))
    model = nn.ParameterDict({"large": parameter, "none": nn.Parameter(torch.ones(5))})
    ours = make(model, gradients=gradients)
    values = torch.randn(parameter.shape) * 1e-4
    ours.add(parameter, values)
    expected = sum(slab.double().square().sum() for slab in values.to(gradients).split(2**20))
    assert ours.norm() == pytest.approx(expected.sqrt().item(), rel=3e-8)
    ours.clear()
    assert ours.norm() == 0


@pytest.mark.parametrize("bounce", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("order", ["dense first", "words first"])
def test_words(order, dtype, bounce, small):
    """Gradients of some rows, as the head's of some vocabulary entries, and whole ones add up."""
    parameter = nn.Parameter(torch.randn(40, 32, dtype=dtype))
    bias = nn.Parameter(torch.randn(40, dtype=dtype))
    ours = make(nn.ParameterDict({"words": parameter, "bias": bias}), bounce=bounce)
    dense = torch.randn(32, 40, dtype=dtype).t()  # not contiguous
    index = torch.randperm(40)[:17]
    expected, expected_bias = torch.zeros(40, 32), torch.zeros(40)
    for update in range(2):  # the second must not see the first one's gradient
        expected.zero_(), expected_bias.zero_()
        if order == "dense first":
            ours.add(parameter, dense)
            ours.add(bias, torch.ones(1).expand(40))
            expected_bias += 1
        rows = torch.empty(20, 32)
        for words in (slice(3, 20), slice(30, 40), slice(7, 7), index, index[:0]):
            part = rows[: len(torch.arange(40)[words])].normal_()
            ours.add(parameter, part.to(dtype) if update else part, words)
            expected[words] += part.to(dtype) if update else part
            part.fill_(torch.nan)  # the caller may overwrite it
        one = torch.randn(17)
        ours.add(bias, one, index)
        expected_bias[index] += one
        if order == "words first":
            ours.add(parameter, dense)
        expected += dense
        norm = ours.norm()
        total = torch.cat([expected.flatten(), expected_bias]).double().norm()
        assert norm == pytest.approx(total.item(), rel=1e-6)
        slots = ours._slots
        assert_close(slots[parameter].gradient.view(40, 32), expected, rtol=1e-6, atol=1e-6)
        assert_close(slots[bias].gradient, expected_bias, rtol=1e-6, atol=1e-6)
        ours.clear()
    ours.close()


def test_buffers_wait_for_the_thread(small):
    bounce, source, found = Bounce(CPU), torch.arange(1000.0), []

    def put(part, values):
        time.sleep(0.01)
        found.append((part, values.clone()))

    bounce.fetch(source, put, reused=False)
    bounce.wait()
    assert [part.start for part, _ in found] == list(range(0, 1000, 96))
    assert torch.equal(torch.cat([values for _, values in found]), source)
    bounce.close()


@pytest.mark.parametrize("use", ["norm", "step", "clear"])
def test_everything_waits_for_the_thread(use):
    model = Net()
    other = copy.deepcopy(model)
    ours, same = make(model, bounce=True), make(other)
    for update in range(2):
        ours._bounce.thread.submit(time.sleep, 0.05)
        backwards(model, update)
        backwards(other, update)
        if use == "clear":
            ours.clear(), same.clear()
            ours.add(model.words, torch.ones(1, 32), slice(3, 4))
            same.add(other.words, torch.ones(1, 32), slice(3, 4))
        elif use == "norm":
            assert ours.norm() == same.norm()
        ours.step(0.1), same.step(0.1)
    assert_same(weights(model), weights(other))
    ours.close()


@pytest.mark.parametrize("bounce", [False, True])
def test_wrong_gradient(bounce):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3, sparse=True)

    model = Sparse()
    ours = make(model, bounce=bounce)
    with pytest.raises(TypeError, match="table.weight: .*sparse"):
        model.table(torch.tensor([1])).sum().backward()
    for shape, words in [((1,), None), ((4, 3), None), ((1, 3), slice(0, 2))]:
        with pytest.raises(RuntimeError):
            ours.add(model.table.weight, torch.ones(shape), words)
    ours.close()


def test_clear():
    model = Net()
    other = copy.deepcopy(model)
    ours, same = make(model), make(other)
    backwards(model, 1)
    ours.clear()
    assert run(model, ours, [0, 2]) == run(other, same, [0, 2])
    assert_same(weights(model), weights(other))
    ours.step(ours.norm())  # without any gradient
    assert_same(ours.state(), same.state())


def test_close_leaves_gradients_alone():
    model = Net()
    make(model).close()
    backwards(model, 0)
    assert model.words.grad is not None


def test_names_and_one_parameter_twice():
    model = Net()
    pairs = [("first", model.words), ("second", model.words), ("frozen", model.frozen)]
    ours = MasterAdamW(pairs, clip=1, device=CPU, moments=FP32, gradients=FP32, **ADAMW)
    kinds = ["master", "exp_avg", "exp_avg_sq", "step"]
    assert list(ours.state()) == [f"{kind}.first" for kind in kinds]
    model.loss(0, 0).backward()
    assert model.words.grad is None and model.scale.grad is not None
