"""Dry runs of make gpu-24gb."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import store
from benchmarks.gpu_24gb import PARTS, main, save_task

ROOT = Path(__file__).parents[2]


def parameters(config) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


@pytest.mark.parametrize(("size", "count"), [("7B", 7_615_616_512), ("1.5B", 1_543_714_304)])
def test_shapes_are_the_models(size, count, tmp_path):
    save_task(tmp_path, size, dry_run=False)
    config = AutoConfig.from_pretrained(tmp_path)
    assert parameters(config) == count
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == config.vocab_size  # no token that the model can sample
    assert len(tokenizer("a b" * 7).input_ids) == 21


@pytest.mark.slow
def test_dry_run_fills_the_results_and_leaves_what_is_there(tmp_path):
    path, there = tmp_path / "24gb.json", {"device_peak_gib": 1.0}
    store.merge(path, "cpu", "parts", {"1.5B full": there, "7B lora": {"skipped": "no memory"}})
    command = [sys.executable, "-m", "benchmarks.gpu_24gb", "--dry-run", "--results", path]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stderr
    parts = store.load(path)["parts"]
    assert parts.pop("1.5B full").items() >= there.items() and "1.5B full: in" in ran.stdout
    assert parts.keys() | {"1.5B full"} == PARTS.keys()
    for name, row in parts.items():
        assert "skipped" not in row, row
        assert f"{name}: device peak" in ran.stdout
        assert [update["tokens"] for update in row["updates"]] == [8 * 8] * len(row["updates"]) > []
        assert row["device_peak_gib"] > 0 and row["host_peak_gib"] > 0
        assert row["planned_device_gib"] > 0 and sum(row["planned_parts_gib"].values()) > 0
    assert parts["7B offload"]["moments"] == "bf16"


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA GPU is there")
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "sees no CUDA GPU" in err
