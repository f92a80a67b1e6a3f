"""Engines on CUDA GPUs, up to two of them over NCCL, against one process without a launcher."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("em_kernels.training.trainer")  # pip install '.[train]'
from training.processes import FSDP2, flags, launched
from training.tiny import read, save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ON_GPU = ("--device", "cuda", "--dtype", "bfloat16", "--lr", "1e-5", "--no-share-prefix")


@pytest.mark.parametrize(("engine", "env"), [("replicas", {}), ("fsdp2", FSDP2)])
def test_engines_equal_one_process(tmp_path, engine, env):
    folder = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    alone = [sys.executable, "-m", "em_kernels.cli", "train", *flags(folder, "one", *ON_GPU)]
    subprocess.run(alone, cwd=tmp_path, check=True)
    count = str(min(2, torch.cuda.device_count()))
    code, _, err = launched(
        ("torchrun", "--standalone", "--nproc-per-node", count, "-m", "em_kernels.cli"),
        *("train", *flags(folder, "run", *ON_GPU, "--rollouts-from", "one")),
        where=tmp_path,
        **env,
    )
    assert code == 0, err[-4000:]
    expected, found = (read(tmp_path / name / "metrics.jsonl") for name in ("one", "run"))
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    config = json.loads((tmp_path / "run/checkpoints/step-00002/config.json").read_text())
    assert config["dtype"] == "bfloat16"
