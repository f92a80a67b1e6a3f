"""Attention of new tokens to a shared prompt on a GPU, against the masked one in fp64."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("em_kernels.training.trainer")  # pip install '.[train]'
sys.path.append(str(Path(__file__).parents[1]))
import flash_reference
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from em_kernels.training.rollouts.kv_cache import grouped_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [8, 2])
def test_lower_right_attention(heads, dtype):
    shapes = (3, heads, 20, 64), (3, 2, 31, 64), (3, 2, 31, 64)
    inputs = [torch.randn(shape).to("cuda", dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    module, upstream = nn.Module(), torch.randn(3, 20, heads, 64).to("cuda", dtype)
    module.num_key_value_groups, module.is_causal = heads // 2, True
    with grouped_attention():
        mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            batch_size=3,
            q_length=20,
            kv_length=31,
            q_offset=11,
            kv_offset=0,
            mask_function=causal_mask_function,
            device="cuda",
        )
        assert mask.is_lower_right
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *inputs, mask, scaling=0.2)
    expected, _ = sdpa_attention_forward(module, *exact, mask, scaling=0.2)
    found.backward(upstream)
    expected.backward(upstream.double())
    pairs = [(found, expected), *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
    for ours, truth in pairs:
        error = (ours.detach().double() - truth.detach()).norm() / truth.detach().norm()
        assert error <= max(1e-5, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attn_is_as_its_reference(causal):
    package = pytest.importorskip("flash_attn")
    ends = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 5, 6], [0, 12, 31])]
    more = *ends, 5, 19
    for name, shapes, given in (
        ("flash_attn_func", [(3, 20, 8, 64), (3, 31, 2, 64), (3, 31, 2, 64)], ()),
        ("flash_attn_varlen_func", [(6, 8, 64), (31, 2, 64), (31, 2, 64)], more),
    ):
        inputs = [torch.randn(s).to("cuda", torch.bfloat16).requires_grad_() for s in shapes]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        found = getattr(package, name)(*inputs, *given, softmax_scale=0.2, causal=causal)
        expected = getattr(flash_reference, name)(*exact, *given, softmax_scale=0.2, causal=causal)
        upstream = torch.randn(shapes[0]).to("cuda", torch.bfloat16)
        found.backward(upstream)
        expected.backward(upstream.double())
        pairs = [(found, expected), *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
        for ours, truth in pairs:
            error = (ours.detach().double() - truth.detach()).norm() / truth.detach().norm()
            assert error <= 4 * torch.finfo(torch.bfloat16).eps
