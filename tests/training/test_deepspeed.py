"""DeepSpeed ZeRO-2 on two CPU processes against one."""

import json
from importlib.util import find_spec

import pytest
from training.processes import (
    RUNS,
    assert_same_run,
    example_run,
    flags,
    in_other_orders,
    launched,
    left,
    run_all,
    torchrun,
)

pytestmark = pytest.mark.slow
ZERO = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 10**6}}
OFFLOAD = {
    "zero_optimization": {**ZERO["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
}


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    """Return the environment of a launcher on CPUs, with a folder of its own for compiled code."""
    if find_spec("deepspeed") is None:
        pytest.skip("no deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
    home = tmp_path_factory.mktemp("deepspeed")

    def environment(config):
        path = home / f"{len(json.dumps(config))}.json"
        path.write_text(json.dumps(config))
        return {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
            "TORCH_EXTENSIONS_DIR": str(home / "extensions"),
        }

    return environment


@pytest.mark.parametrize("offload", [False, True])
def test_deepspeed_equals_one_process(deepspeed, folders, tmp_path, offload):
    run_all("deepspeed", folders, tmp_path, 600, **deepspeed(OFFLOAD if offload else ZERO))
    for name, (tied, _) in RUNS["deepspeed"].items():
        others = in_other_orders("deepspeed", name, folders, tmp_path, tmp_path)
        found, expected = left(tmp_path / name), left(tmp_path / "alone" / name)
        assert_same_run(found, expected, others, tied, half=name == "half")
        if name == "tied":
            assert_same_run(left(tmp_path / "again"), found, others, tied)


def test_deepspeed_example(deepspeed, folders, tmp_path):
    extensions = deepspeed(ZERO)["TORCH_EXTENSIONS_DIR"]
    code, out, err = example_run(
        "8-gpus-zero2-offload", folders[True], tmp_path, TORCH_EXTENSIONS_DIR=extensions
    )
    assert code == 0, err
    assert out.splitlines()[-1] == "run/checkpoints/step-00002"


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage 3 is not supported"),
        ({"zero_optimization": {"stage": 1}}, "stage 1 is not supported: each process would hold"),
        ({**ZERO, "optimizer": {"type": "AdamW"}}, "leave optimizer out of its configuration"),
    ],
)
def test_deepspeed_refusals(deepspeed, folders, tmp_path, config, line):
    command = ("-m", "em_kernels.cli", "train", *flags(folders[True], "run"))
    code, _, err = launched(torchrun(), *command, where=tmp_path, **deepspeed(config))
    assert code != 0 and line in err and not (tmp_path / "run").exists()
