"""Every refusal names the argument; nothing wrong passes silently."""

import re
from functools import partial

import pytest
import torch
from truth import draw

from em_kernels import (
    entropy_from_logits,
    fused_entropy_loss,
    fused_token_loss,
    fused_token_stats,
)
from em_kernels.streamed_loss import entropy_loss_into

N, D, V = 4, 3, 11
NAN, INF = float("nan"), float("inf")
BROADCASTABLE = torch.ones(1)
ON_META = torch.ones(N, device="meta")

OF_BOTH = [
    ("hidden", [1.0, 2.0], TypeError, "list"),
    ("hidden", torch.tensor(1.0), ValueError, "scalar"),
    ("hidden", torch.ones(N, D + 1), ValueError, "(11, 3)"),
    ("hidden", torch.ones(N, D, dtype=torch.int64), TypeError, "int64"),
    ("hidden", torch.ones(N, D, dtype=torch.complex64), TypeError, "complex64"),
    ("hidden", torch.ones(N, D).half(), TypeError, "float16"),
    ("weight", torch.ones(V), ValueError, "(V, D)"),
    ("weight", torch.ones(1, V, D), ValueError, "(V, D)"),
    ("weight", torch.ones(D, V), ValueError, "(V, 3)"),
    ("weight", torch.ones(0, D), ValueError, "empty"),
    ("weight", torch.ones(V, D).bfloat16(), TypeError, "autocast"),
    ("weight", torch.ones(V, D, device="meta"), ValueError, "meta"),
    ("weight", torch.ones(V, D).to(torch.float8_e4m3fn), TypeError, "float8"),
    ("bias", torch.ones(V, 1), ValueError, "(11,)"),
    ("bias", torch.ones(1), ValueError, "(11,)"),
    ("bias", torch.ones(V).double(), TypeError, "float64"),
    ("bias", torch.ones(V, device="meta"), ValueError, "meta"),
    ("mask", [True] * N, TypeError, "list"),
    ("mask", BROADCASTABLE, ValueError, "(4,)"),
    ("mask", torch.ones(N, 1), ValueError, "(4,)"),
    ("mask", torch.tensor(1.0), ValueError, "(4,)"),
    ("mask", torch.ones(N, requires_grad=True), ValueError, "detach"),
    ("mask", torch.ones(N).cfloat(), TypeError, "complex"),
    ("mask", torch.ones(N, dtype=torch.uint16), TypeError, "uint16"),
    ("mask", torch.tensor([1, 1, NAN, 1]), ValueError, "finite"),
    ("mask", torch.tensor([1, 1, INF, 1]), ValueError, "finite"),
    ("mask", ON_META, ValueError, "meta"),
    ("temperature", 0.0, ValueError, "0.0"),
    ("temperature", -1, ValueError, "-1"),
    ("temperature", NAN, ValueError, "nan"),
    ("temperature", INF, ValueError, "inf"),
    ("temperature", 1e-39, ValueError, "1e-37"),
    ("temperature", torch.full((N,), 1e-39), ValueError, "1e-37"),
    ("temperature", torch.zeros(N).half(), ValueError, "4 values"),
    ("temperature", torch.tensor(INF).half(), ValueError, "4 values"),
    ("temperature", None, TypeError, "None"),
    ("temperature", "hot", TypeError, "str"),
    ("temperature", BROADCASTABLE, ValueError, "(4,)"),
    ("temperature", torch.ones(N).long(), TypeError, "int64"),
    ("temperature", torch.ones(N, requires_grad=True), ValueError, "detach"),
    ("temperature", torch.tensor(1.0, requires_grad=True), ValueError, "detach"),
    ("temperature", torch.tensor([1.0, 0.0, 1.0, 1.0]), ValueError, "> 0"),
    ("temperature", torch.tensor([1.0, 1.0, -2.0, 1.0]), ValueError, "> 0"),
    ("temperature", torch.tensor([1.0, NAN, 1.0, 1.0]), ValueError, "> 0"),
    ("temperature", torch.tensor([1.0, INF, 1.0, 1.0]), ValueError, "> 0"),
    ("temperature", torch.tensor(0.0), ValueError, "> 0"),
    ("temperature", ON_META, ValueError, "meta"),
    ("logit_scale", 0, ValueError, "0"),
    ("logit_scale", 1e39, ValueError, "fp32"),
    ("logit_scale", NAN, ValueError, "nan"),
    ("logit_scale", -INF, ValueError, "inf"),
    ("logit_scale", torch.tensor(1.0, requires_grad=True), TypeError, "number"),
    ("softcap", 0.0, ValueError, "None"),
    ("softcap", -30.0, ValueError, "-30"),
    ("softcap", 1e39, ValueError, "fp32"),
    ("softcap", NAN, ValueError, "nan"),
    ("softcap", torch.tensor(1.0, requires_grad=True), TypeError, "number"),
    ("chunk_bytes", 0, ValueError, "0"),
    ("chunk_bytes", -5, ValueError, "-5"),
    ("chunk_bytes", 1e6, TypeError, "float"),
    ("chunk_bytes", True, TypeError, "bool"),
    ("process_group", "tensor parallel", TypeError, "str"),
]
OF_LOSS = [
    ("reduction", "avg", ValueError, "'avg'"),
    ("reduction", None, ValueError, "None"),
    ("chunk_bytes", V * 4 - 1, ValueError, "at least 44"),
    ("grad_tolerance", 1.0, ValueError, "[0, 1)"),
    ("grad_tolerance", -1e-9, ValueError, "[0, 1)"),
    ("grad_tolerance", NAN, ValueError, "[0, 1)"),
    ("grad_tolerance", "none", TypeError, "str"),
    ("mask", torch.tensor([1.0, 1, -1, 1]), ValueError, "not negative"),
    ("mask", torch.tensor([1, 1, -1, 1]), ValueError, "not negative"),
]
OF_STATS = [
    ("targets", torch.zeros(N, dtype=torch.int32), TypeError, "int32"),
    ("targets", torch.zeros(N), TypeError, "float32"),
    ("targets", [0] * N, TypeError, "list"),
    ("targets", torch.zeros(N + 1, 2, dtype=torch.int64), ValueError, "(4, 2)"),
    ("targets", torch.zeros(N, 1, 1, dtype=torch.int64), ValueError, "(4,)"),
    ("targets", torch.zeros(1, dtype=torch.int64), ValueError, "(4,)"),
    ("targets", torch.tensor([0, V, 0, 0]), ValueError, "[0, 11)"),
    ("targets", torch.tensor([0, -1, 0, 0]), ValueError, "[0, 11)"),
    ("targets", torch.tensor([0, -99, -101, 0]), ValueError, "2 values"),
    ("targets", torch.zeros(N, dtype=torch.int64, device="meta"), ValueError, "meta"),
    ("chunk_bytes", (N + D) * 4 - 1, ValueError, f"at least {(N + D) * 4}"),
    ("stats", ["entropi"], ValueError, "'entropi'"),
    ("stats", ["logprob"], ValueError, "targets"),
    ("stats", "entropy", ValueError, "sequence"),
    ("stats", (), ValueError, "sequence"),
]


def refused(function, name, value, error, text):
    hidden, weight, bias, _ = draw(N, D, V)
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, name: value}
    # A wrong hidden may show as a weight that does not match it.
    pattern = f"^({name}|weight): .*{re.escape(text)}" if name == "hidden" else f"^{name}: .*"
    with pytest.raises(error, match=pattern) as raised:
        function(**arguments)
    assert text in str(raised.value)


def named(cases):
    return [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(cases)]


@pytest.mark.parametrize("name, value, error, text", named(OF_BOTH + OF_LOSS))
def test_entropy_loss(name, value, error, text):
    refused(fused_entropy_loss, name, value, error, text)


OF_SINK = [("reduction", "none", ValueError, "'none'"), *OF_BOTH[:-1], *OF_LOSS]


@pytest.mark.parametrize("name, value, error, text", named(OF_SINK))
def test_entropy_loss_into(name, value, error, text):
    refused(partial(entropy_loss_into, None), name, value, error, text)


@pytest.mark.parametrize("name, value, error, text", named(OF_BOTH + OF_STATS))
def test_token_stats(name, value, error, text):
    refused(fused_token_stats, name, value, error, text)


@pytest.mark.parametrize(
    "logits, temperature, error, text",
    [
        ([1.0], 1.0, TypeError, "logits: .*list"),
        (torch.ones(3).long(), 1.0, TypeError, "logits: .*int64"),
        (torch.tensor(1.0), 1.0, ValueError, "logits: .*V"),
        (torch.ones(3, 0), 1.0, ValueError, "logits: .*V > 0"),
        (torch.ones(3, 5), 0.0, ValueError, "temperature: 0.0"),
        (torch.ones(3, 5), torch.ones(5), ValueError, r"temperature: .*\(3,\)"),
        (torch.ones(3, 5), torch.zeros(3), ValueError, "temperature: 3 values"),
        (torch.ones(3, 5), torch.ones(3, requires_grad=True), ValueError, "temperature: .*detach"),
        (torch.ones(3, 5), torch.ones(3, device="meta"), ValueError, "temperature: .*meta"),
    ],
)
def test_entropy_from_logits(logits, temperature, error, text):
    with pytest.raises(error, match=text):
        entropy_from_logits(logits, temperature=temperature)


def test_values_are_checked_on_masked_tokens_too():
    hidden, weight, _, _ = draw(N, D, V)
    mask, targets = torch.tensor([1, 0, 1, 1]), torch.tensor([0, V, 1, 1])
    with pytest.raises(ValueError, match="targets: 1 values"):
        fused_token_stats(hidden, weight, targets, mask=mask)


def test_dtensors_are_refused_with_the_way_out(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        weight = dist.tensor.distribute_tensor(torch.ones(V, D), mesh)
        with pytest.raises(TypeError, match="weight: .*full_tensor"):
            fused_entropy_loss(torch.ones(N, D), weight)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "mask", "temperature", "scalar"])
@pytest.mark.parametrize("loss", [fused_entropy_loss, lambda **x: fused_token_stats(**x).entropy])
def test_no_silent_zero_in_forward_mode(loss, name):
    hidden, weight, bias, _ = (x.detach() for x in draw(N, D, V))
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "mask": torch.ones(N)}
    arguments["temperature"] = torch.tensor(1.0) if name == "scalar" else torch.ones(N)
    name = "temperature" if name == "scalar" else name
    x = arguments.pop(name)
    with pytest.raises(RuntimeError, match=f"^{name}: has a forward-mode tangent"):
        torch.func.jvp(lambda x: loss(**arguments, **{name: x}), (x,), (x,))


def test_no_silent_zero_in_forward_mode_of_logits():
    with pytest.raises(RuntimeError, match="^logits: has a forward-mode tangent"):
        torch.func.jvp(entropy_from_logits, (torch.ones(N, V),), (torch.ones(N, V),))


TRANSFORMS = {
    "grad": torch.func.grad,
    "vmap": torch.func.vmap,
    "jacrev": torch.func.jacrev,
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f)),
    "grad of vmap": lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum()),
}
FUNCTIONS = {
    "hidden": lambda x, weight: fused_entropy_loss(x, weight),
    "none": lambda x, weight: fused_entropy_loss(x, weight, reduction="none").sum(),
    "statistics": lambda x, weight: sum(fused_token_stats(x, weight, TARGETS)[:2]).sum(),
    "one statistic": lambda x, weight: fused_token_stats(x, weight.detach()).entropy.sum(),
    "custom": lambda x, weight: fused_token_loss(x, weight, None, lambda s, _: s.entropy),
    "from logits": lambda x, weight: entropy_from_logits(x @ weight.T).sum(),
}
TARGETS = torch.arange(N)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_silent_zero_in_transforms(function, transform):
    """vmap, for example, hides from the forward that hidden requires grad."""
    weight = draw(N, D, V)[1]
    call = TRANSFORMS[transform](lambda x: FUNCTIONS[function](x, weight))
    with pytest.raises(RuntimeError, match=r"^(hidden|logits): is within a transform of torch\.f"):
        call(torch.ones(2, N, D, requires_grad=True))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_batched_upstream_gradients(function):
    """Statistics take them; gradients that the forward has saved do not."""
    hidden, weight, *_ = draw(N, D, V)
    hidden.requires_grad_()
    value = FUNCTIONS[function](hidden, weight)
    settings = {"grad_outputs": torch.tensor([1.0, -2.0]), "is_grads_batched": True}
    if function in ("hidden", "one statistic", "custom"):
        with pytest.raises(RuntimeError, match="^is_grads_batched: .* once for each"):
            torch.autograd.grad(value, hidden, **settings)
        return
    found = torch.autograd.grad(value, hidden, **settings, retain_graph=True)[0]
    alone = torch.autograd.grad(value, hidden)[0]
    assert alone.any() and torch.allclose(found, torch.stack((alone, -2 * alone)), rtol=1e-5)


def test_meta_tensors_have_shapes():
    hidden, weight, bias, targets = (x.detach().to("meta") for x in draw(N, D, V))
    assert fused_entropy_loss(hidden, weight, bias=bias).shape == ()
    assert fused_token_stats(hidden, weight, targets).logprob.shape == (N,)


def test_means_of_weights_of_any_size():
    hidden, weight, _, _ = draw(N, D, V)
    plain = fused_entropy_loss(hidden, weight)
    for size in (2e38, 1e-38, 1e300, 1e-200):
        mask = torch.full((N,), size, dtype=torch.float32 if 1e-40 < size < 1e39 else torch.float64)
        torch.testing.assert_close(fused_entropy_loss(hidden, weight, mask=mask), plain)
