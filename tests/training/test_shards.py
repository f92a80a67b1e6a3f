"""Plans for one of several processes."""

import json

import pytest
import torch
from training.shapes import QWEN

from em_kernels.commands.plan import launcher
from em_kernels.commands.plan import run as plan_command
from em_kernels.training.config import TrainConfig
from em_kernels.training.distributed import LaunchSpec
from em_kernels.training.planning.plan import GIB
from em_kernels.training.planning.planner import Planner, sharded_settings
from em_kernels.training.settings import UserError

CUDA = torch.device("cuda")
SMALL = {"steps": 2, "sampling": {"max_new_tokens": 64}}


def plan(launch, **changes):
    asked = {"model": "m", "prompt": "p", "gpu_memory": 40, "host_memory": 480, **SMALL, **changes}
    return Planner(TrainConfig(**asked), QWEN["1.5B"], 128, CUDA, launch=launch).choose()


def test_replicas_divide_completions_and_the_host():
    one, four = plan(LaunchSpec()), plan(LaunchSpec(4, 4))
    assert (one.config.rollout_batch, four.config.rollout_batch) == (64, 16)
    assert (one.host_limit, four.host_limit) == (480 * GIB, 120 * GIB)
    assert one.device["weights"] == four.device["weights"]
    assert one.seconds["training"] == pytest.approx(4 * four.seconds["training"], rel=0.2)
    assert plan(LaunchSpec(8, 4)).host_limit == 120 * GIB  # two machines


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_engines_divide_state(engine):
    trained = 1_543_714_304  # parameters of Qwen2.5-1.5B, whose head is tied
    plans = {ranks: plan(LaunchSpec(ranks, ranks, engine), gpu_memory=80) for ranks in (2, 8)}
    for ranks, found in plans.items():
        assert found.device["master"] == 4 * trained // ranks
        assert found.device["moments"] == 8 * trained // ranks
        assert found.device["gradients"] == 4 * trained // ranks
        assert found.device["weights"] == 2 * trained
    off = plan(LaunchSpec(8, 8, engine, on_host=True), gpu_memory=80)
    assert off.host["master"] == 4 * trained // 8 and "master" not in off.device
    assert off.fits and not off.config.share_prefix
    assert (off.config.mode, off.config.moments, off.config.gradients) == ("full", "fp32", "fp32")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"mode": "lora"}, "mode"),
        ({"mode": "offload"}, "mode"),
        ({"moments": "bf16"}, "moments"),
        ({"gradients": "bf16"}, "gradients"),
        ({"four_bit": True}, "four_bit"),
        ({"offload_dir": "x"}, "offload_dir"),
        ({"kl_weight": 0.1}, "kl_weight"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_sharded_settings_another_engine_are_refused(changes, name):
    with pytest.raises(UserError, match=f"^{name}: "):
        sharded_settings(TrainConfig(**changes), "fsdp2")


def test_remedies_are_of_the_engine():
    short = plan(LaunchSpec(2, 2, "fsdp2"), gpu_memory=12, micro_batch=16384)
    assert not short.fits
    assert not any("mode" in words or "moments" in words for words in short.remedies)


def test_command(tmp_path, capsys):
    QWEN["1.5B"].save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path / "config.json"), "--gpu-memory", "40", "--host-memory", "480"]
    flags += ["--json", "--ranks", "8", "--engine", "deepspeed", "--on-host"]
    assert plan_command(flags) == 0
    command = json.loads(capsys.readouterr().out)["command"]
    assert command.startswith(
        "accelerate launch --num_processes 8 --use_deepspeed --zero_stage 2 "
        "--offload_optimizer_device cpu -m em_kernels.cli train --model"
    )
    assert launcher(LaunchSpec()) == ["em-kernels"]
    for wrong in (["--ranks", "0"], ["--on-host"]):
        with pytest.raises(UserError):
            plan_command(["--model", str(tmp_path), *wrong])
