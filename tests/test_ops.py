"""The operators as torch sees them: schemas, compile, autocast, second derivatives."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from truth import FLOAT_STATS, draw, leaves

from em_kernels import entropy_from_logits, fused_entropy_loss, fused_token_stats
from em_kernels.ops import torch_library, torch_library_divergence

N, D, V = 6, 4, 13
TAU = torch.linspace(0.5, 1.5, N)
TRANSFORM = [0.7, 5.0, 1.0]


def arguments(needs, dtype, optional):
    """Return hidden, weight, bias, targets, mask, temperatures; matrices are column-major."""
    *inputs, targets = draw(N, D, V, dtype=dtype)
    hidden, weight, bias = (
        x.detach().t().contiguous().t().requires_grad_(need)
        for x, need in zip(inputs, needs, strict=True)
    )
    if not optional:
        return hidden, weight, None, None, None, None
    return hidden, weight, bias, targets, torch.tensor([1, 0, 2, 1, 0, 1]), TAU


NEEDS = [[True, True, True], [True, False, False], [False, True, False], [False, False, True]]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize(
    "optional, dtype",
    [
        *((True, dtype) for dtype in DTYPES),
        (False, torch.float32),
        pytest.param(False, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_opcheck(optional, needs, dtype):
    needs = [*needs[:2], needs[2] and optional]
    h, w, b, targets, mask, tau = arguments(needs, dtype, optional)
    settings = (targets, mask, tau, TRANSFORM, None, None)
    for tolerance in (0.0, 0.1):
        torch.library.opcheck(
            torch_library.entropy_loss_op, (h, w, b, *settings, tolerance, True, needs)
        )
    for single_stat_index in (-1, 0) if needs == [True, False, False] else (-1,):
        torch.library.opcheck(
            torch_library.token_stats_op,
            (h, w, b, *settings, needs, optional, single_stat_index, 0, None, None),
        )
    h, w, b = (None if x is None else x.detach() for x in (h, w, b))
    statistics, _, m, log_s, logits, *_ = torch_library.token_stats_op(
        h, w, b, *settings, needs, optional, -1, 0, None, None
    )
    torch.library.opcheck(
        torch_library.token_stats_backward_op,
        (
            *(torch.randn_like(statistics), None, statistics, m, log_s, logits),
            *(h, w, b, *settings, needs, None, None),
        ),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [None, TAU])
def test_opcheck_of_logits(tau, dtype):
    logits = torch.randn(N, V, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch_library.entropy_from_logits_op, (logits, tau, 0.7))
    logits = logits.detach()
    found = torch_library.entropy_from_logits_op(logits, tau, 0.7)
    torch.library.opcheck(
        torch_library.entropy_from_logits_backward_op, (torch.randn(N), *found, logits, tau, 0.7)
    )


class TinyModel(nn.Module):
    """A block and a head, trained by an entropy loss, an entropy bonus and a log-probability."""

    def __init__(self, vocabulary=50, width=8):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens, mask, temperature):
        hidden = self.block(self.embedding(tokens))
        head = {"bias": self.head.bias, "temperature": temperature}
        loss = fused_entropy_loss(hidden, self.head.weight, mask=mask, **head)
        stats = fused_token_stats(hidden, self.head.weight, tokens.roll(-1, 1), **head)
        logits_entropy = entropy_from_logits(self.head(hidden[:, -1]))
        return loss - 0.1 * stats.entropy.mean() - stats.logprob.mean() + logits_entropy.sum()


@pytest.mark.parametrize(
    "compiler",
    [{"backend": "aot_eager"}, pytest.param({"mode": "reduce-overhead"}, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("per_token", [False, True])
def test_compiled_equals_eager(per_token, compiler):
    torch._dynamo.reset()
    model = TinyModel()
    compiled = torch.compile(model, fullgraph=True, **compiler)
    # From the second length on, shapes are dynamic.
    for length, temperature in ((5, 0.5), (5, 0.7), (9, 0.9)):
        tokens = torch.randint(50, (2, length))
        mask = torch.rand(2, length) > 0.3
        if per_token:
            temperature = torch.rand(2, length) + temperature
        results = []
        for module in (compiled, model):
            model.zero_grad()
            loss = module(tokens, mask, temperature)
            loss.backward()
            results.append((loss, *(p.grad.clone() for p in model.parameters())))
        assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_dtype", DTYPES)
def test_autocast_is_that_of_linear(hidden_dtype, dtype):
    """Autocast rounds the inputs to its dtype, but neither the temperature nor the statistics."""
    *inputs, targets = draw(N, D, V)
    rounded = leaves(*inputs, dtype=torch.bfloat16)
    hidden, weight, bias = inputs[0].detach().to(hidden_dtype), *leaves(*inputs[1:], dtype=dtype)
    found = []
    for enabled, tensors in ((True, [hidden.requires_grad_(), weight, bias]), (False, rounded)):
        h, w, b = tensors
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = fused_entropy_loss(h, w, bias=b, temperature=TAU)
            stats = fused_token_stats(h, w, targets, bias=b, temperature=TAU, stats=FLOAT_STATS)
            total = loss + sum(x.sum() for x in stats[:5])
        gradients = torch.autograd.grad(total, tensors)
        assert [g.dtype for g in gradients] == [x.dtype for x in tensors]
        found.append((loss, *stats[:5], *(g.bfloat16() for g in gradients)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("second", ["loss", "none", "logits"])
def test_second_derivatives_are_refused(second):
    hidden, weight, _, _ = draw(N, D, V)
    output = {
        "loss": lambda: fused_entropy_loss(hidden, weight),
        "none": lambda: fused_entropy_loss(hidden, weight, reduction="none").sum(),
        "logits": lambda: entropy_from_logits(hidden).sum(),
    }[second]()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(output, hidden, create_graph=True)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is there")
def test_ops_that_read_on_the_host_stay_out_of_cuda_graphs(simulated_cuda):
    """A graph that is replayed would neither wait for the GPU again nor read an input's values."""
    hidden, weight, bias, targets = (x.detach().cuda() for x in draw(N, D, V))
    mask, tau, needs = torch.tensor([1, 0, 2, 1, 0, 1]).cuda(), TAU.cuda(), [True] * 3
    head = (hidden, weight, bias, targets, mask, tau, TRANSFORM, None, None)
    modules = (torch_library, torch_library_divergence)
    known = {name: op for module in modules for name, op in vars(module).items()}
    ops, reads = {name: op for name, op in known.items() if name.endswith("_op")}, {}

    def run(name, *given):
        before = simulated_cuda.waits
        found = ops[name](*given)
        on_host = any(isinstance(x, torch.Tensor) and x.is_cpu for x in given)
        reads[name] = on_host or simulated_cuda.waits > before
        return found

    loss, _, dw, _, indices, dy, scales, _ = run("entropy_loss_op", *head, 0.0, True, needs)
    run("weight_gradient_op", dw, indices, dy, scales, hidden, mask, loss, V, torch.float32)
    found = run("token_stats_op", *head, needs, True, -1, 0, None, None)
    saved = found[0], *found[2:5]
    run("token_stats_backward_op", found[0], None, *saved, *head, needs, None, None)
    logits = hidden @ weight.t()
    entropy = run("entropy_from_logits_op", logits, tau, 1.0)
    run("entropy_from_logits_backward_op", entropy[0], *entropy, logits, tau, 1.0)
    pair = (*head, *(x.flip(0) for x in head[:3]), [1.0, 0.0, 0.5])
    run("divergence_op", *pair, True, needs)
    each, *_ = run("token_divergences_op", *pair, needs)
    run("token_divergences_backward_op", each, *pair, needs)
    unsafe = torch.Tag.cudagraph_unsafe
    assert reads == {name: unsafe in op._opoverload.tags for name, op in ops.items()}
    assert sorted(reads.values()) == [False, *[True] * 8]
