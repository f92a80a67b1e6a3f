"""The optimizer with offload (pinned buffers, side stream, thread) against the same on the CPU."""

import pytest
import torch
from torch import nn

pytest.importorskip("em_kernels.training.engines.offload")  # pip install '.[train]'
from em_kernels.training.engines import offload
from em_kernels.training.engines.optimizer import MasterAdamW
from em_kernels.training.models.rounding import to_bf16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "clip": 0.5}
FP32, BF16 = torch.float32, torch.bfloat16
CPU, GPU = torch.device("cpu"), torch.device("cuda")
V, D = 3000, 1000


def parameters(device, dtype):
    torch.manual_seed(0)
    values = {"words": torch.randn(V, D), "vector": torch.randn(D)}
    return {n: nn.Parameter(v.to(device, dtype)) for n, v in values.items()}


def make(held, device, moments=FP32, **options):
    return MasterAdamW(
        held.items(), device=device, moments=moments, gradients=moments, **ADAMW, **options
    )


def busy():
    torch.cuda._sleep(50_000_000)  # a copy that does not wait would read too early


@pytest.mark.parametrize("moments", [FP32, BF16])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("files", [False, True])
def test_offload_equals_the_cpu(files, dtype, moments, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "BUFFER_BYTES", 16 << 20)  # at most a slab in fp64
    on_cpu, on_gpu = parameters(CPU, dtype), parameters(GPU, dtype)
    reference = make(on_cpu, CPU, moments)
    ours = make(on_gpu, CPU, moments, folder=tmp_path if files else None)
    index = torch.randperm(V)[: V // 2]
    buffer = torch.empty(V // 2, D, device=GPU)
    for _ in range(3):
        for _ in range(2):
            dense = {n: torch.randn(p.shape).to(dtype) for n, p in on_cpu.items()}
            rows = torch.randn(V // 2, D)
            there = {n: g.to(GPU) for n, g in dense.items()}
            late, wanted = index.to(GPU), rows.to(GPU)
            torch.cuda.synchronize()
            busy()
            buffer.copy_(wanted)
            ours.add(on_gpu["words"], buffer, slice(7, 7 + V // 2))
            buffer.fill_(torch.nan)  # add() must have copied it
            buffer.copy_(wanted)
            ours.add(on_gpu["words"], buffer, late)
            buffer.fill_(torch.nan)
            for name in there:
                busy()
                gradient = there[name] * 2
                ours.add(on_gpu[name], gradient)
                del gradient
                torch.full_like(there[name], torch.nan)  # takes its memory if add() let it go
            reference.add(on_cpu["words"], rows, slice(7, 7 + V // 2))
            reference.add(on_cpu["words"], rows, index)
            for name, gradient in dense.items():
                reference.add(on_cpu[name], gradient * 2)
        norm = ours.norm()
        assert norm == reference.norm()
        ours.step(norm), reference.step(norm)
        for name, p in on_gpu.items():
            assert torch.equal(p.detach().cpu(), on_cpu[name]), name
    ours.close()


@pytest.mark.parametrize("where", [GPU, CPU])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_backward(dtype, where):
    """Updates from a backward on the GPU are AdamW's, with the state there or on the host."""
    held = parameters(GPU, dtype)
    masters = [nn.Parameter(p.detach().float()) for p in held.values()]
    reference = torch.optim.AdamW(
        masters, fused=True, **{k: ADAMW[k] for k in ADAMW if k != "clip"}
    )
    ours = make(held, where)
    twin = parameters(GPU, dtype)
    for _ in range(3):
        for _ in range(2):
            x = torch.randn(64, D, device=GPU, dtype=dtype)
            for model in (held, twin):
                (
                    ((x * model["vector"]) @ model["words"].t()).float().sin().square().sum()
                ).backward()
            for master, p in zip(masters, twin.values(), strict=True):
                grad, p.grad = p.grad.float(), None
                master.grad = grad if master.grad is None else master.grad + grad
        norm = ours.norm()
        total = torch.cat([m.grad.flatten() for m in masters]).double().norm()
        assert norm == pytest.approx(total.item(), rel=1e-6)
        nn.utils.clip_grads_with_norm_(masters, ADAMW["clip"], torch.tensor(norm, device=GPU))
        ours.step(norm)
        reference.step()
        reference.zero_grad()
        for master, p in zip(masters, twin.values(), strict=True):
            flat = master.detach().view(-1)
            p.data.view(-1).copy_(to_bf16(flat) if dtype == BF16 else flat)
            assert p.grad is None
        for name, p in held.items():
            torch.testing.assert_close(
                p, twin[name], rtol=1e-2 if dtype == BF16 else 1e-5, atol=1e-6
            )
    ours.close()
