"""Micro-batches without padding, on a reference of flash-attn, against padded ones with sdpa."""

import flash_reference
import pytest
import torch
from training.test_step import ROLLOUTS, assert_same
from training.tiny import PLAIN, loss_and_gradients, make_model, make_tokenizer, settings

from em_kernels.training.engines.packing import can_pack
from em_kernels.training.engines.step import micro_batches
from em_kernels.training.models.loading import FLASH, attention_of
from em_kernels.training.rollouts.sampling import Rollout, generate


def with_flash_attention(kind, monkeypatch):
    flash_reference.install(monkeypatch)
    model = make_model(kind, dtype=torch.float64)
    model.config._attn_implementation = FLASH
    return model


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_packed_rows_give_the_padded_ones_loss(kind, share, recompute, tmp_path, monkeypatch):
    changes = {"share_prefix": share, "gradient_checkpointing": recompute, "official_loss": False}
    config = settings("-", tmp_path, **changes)
    expected, truth = loss_and_gradients(make_model(kind, dtype=torch.float64), ROLLOUTS, config)
    model, shapes = with_flash_attention(kind, monkeypatch), []
    assert can_pack(model)
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, args: shapes.append(tuple(args[0].shape[:2]))
    )
    loss, gradients = loss_and_gradients(model, ROLLOUTS, config, micro_batch=14)
    assert {rows for rows, _ in shapes} == {1} and max(tokens for _, tokens in shapes) <= 14
    assert loss.entropy == pytest.approx(expected.entropy, rel=1e-9)
    assert_same(gradients, truth, 1e-9)


def test_a_model_that_ignores_lengths_is_padded(monkeypatch):
    model = with_flash_attention("llama", monkeypatch)
    layer = model.model.layers[1].self_attn
    attend = layer.forward

    def forward(*arguments, cu_seq_lens_q=None, cu_seq_lens_k=None, position_ids=None, **options):
        return attend(*arguments, **options)

    monkeypatch.setattr(layer, "forward", forward)
    assert not can_pack(model)
    assert not can_pack(make_model())  # sdpa


def test_sampling_leaves_flash_attention_out(monkeypatch):
    model, tokenizer = with_flash_attention("qwen2", monkeypatch), make_tokenizer()
    sampling, prompts = PLAIN.model_copy(update={"temperature": 0}), [[5, 6, 7], [5, 6, 7, 8]]
    found, expected = (
        generate(x, tokenizer, prompts, [[0], [1]], sampling)
        for x in (model, make_model("qwen2", dtype=torch.float64))
    )
    assert found == expected and model.config._attn_implementation == FLASH


def test_packed_micro_batches_do_not_count_padding():
    rollouts = [Rollout([1] * 5, [2] * n, False) for n in (1, 1, 1, 20)]
    assert [len(b) for b in micro_batches(rollouts, 24, 5, packed=True)] == [4]
    assert [len(b) for b in micro_batches(rollouts, 24, 5)] == [3, 1]


def test_auto_takes_flash_attention_where_the_model_has_it():
    config = make_model().config
    assert attention_of("auto", config, flash=True) == FLASH
    assert attention_of("auto", config) == attention_of("sdpa", config, flash=True) == "sdpa"
