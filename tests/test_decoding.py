"""Entropy minimisation at inference, against autograd and torch's Adam in fp64, row by row."""

import pytest
import torch
from torch.testing import assert_close
from training.tiny import make_model
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from em_kernels.decoding import EntropyMinimizationLogitsProcessor

SETTINGS = {"threshold": 0.3, "kl_weight": 0.05, "learning_rate": 0.1, "n_grad_steps": 3}


def one_by_one(row, threshold, kl_weight, learning_rate, n_grad_steps):
    """The published procedure for one row, over its entries that are not -inf."""
    kept = row.isfinite()
    z = row[kept].double().requires_grad_()
    first = z.detach().softmax(-1)
    optimizer = torch.optim.Adam([z], lr=learning_rate)
    for _ in range(n_grad_steps):
        log_p = z.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum()
        if entropy < threshold:
            break
        divergence = (first * (first.log() - log_p)).sum()
        optimizer.zero_grad()
        (entropy + kl_weight * divergence).backward()
        optimizer.step()
    out = row.double().clone()
    out[kept] = z.detach()
    return out


def entropies(logits):
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)


def rows():
    """Logits from flat to sure, one row with -inf entries, and one just above the threshold."""
    logits = torch.randn(7, 40) * torch.tensor([0.1, 0.5, 1, 2, 4, 8, 2])[:, None]
    logits[6, ::3] = -torch.inf
    near = torch.zeros(2, 40)
    near[:, 0] = torch.tensor([6.85, 8])  # 0.31 nats, which one step ends, and 0.12
    return torch.cat([logits, near])


@pytest.mark.parametrize(
    "changes", [{}, {"n_grad_steps": 40}, {"kl_weight": 1.0}, {"threshold": 0.0}], ids=str
)
def test_as_autograd(changes):
    settings, logits = SETTINGS | changes, rows()
    found = EntropyMinimizationLogitsProcessor(**settings)(None, logits)
    expected = torch.stack([one_by_one(row, **settings) for row in logits])
    # Adam's first step is g / (|g| + 1e-8): gradients of 1e-8 decide with their rounding in fp32.
    assert_close(found.double(), expected, rtol=1e-5, atol=2e-3)
    assert_close(found.double().softmax(-1), expected.softmax(-1), rtol=1e-3, atol=1e-6)
    assert (entropies(found) <= entropies(logits) + 1e-6).all()
    assert torch.equal(found.argmax(-1), logits.argmax(-1))


def test_rows_do_not_depend_on_each_other():
    logits, sharpen = rows(), EntropyMinimizationLogitsProcessor(n_grad_steps=20)
    together = sharpen(None, logits)
    alone = torch.cat([sharpen(None, row[None]) for row in logits])
    assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_a_sure_row_is_left_alone():
    logits = rows().bfloat16()
    found = EntropyMinimizationLogitsProcessor()(None, logits)
    sure = entropies(logits.float()) < 0.3
    assert 0 < sure.sum() < len(sure) and found.dtype == torch.float32
    assert torch.equal(found[sure], logits[sure].float())
    assert (found[~sure] != logits[~sure]).any(-1).all()


def test_in_generate():
    """After the repetition penalty and before the temperature, as the docstring says."""
    model, prompt = make_model("qwen2").eval(), torch.tensor([[5, 6, 7, 8]])
    sharpen = EntropyMinimizationLogitsProcessor(n_grad_steps=100)
    sampling = {"do_sample": True, "temperature": 0.1, "top_k": 0, "top_p": 1.0}
    out = model.generate(
        prompt,
        **sampling,
        repetition_penalty=1.3,
        max_new_tokens=1,
        logits_processor=LogitsProcessorList([sharpen]),
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    penalised = RepetitionPenaltyLogitsProcessor(1.3)(prompt, out.logits[0].clone())
    assert_close(out.scores[0], sharpen(prompt, penalised) / 0.1)


@pytest.mark.parametrize(
    "name, value",
    [
        ("threshold", -0.1),
        ("kl_weight", float("nan")),
        ("learning_rate", 0),
        ("n_grad_steps", 0),
        ("n_grad_steps", 1.5),
    ],
)
def test_refusals(name, value):
    with pytest.raises(ValueError, match=name):
        EntropyMinimizationLogitsProcessor(**{name: value})
