"""A small net with all kinds of parameters, its optimizer and its updates."""

import torch
from torch import nn

from em_kernels.training.engines.offload import Bounce
from em_kernels.training.engines.optimizer import MasterAdamW

CPU = torch.device("cpu")
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


class Net(nn.Module):
    """Matrices, vectors, a scalar, a frozen parameter, and one that every other update skips."""

    def __init__(self, dtype=FP32):
        super().__init__()
        torch.manual_seed(1)
        self.words = nn.Parameter(torch.randn(40, 32, dtype=dtype))
        self.frozen = nn.Parameter(torch.randn(3, dtype=dtype), requires_grad=False)
        self.inner = nn.Linear(32, 7, dtype=dtype)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.sometimes = nn.Parameter(torch.ones(9, dtype=dtype))

    def loss(self, update, micro_batch):
        generator = torch.Generator().manual_seed(10 * update + micro_batch)
        rows = torch.randint(40, (6,), generator=generator)
        out = self.inner(self.words[rows]) * self.scale
        if update % 2:
            out = out + self.sometimes[:7]
        return (out.double().sin() ** 2).mean() * 10


def make(model, clip=1.0, bounce=False, **changes):
    options = {"device": CPU, "moments": FP32, "gradients": FP32, **ADAMW, **changes}
    made = MasterAdamW(model.named_parameters(), clip=clip, **options)
    if bounce:
        made._bounce = Bounce(CPU)
    return made


def backwards(model, update):
    for micro_batch in range(3):
        model.loss(update, micro_batch).backward()


def run(model, ours, numbers):
    """Run these updates, and return their norms."""
    norms = []
    for update in numbers:
        backwards(model, update)
        assert all(p.grad is None for p in model.parameters())
        norms.append(ours.norm())
        ours.step(norms[-1])
    return norms


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
