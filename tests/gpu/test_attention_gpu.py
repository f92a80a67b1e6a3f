"""Attention of new tokens to a shared prompt on a GPU, against the masked one in fp64."""

import pytest
import torch
from torch import nn

pytest.importorskip("em_kernels.training.trainer")  # pip install '.[train]'
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
