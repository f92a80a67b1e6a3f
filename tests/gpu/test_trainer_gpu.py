"""Whole runs on a GPU in each mode, and their peak memory against the plan."""

import gc
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("em_kernels.training.trainer")  # pip install '.[train]'
sys.path.append(str(Path(__file__).parents[1]))
from training.tiny import read, run, save_tiny, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

MODES = {
    "full": {"mode": "full"},
    "full, bf16 state": {"mode": "full", "moments": "bf16", "gradients": "bf16"},
    "offload": {"mode": "offload"},
    "recomputed": {"mode": "offload", "gradient_checkpointing": True},
    "lora": {"mode": "lora", "lr": 1e-2},
}


@pytest.mark.parametrize("name", [*MODES, "offload_dir", "4bit"])
def test_entropy_falls(name, tmp_path):
    changes = MODES.get(name, {})
    if name == "offload_dir":
        changes = {"mode": "offload", "offload_dir": tmp_path / "scratch"}
    if name == "4bit":
        pytest.importorskip("bitsandbytes")
        changes = {"mode": "lora", "four_bit": True, "lr": 1e-2}
    wide = {"hidden_size": 128, "intermediate_size": 256}
    folder = save_tiny(tmp_path / "model", dtype=torch.bfloat16, **wide)
    config = settings(
        folder, tmp_path / "run", steps=6, rollouts=16, lr=3e-3, device="cuda", dtype="bfloat16"
    ).model_copy(update=changes)
    metrics = run(config).metrics
    assert metrics[-1]["entropy"] < 0.95 * metrics[0]["entropy"]
    assert read(tmp_path / "run" / "metrics.jsonl") == metrics


def test_full_and_offload_are_the_same_training(tmp_path):
    folder = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    found = {}
    for mode in ("full", "offload"):
        config = settings(folder, tmp_path / mode, steps=3, device="cuda", dtype="bfloat16")
        config = config.model_copy(update={"mode": mode, "rollouts_from": None})
        if found:
            config = config.model_copy(update={"rollouts_from": tmp_path / "full"})
        found[mode] = [row["entropy"] for row in run(config).metrics]
    assert found["offload"] == pytest.approx(found["full"], rel=0.01)


def test_peak_is_within_5_percent_of_the_plan(tmp_path):
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    folder = save_tiny(tmp_path / "model", "qwen2", dtype=torch.bfloat16, tied=False, **shape)
    gc.collect()  # of earlier tests
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = settings(folder, tmp_path / "run", steps=2, rollouts=64, device="cuda")
    config = config.model_copy(update={"dtype": "bfloat16", "micro_batch": "auto"})
    row = run(config).metrics[-1]
    assert row["peak_memory_gib"] == pytest.approx(row["planned_memory_gib"], rel=0.05)
