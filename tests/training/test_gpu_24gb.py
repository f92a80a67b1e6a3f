"""The proof of the 24 GB claim, as a dry run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from gpu_24gb import PARTS, SHAPES, save_task  # noqa: E402


def script(name, *arguments):
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def parameters(config) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


@pytest.mark.parametrize(("size", "count"), [("7B", 7_615_616_512), ("1.5B", 1_543_714_304)])
def test_shapes_are_the_models(size, count, tmp_path):
    save_task(tmp_path, size, dry_run=False)
    config = AutoConfig.from_pretrained(tmp_path)
    assert parameters(config) == count
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == config.vocab_size  # out of reach
    assert len(tokenizer("a b" * 7).input_ids) == 21


def test_dry_run_fills_the_results_and_skips_what_is_there(tmp_path):
    path = tmp_path / "24gb.json"
    ran = script("gpu_24gb.py", "--dry-run", "--results", path)
    assert ran.returncode == 0, ran.stderr
    content = json.loads(path.read_text())
    assert content["parts"].keys() == PARTS.keys()
    for name, row in content["parts"].items():
        assert "skipped" not in row, row
        assert row["updates"] and row["updates"][-1]["tokens"] == 8 * 8  # none ended early
        assert row["device_peak_gib"] > 0 and row["host_peak_gib"] > 0
        assert row["planned_device_gib"] >= 0 and sum(row["planned_parts_gib"].values()) > 0
        assert name in ran.stdout
    assert content["parts"]["7B offload"]["moments"] == "bf16"

    del content["parts"]["7B lora"]
    path.write_text(json.dumps(content))
    ran = script("gpu_24gb.py", "--dry-run", "--results", path)
    assert ran.returncode == 0, ran.stderr
    again = json.loads(path.read_text())["parts"]
    assert ran.stdout.count("--again") == 3 and "7B lora: device peak" in ran.stdout
    assert again.pop("7B lora") and again == content["parts"]


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("a CUDA GPU is there")
    ran = script("gpu_24gb.py")
    assert (ran.returncode, ran.stdout) == (2, "") and "Traceback" not in ran.stderr
    assert "sees no CUDA GPU" in ran.stderr.splitlines()[-1]
