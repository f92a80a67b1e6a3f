"""A gradient tolerance that cannot pay is not used, and the report says so."""

import pytest
import torch
from torch.testing import assert_close
from truth import leaves

from em_kernels import fused_entropy_loss, fused_token_loss, gradient_report
from em_kernels.ops import choice_costs
from em_kernels.ops.checks import HeadArguments
from em_kernels.ops.choice_costs import GPUS, costs_of, why_exact
from em_kernels.streamed_loss import entropy_loss_into

BOTH, FROZEN, NEITHER = [True, True, False], [True, False, False], [False, False, True]


@pytest.fixture
def as_users_have_it(tolerances_of_tests, monkeypatch):
    monkeypatch.setattr(choice_costs, "why_exact", why_exact)


def head(tokens, width, entries, dtype=torch.bfloat16, group=None):
    hidden, weight = (torch.empty(n, width, dtype=dtype, device="meta") for n in (tokens, entries))
    arguments = dict.fromkeys(HeadArguments._fields) | {"hidden": hidden, "weight": weight}
    return HeadArguments(**arguments | {"group": group})


def peaked():
    weight = torch.randn(600, 16)
    return leaves(1.5 * weight[:40], weight)


def test_small_calls_are_exact(as_users_have_it):
    inputs = peaked()
    losses = (
        lambda tolerance: fused_entropy_loss(*inputs, grad_tolerance=tolerance),
        lambda tolerance: fused_token_loss(
            *inputs, None, lambda stats, i: stats.entropy, grad_tolerance=tolerance
        ),
    )
    for loss in losses:
        found, exact = (torch.autograd.grad(loss(tolerance), inputs) for tolerance in (0.1, 0.0))
        assert all(torch.equal(*pair) for pair in zip(found, exact, strict=True))
        report, of_exact = gradient_report(loss(0.1)), gradient_report(loss(0.0))
        assert (report.active_share, report.dropped_share) == (1, 0)
        assert "40 tokens with 600 x 16 weights" in report.why_exact and of_exact.why_exact == ""
    *_, report = entropy_loss_into(None, *inputs, grad_tolerance=0.1)
    assert report.active_share == 1 and "40 tokens" in report.why_exact


def test_tests_use_tolerances_whatever_the_sizes():
    loss = fused_entropy_loss(*peaked(), grad_tolerance=0.1)
    report = gradient_report(loss)
    assert report.active_share < 1 and report.why_exact == ""


def test_large_calls_use_it(as_users_have_it):
    given = torch.randn(2048, 256), torch.randn(4096, 256)
    inputs = leaves(given[0] / 100, given[1])
    report = gradient_report(fused_entropy_loss(*inputs, grad_tolerance=0.1))
    assert report.why_exact == ""  # flat rows: what that chunk needs is found out when it comes
    assert_close(report.active_share, torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("needs", [BOTH, FROZEN])
def test_real_heads_use_it_on_a_cpu(needs, dtype):
    for width in (896, 1536, 3584):
        assert why_exact(head(512, width, 151_936, dtype), needs) == ""


def test_more_products_never_speak_against_it():
    """Whatever pays for few tokens, narrow heads or one gradient pays for more."""
    for tokens in (1, 16, 256, 4096):
        for width in (16, 256, 4096):
            if why_exact(head(tokens, width, 151_936), FROZEN) == "":
                assert why_exact(head(tokens, width, 151_936), BOTH) == ""
                assert why_exact(head(2 * tokens, width, 151_936), FROZEN) == ""
                assert why_exact(head(tokens, 2 * width, 151_936), FROZEN) == ""
    assert why_exact(head(512, 1536, 151_936), NEITHER) == ""  # nothing to choose


def test_ranks_agree_whatever_their_shards_and_devices(monkeypatch):
    for tokens, width in ((1, 16), (8, 64), (64, 256), (512, 1536)):
        found = set()
        for size in (1, 1000, 75_968, 151_936):
            for isa in (0, 1):
                monkeypatch.setattr(choice_costs, "bf16_isa", lambda isa=isa: isa)
                monkeypatch.setattr("em_kernels.ops.gemm.bf16_isa", lambda isa=isa: isa)
                found.add(why_exact(head(tokens, width, size, group="0"), BOTH))
        assert len(found) == 1


def test_gpus(monkeypatch):
    """A GPU that is not in the table counts as the next older one."""
    gpu = torch.device("cuda")
    for capability, like in [((9, 0), (9, 0)), ((8, 7), (8, 6)), ((12, 1), (12, 0))]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert costs_of(gpu) is GPUS[like]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert costs_of(gpu) is GPUS[(7, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice_costs, "operand_dtype", lambda weight: weight.dtype)
    monkeypatch.setattr(choice_costs, "costs_of", lambda device: GPUS[(9, 0)])
    assert why_exact(head(8192, 4096, 151_936), BOTH) == ""
    # Launches outweigh such products.
    assert why_exact(head(64, 896, 32_000), BOTH) != ""
