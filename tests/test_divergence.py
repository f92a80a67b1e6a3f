"""Divergence of two heads against textbook formulas on full logits in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_losses import by_docstring
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from truth import compare, leaves, logits_of, relative_error

import em_kernels.ops.flops  # noqa: F401  # FlopCounterMode counts the extension's GEMM
from em_kernels import fused_divergence, fused_token_stats, reference_divergence
from em_kernels.ops import divergence, inputs
from em_kernels.ops import torch_library_divergence as ops
from em_kernels.ops.inputs import GradMask, HeadInputs
from em_kernels.ops.saved_gradients import weight_gradient

BETAS = [0.0, 1.0, 0.5, 0.1, 1e-4, 1 - 1e-4]
N, D, REF_D, V = 7, 8, 12, 61
MASK = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 3.0])
TAU = torch.linspace(0.5, 1.5, N)


def truth_of(logits, ref_logits, beta):
    """Return each row's divergence by xlogy and logaddexp, differentiable by the first."""
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    if beta == 0:
        return (logq.exp() * (logq.masked_fill(logq == -torch.inf, 0) - logp)).sum(-1)
    if beta == 1:
        return (logp.exp() * (logp.masked_fill(logp == -torch.inf, 0) - logq)).sum(-1)
    logr = torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))
    kept = logr > -torch.inf
    of_q = torch.where(logq > -torch.inf, logq.exp() * (logq - logr), 0)
    of_p = torch.where(logp > -torch.inf, logp.exp() * (logp - logr), 0)
    return torch.where(kept, beta * of_q + (1 - beta) * of_p, 0).sum(-1)


def draw_pair(dtype=torch.float32, distance=1.0, v=V, ref_v=V, seed=0):
    """Return hidden, weight, bias and the same of a reference, whose logits differ by `distance`.

    The reference's states hold the model's, so that its logits can be as near as one likes.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(max(v, ref_v), D, generator=generator) * (3 / D**0.5)
    bias = torch.randn(max(v, ref_v), generator=generator)
    more = torch.randn(N, REF_D - D, generator=generator)
    ref_hidden = torch.cat([hidden, more], 1)
    away = torch.randn(len(weight), REF_D - D, generator=generator) * distance
    ref_weight = torch.cat([weight, away], 1)
    tensors = hidden, weight[:v], bias[:v], ref_hidden, ref_weight[:ref_v], bias[:ref_v]
    return [x.to(dtype) for x in tensors]


def in_fp64(tensors):
    return [x.detach().double() for x in tensors]


HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "everything": {
        "temperature": TAU,
        "bias": True,
        "ref_bias": True,
        "logit_scale": 0.8,
        "softcap": 9.0,
        "ref_logit_scale": 1.2,
        "ref_softcap": 11.0,
    },
}


def split_head(head, bias, ref_bias):
    """Return the arguments of ours, and the transforms of the two logits."""
    head = dict(head)
    if head.pop("bias", False):
        head["bias"] = bias
    if head.pop("ref_bias", False):
        head["ref_bias"] = ref_bias
    tau = head.get("temperature", 1.0)
    ours = {k: x for k, x in head.items() if not k.startswith("ref_") and k != "bias"}
    ref = {k[4:]: x for k, x in head.items() if k.startswith("ref_") and k != "ref_bias"}
    return head, ours, ref | {"temperature": tau}


def eager(tensors, head, beta, v=V):
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = tensors
    given, ours, ref = split_head(head, bias, ref_bias)
    logits = logits_of(hidden, weight[:v], bias[:v] if "bias" in given else None, **ours)
    ref_bias = ref_bias[:v] if "ref_bias" in given else None
    ref_logits = logits_of(ref_hidden, ref_weight[:v], ref_bias, **ref)
    return truth_of(logits, ref_logits.detach(), beta)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_values_and_gradients(head, beta, dtype, dweight):
    tensors = draw_pair(dtype)
    results = []
    for kind in ("ours", "eager", "true"):
        given = in_fp64(tensors) if kind == "true" else [x.clone() for x in tensors]
        mine = leaves(*given[:3])
        arguments, *_ = split_head(head, mine[2], given[5])
        if kind == "ours":
            mask = {"mask": MASK, "beta": beta, "chunk_bytes": 3 * V * 16}
            loss = fused_divergence(mine[0], mine[1], *given[3:5], **arguments, **mask)
        else:
            each = eager([*mine, *given[3:]], head, beta)
            loss = (MASK * each).sum() / MASK.sum()
        grads = torch.autograd.grad(loss, mine, allow_unused=True)
        results.append([loss.detach(), *(g for g in grads if g is not None)])
    ours, plain, true = results
    assert [g.dtype for g in ours[1:]] == [dtype] * len(ours[1:])
    accuracy = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    floors = [40 * accuracy * t.norm() + 30 * accuracy * min(1, t.norm()) for t in true]
    if dtype in (torch.bfloat16, torch.float16):  # dy is rounded to it as an operand
        floors = [f + torch.finfo(dtype).eps * t.norm() for f, t in zip(floors, true, strict=True)]
    floors = [f + 1e-15 for f in floors]  # the truth's own rounding
    compare(["loss", "dhidden", "dweight", "dbias"][: len(ours)], ours, plain, true, floors)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_the_docstrings_code(beta):
    names = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
    given = dict(zip(names, draw_pair(torch.float64), strict=True))
    given |= {"mask": MASK, "temperature": 0.7, "beta": beta}
    assert_close(by_docstring(fused_divergence, "loss", **given), fused_divergence(**given))


@pytest.mark.parametrize("beta", BETAS)
def test_each_token_with_any_upstream(beta):
    tensors = draw_pair(torch.float64)
    upstream = torch.linspace(-1, 1, N, dtype=torch.float64)
    mine = leaves(*tensors[:3])
    settings = {"bias": mine[2], "ref_bias": tensors[5], "beta": beta, "mask": MASK}
    each = fused_divergence(
        *mine[:2], *tensors[3:5], reduction="none", chunk_bytes=2 * V * 16, **settings
    )
    theirs = leaves(*tensors[:3])
    plain = MASK * eager([*theirs, *tensors[3:]], {"bias": True, "ref_bias": True}, beta)
    assert_close(each, plain)
    found = torch.autograd.grad((upstream * each).sum(), mine, retain_graph=True)
    assert_close(found, torch.autograd.grad((upstream * plain).sum(), theirs))
    assert_close(torch.autograd.grad((upstream * each).sum(), mine), found, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_gradcheck(beta, reduction):
    tensors = draw_pair(torch.float64, v=9, ref_v=9)
    h, w, b = leaves(*tensors[:3])

    def loss(h, w, b):
        settings = {"bias": b, "reduction": reduction, "softcap": 20.0, "temperature": TAU}
        return fused_divergence(h, w, *tensors[3:5], beta=beta, mask=MASK, **settings)

    assert torch.autograd.gradcheck(loss, (h, w, b), atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("v, ref_v", [(V, V + 6), (V + 6, V), (V, 1)])
def test_the_common_prefix_of_padded_vocabularies_counts(v, ref_v, beta):
    tensors = draw_pair(torch.float64, v=v, ref_v=ref_v)
    mine, theirs = leaves(*tensors[:3]), leaves(*tensors[:3])
    settings = {"bias": mine[2], "ref_bias": tensors[5], "beta": beta}
    loss = fused_divergence(*mine[:2], *tensors[3:5], **settings)
    head = {"bias": True, "ref_bias": True}
    plain = eager([*theirs, *tensors[3:]], head, beta, v=min(v, ref_v)).mean()
    assert_close(loss, plain)
    assert_close(torch.autograd.grad(loss, mine), torch.autograd.grad(plain, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_have_no_divergence_and_no_gradient(beta, dtype, dweight):
    hidden, weight, bias, *_ = draw_pair(dtype)
    mine = leaves(hidden, weight, bias)
    head = {"bias": mine[2], "ref_bias": bias, "softcap": 9.0, "ref_softcap": 9.0}
    loss = fused_divergence(*mine[:2], hidden, weight, beta=beta, chunk_bytes=3 * V * 16, **head)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, mine))


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("beta", BETAS)
def test_small_divergences_keep_their_digits(beta, distance):
    """The eager sum of p log(p / q) is noise, even negative, where it is below 1e-7."""
    hidden, weight, _, ref_hidden, ref_weight, _ = draw_pair(distance=distance)
    # States and weights of few bits: their products are exact, so that only ours can round.
    hidden, ref_hidden = hidden.mul(16).round() / 16, ref_hidden.mul(16).round() / 16
    bits = 2.0 ** math.floor(math.log2(distance / 16))
    weight, ref_weight = (x.div(bits).round() * bits for x in (weight, ref_weight))
    exact = in_fp64([hidden, weight, ref_hidden, ref_weight])
    true = truth_of(exact[0] @ exact[1].t(), exact[2] @ exact[3].t(), beta)
    each = fused_divergence(hidden, weight, ref_hidden, ref_weight, beta=beta, reduction="none")
    assert (each >= 0).all()
    plain = truth_of(hidden @ weight.t(), ref_hidden @ ref_weight.t(), beta)
    error, eager_error = (each - true).norm(), (plain - true).norm()
    assert error <= 2 * eager_error + 1e-5 * true.norm()
    assert distance == 1 or error < 0.02 * true.norm() + 1e-12


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tokens_and_one(reduction, count):
    hidden, weight, _, ref_hidden, ref_weight, _ = draw_pair()
    mine = leaves(hidden[:count], weight)
    loss = fused_divergence(*mine, ref_hidden[:count], ref_weight, reduction=reduction).sum()
    dh, dw = torch.autograd.grad(loss, mine)
    assert dh.shape == (count, D) and (loss > 0) == (count > 0) == (dw != 0).any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_models_own_statistics(reduction):
    hidden, weight, bias, ref_hidden, ref_weight, _ = draw_pair()
    names = ("entropy", "logsumexp", "mean_logit", "log_collision", "argmax")
    settings = {"bias": bias, "mask": MASK, "temperature": TAU, "softcap": 9.0}
    _, found = fused_divergence(
        *leaves(hidden, weight), ref_hidden, ref_weight, return_stats=names, reduction=reduction,
        **settings,
    )  # fmt: skip
    expected = fused_token_stats(hidden, weight, stats=names, **settings)
    assert found.logprob is None and not found.entropy.requires_grad
    assert all(torch.equal(getattr(found, n), getattr(expected, n)) for n in names)


@pytest.mark.parametrize("needs, units", [((1, 1), 8), ((1, 0), 6), ((0, 1), 6), ((0, 0), 4)])
@pytest.mark.parametrize("chunk_bytes", [None, 3 * V * 8])
def test_work_is_what_the_docstring_says(chunk_bytes, needs, units):
    """A product with one vocabulary costs 2 N D V."""
    hidden, weight, _, _, _, _ = draw_pair()
    head = HeadInputs(hidden, weight, chunk_bytes=chunk_bytes)
    pair, needs = divergence.Pair(head, head, 0.3), GradMask(*map(bool, needs))
    with FlopCounterMode(display=False) as counter:
        *_, found = divergence.sum_divergences(pair, True, needs)
        if needs.weight:
            kept = (found.weight, found.vocab_indices, found.dy, found.dy_scales)
            weight_gradient(*kept, hidden, None, torch.ones(()), V, weight.dtype)
    assert counter.get_total_flops() == units * N * D * V
    with FlopCounterMode(display=False) as counter:  # beside 4 of the forward
        divergence.gradients_of_each(pair, TAU, needs)
    assert counter.get_total_flops() == units * N * D * V


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False]])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_opcheck(beta, needs):
    h, w, b, *ref = draw_pair()
    tensors = [x.requires_grad_(need) for x, need in zip((h, w, b), needs, strict=True)]
    settings = (None, MASK, TAU, [0.7, 5.0, 1.0], None, None, *ref, [1.2, 4.0, beta])
    torch.library.opcheck(ops.divergence_op, (*tensors, *settings, True, needs))
    torch.library.opcheck(ops.token_divergences_op, (*tensors, *settings, needs))
    detached = [x.detach() for x in tensors]
    torch.library.opcheck(
        ops.token_divergences_backward_op,
        (torch.randn(N), *detached, *settings, needs),
    )


def test_compiled_equals_eager():
    hidden, weight, _, ref_hidden, ref_weight, _ = draw_pair(v=V + 3)
    compiled = torch.compile(fused_divergence, fullgraph=True, backend="aot_eager")
    for reduction in ("mean", "none"):
        results = []
        for function in (compiled, fused_divergence):
            mine = leaves(hidden, weight)
            loss = function(*mine, ref_hidden, ref_weight, beta=0.3, reduction=reduction)
            results.append((loss.detach(), *torch.autograd.grad((loss * TAU).sum(), mine)))
        assert_close(*results, rtol=1e-5, atol=1e-7)


def test_autocast_is_that_of_linear():
    tensors = draw_pair()
    results = []
    for enabled in (True, False):
        given = tensors if enabled else [x.bfloat16() for x in tensors]
        mine = leaves(*given[:2])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = fused_divergence(*mine, *given[3:5], beta=0.3)
        results.append((loss, *(g.bfloat16() for g in torch.autograd.grad(loss, mine))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"beta": 1.5}, r"^beta: 1.5 is not in \[0, 1\]"),
        ({"beta": torch.tensor(0.5)}, "^beta: expected a number"),
        ({"ref_hidden": torch.zeros(N - 1, REF_D)}, r"^ref_hidden: expected \(7, D'\)"),
        ({"ref_hidden": torch.zeros(N, REF_D + 1)}, r"^ref_weight: expected \(V, 13\)"),
        ({"ref_weight": torch.zeros(V, REF_D, dtype=torch.float64)}, "^ref_weight: is torch.fl"),
        ({"ref_bias": torch.zeros(V + 1)}, r"^ref_bias: expected \(61,\)"),
        ({"ref_softcap": 0.0}, "^ref_softcap: 0.0"),
        ({"ref_logit_scale": 0.0}, "^ref_logit_scale: 0.0"),
        ({"weight": None}, "^weight: expected a tensor"),
        ({"return_stats": ("top_logprobs",)}, "^return_stats: top_logprobs is not for fused_div"),
        ({"return_stats": ("logprob",)}, "^return_stats: logprob is not for fused_div"),
        ({"return_stats": 5}, "^return_stats: 5 is not a sequence of names"),
        ({"reduction": "batchmean"}, "^reduction: 'batchmean'"),
        ({"mask": torch.ones(N, 1)}, "^mask: expected exactly"),
        ({"chunk_bytes": 7}, "^chunk_bytes: 7 is less"),
    ],
)
def test_errors(change, message):
    hidden, weight, _, ref_hidden, ref_weight, _ = draw_pair()
    given = {"hidden": hidden, "weight": weight, "ref_hidden": ref_hidden, "ref_weight": ref_weight}
    with pytest.raises((ValueError, TypeError), match=message):
        fused_divergence(**given | change)


def test_second_derivatives_are_refused():
    hidden, weight, _, ref_hidden, ref_weight, _ = draw_pair()
    mine = leaves(hidden, weight)
    for reduction in ("mean", "none"):
        loss = fused_divergence(*mine, ref_hidden, ref_weight, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(loss, mine, create_graph=True)


def test_bf16_is_as_exact_as_its_inputs():
    """Logits rounded to bf16, as other libraries compute them, move KL in its second digit."""
    tensors = draw_pair(torch.bfloat16, distance=0.05)
    exact = in_fp64(tensors)
    true = eager(exact, {}, 1.0).mean()
    ours = fused_divergence(*tensors[:2], *tensors[3:5])
    assert relative_error(ours, true) < 1e-3
    rounded = [F.linear(*pair).double() for pair in (tensors[:2], tensors[3:5])]
    assert relative_error(truth_of(*rounded, 1.0).mean(), true) > 10 * relative_error(ours, true)


@pytest.mark.parametrize(
    "distance, shrink, temperature", [(2.0**-6, 2.0**-3, 1.0), (1.0, 2.0**-10, 2.0**-20)]
)
@pytest.mark.parametrize("beta", BETAS)
def test_fp16_holds_gradients_of_any_size(
    beta, distance, shrink, temperature, dweight, monkeypatch
):
    """Of nearly equal models, below fp16's smallest number, and of a small temperature, above its
    largest.
    """
    monkeypatch.setattr(inputs, "operand_dtype", lambda weight: weight.dtype)  # as on a GPU
    tensors = draw_pair(torch.float16, distance=distance, v=2000, ref_v=2000)
    tensors = [x * shrink for x in (*tensors[:2], *tensors[3:5])]
    head, exact = {"temperature": temperature}, in_fp64(tensors)
    leaf, mine = leaves(*exact[:2]), leaves(*tensors[:2])
    logits = (logits_of(*pair, **head) for pair in (leaf, exact[2:]))
    true = torch.autograd.grad(truth_of(*logits, beta).mean(), leaf)
    # As a GradScaler does: the gradients themselves must be in range.
    scale = 2.0 ** math.floor(math.log2(256 / max(g.abs().max().item() for g in true)))
    loss = scale * fused_divergence(*mine, *tensors[2:], beta=beta, **head)
    for ours, expected in zip(torch.autograd.grad(loss, mine), true, strict=True):
        assert relative_error(ours.double() / scale, expected) < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("beta", BETAS)
def test_fp16_holds_small_gradients_beside_large_ones(beta, dweight, monkeypatch):
    """One token of a chunk is far from the reference, the others are next to it."""
    monkeypatch.setattr(inputs, "operand_dtype", lambda weight: weight.dtype)  # as on a GPU
    hidden, weight, _, ref_hidden, ref_weight, _ = draw_pair(
        torch.float16, distance=2.0**-6, v=2000, ref_v=2000
    )
    hidden[3] *= 4  # its logits have a deviation of 12
    exact = in_fp64([hidden, weight, ref_hidden, ref_weight])
    leaf, mine = leaves(*exact[:2]), leaves(hidden, weight)
    each = truth_of(logits_of(*leaf), logits_of(*exact[2:]), beta)
    true = torch.autograd.grad(each.mean(), leaf)
    scale = 2.0 ** math.floor(math.log2(256 / max(g.abs().max().item() for g in true)))
    loss = scale * fused_divergence(*mine, ref_hidden, ref_weight, beta=beta)
    found = [g.double() / scale for g in torch.autograd.grad(loss, mine)]
    error = (found[0] - true[0]).norm(dim=1) / true[0].norm(dim=1)
    assert error.max() < 20 * torch.finfo(torch.float16).eps
    assert relative_error(found[1], true[1]) < 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 30.0])
@pytest.mark.parametrize("away", [1e-6, 1.0, 30.0])
def test_no_gradient_exceeds_its_bound(away, size, beta):
    logits = size * torch.randn(20, 50, dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    log_q = (logits + away * torch.randn_like(logits)).log_softmax(-1)
    pivot = (log_p - log_q).gather(1, log_p.argmax(1, keepdim=True))[:, 0]
    value, centre = reference_divergence.divergence_sums(log_p, log_q, pivot, beta)
    dz = reference_divergence.divergence_row_gradient(log_p, log_q, pivot, centre, beta)
    assert (dz.abs().amax(1) <= divergence._bound_of_gradient(value, beta) * (1 + 1e-6)).all()
