"""Plans against known arithmetic, to the byte: what fits, what is filled in, what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training.shapes import QWEN, SMALL, two_layers
from transformers import AutoConfig

from em_kernels.commands.plan import open_config
from em_kernels.ops.gemm import bf16_isa
from em_kernels.ops.memory import TILE
from em_kernels.training.config import TrainConfig
from em_kernels.training.planning.activations import ModelMemory
from em_kernels.training.planning.components import fixed_bytes, logit_row_bytes
from em_kernels.training.planning.plan import GIB, phases
from em_kernels.training.planning.planner import Planner
from em_kernels.training.settings import UserError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def config(**changes):
    return TrainConfig(**{"model": "m", "prompt": "p", **changes})


@pytest.fixture(scope="module", params=QWEN)
def model(request):
    """Return a planner for a 24 GB card and 96 GB of RAM, and known figures of the model."""
    planner = Planner(config(gpu_memory=22.5, host_memory=89.4), QWEN[request.param], 128, CUDA)
    figures = {
        "7B": (7_615_616_512, 14.19, 113.5, 200_704, 57_344, 608_256),
        "1.5B": (1_543_714_304, 2.88, 23.0, 86_016, 28_672, 607_744),
    }
    names = ("count", "weights", "adamw", "kept", "cache", "logits")
    return SimpleNamespace(
        name=request.param,
        planner=planner,
        **dict(zip(names, figures[request.param], strict=True)),
    )


def always(planner, **changes):
    complete = {"dtype": "bfloat16", "moments": "fp32", "gradients": "fp32", **changes}
    asked = planner.config.model_copy(update=complete)
    return fixed_bytes(asked, planner.model_memory(asked), planner.cuda)


def test_weights_and_state_to_the_byte(model):
    sizes = model.planner.model_memory(config()).sizes
    assert sizes.weight_bytes == 2 * model.count and sizes.trained_parameters == model.count
    device, host, _ = always(model.planner, mode="full", gradients="bf16")
    assert device["weights"] / GIB == pytest.approx(model.weights, abs=0.005)
    names = ("weights", "master", "moments", "gradients")
    assert sum(device[name] for name in names) == 16 * model.count
    assert 16 * model.count / GIB == pytest.approx(model.adamw, abs=0.05)
    for moments, gradients, each in (("bf16", "fp32", 12), ("bf16", "bf16", 10)):
        device, host, disk = always(
            model.planner, mode="offload", moments=moments, gradients=gradients
        )
        assert not {"master", "moments", "gradients"} & device.keys() and not disk
        assert sum(host[name] for name in names[1:]) == each * model.count
    _, host, disk = always(model.planner, mode="offload", moments="bf16", offload_dir="d")
    assert sum(disk.values()) == 8 * model.count and host["gradients"] == 4 * model.count


def test_activations_and_cache_to_the_byte(model):
    memory = model.planner.model_memory(config())
    rows, prompt, new = 3, 40, 25
    few, more = (net.run(rows, prompt, new, False, True)[1] for net in memory.models)
    a_layer = more - few
    assert a_layer * memory.layers == model.kept * rows * (prompt + new - 1)
    assert memory.cache_bytes(640) == 640 * model.cache
    assert logit_row_bytes(memory, cuda=False) == model.logits


only_7b = pytest.mark.parametrize("model", ["7B"], indirect=True)


@only_7b
def test_lora_and_nf4(model):
    for rank, size in ((16, 0.68), (64, 2.71)):
        device, host, _ = always(model.planner, mode="lora", lora_rank=rank)
        state = sum(device[name] for name in ("adapters", "master", "moments", "gradients"))
        assert state == 18 * rank * 28 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
        assert state / GIB == pytest.approx(size, abs=0.05)
    device, _, _ = always(model.planner, mode="lora", four_bit=True)
    assert device["weights"] / GIB == pytest.approx(5.17, abs=0.005)


def of_mode(planner, **changes):
    return planner.plan(planner.config.model_copy(update=changes))


@pytest.mark.parametrize("model", ["1.5B"], indirect=True)
def test_1_5b_trains_in_full_on_a_24_gb_card(model):
    planner = model.planner
    plan = planner.choose()
    assert plan.name == "full" and plan.fits and plan.device_limit == 22.5 * GIB
    assert (plan.config.moments, plan.config.lr) == ("bf16", 2e-5)
    exact = of_mode(planner, mode="full", moments="fp32")
    assert not exact.fits and exact.missing.keys() == {"device"}
    # A GEMM of whole tiles; beyond that chunks take what the head's phase has to spare.
    per_row = logit_row_bytes(planner.model_memory(plan.config), cuda=True)
    assert plan.config.chunk_bytes >= TILE * per_row
    passing = phases(plan.device)
    at_least = plan.config.chunk_bytes == TILE * per_row
    assert at_least or passing["head"] <= max(passing["sampling"], passing["backward"])


@only_7b
def test_7b_is_offloaded_from_a_24_gb_card(model):
    planner = model.planner
    plan = planner.choose()
    assert plan.name == "offload" and plan.fits
    assert (plan.config.moments, plan.config.gradients) == ("bf16", "fp32")
    assert 18 * GIB < plan.device_total <= plan.device_limit
    assert plan.config.micro_batch >= 4096 and plan.config.rollout_batch >= 32
    assert plan.config.gradient_checkpointing is True and plan.config.dtype == "bfloat16"
    assert plan.device_total == sum(
        plan.device[name] for name in ("weights", "buffers", "context", "fragments", "spare")
    ) + max(phases(plan.device).values())
    assert phases(plan.device)["sampling"] > 64 * 640 * 57_344
    full = of_mode(planner, mode="full")
    assert not full.fits and full.config.moments == full.config.gradients == "bf16"
    assert full.device_total > 12 * model.count


@only_7b
def test_64_gb_of_host_memory_take_a_folder(model):
    planner = model.planner
    host, planner.host_limit = planner.host_limit, int(59.6 * GIB)
    planner.plans.clear()
    try:
        for gradients in ("fp32", "bf16"):
            plan = of_mode(planner, mode="offload", gradients=gradients)
            assert plan.missing.keys() == {"host"}
        assert of_mode(planner, mode="offload", offload_dir="d").fits
    finally:
        planner.host_limit = host
        planner.plans.clear()


@pytest.fixture(scope="module")
def small():
    return AutoConfig.for_model("qwen2", tie_word_embeddings=True, **SMALL)


SHORT = {"sampling": {"max_new_tokens": 40}}


def test_settings_are_filled_in(small):
    plan = Planner(config(**SHORT), small, 20, CPU).resolve()
    left = [name for name, value in plan.config if value == "auto" and name != "device"]
    assert not left and plan.fits
    chosen = plan.config
    dtype = "bfloat16" if bf16_isa() else "float32"
    assert (chosen.mode, chosen.dtype, chosen.lr) == ("full", dtype, 2e-5)
    assert (chosen.moments, chosen.gradients) == ("fp32", "fp32")
    assert chosen.micro_batch <= 1024 and chosen.rollout_batch == 64
    assert chosen.gradient_checkpointing is False and chosen.save_optimizer is True
    assert (plan.device["master"] == 0) == (dtype == "float32") and not plan.host
    assert Planner(chosen, small, 20, CPU).resolve().config == chosen


def test_what_the_user_fixed_stays(small):
    fixed = {
        "micro_batch": 100,
        "rollout_batch": 24,
        "gradient_checkpointing": True,
        "moments": "bf16",
        "gradients": "bf16",
        "dtype": "bfloat16",
        "chunk_bytes": 123_456,
        "lr": 1e-3,
        "save_optimizer": False,
    }
    plan = Planner(config(**fixed, **SHORT), small, 20, CPU).resolve()
    assert {name: getattr(plan.config, name) for name in fixed} == fixed
    count = plan.device["weights"] // 2
    names = ("weights", "master", "moments", "gradients")
    assert [plan.device[name] for name in names] == [2 * count, 4 * count, 4 * count, 2 * count]


@pytest.mark.parametrize(
    "device, gib", [pytest.param(CPU, None, marks=pytest.mark.slow), (CUDA, 15)]
)
def test_fp16_takes_what_bf16_takes_and_a_bf16_copy_to_save(device, gib):
    exact = {"moments": "fp32", "gradients": "fp32", "save_optimizer": False}
    asked = config(mode="full", gpu_memory=gib, host_memory=8, **exact, **SHORT)
    found = [
        Planner(asked.model_copy(update={"dtype": dtype}), two_layers(), 20, device).resolve()
        for dtype in ("float16", "bfloat16")
    ]
    names = ("weights", "master", "moments", "gradients", "scratch")
    half, same = ([plan.device[name] for name in names] for plan in found)
    assert half == same and half[1] == 2 * half[0]
    if gib:
        assert found[0].host["saving"] == half[0]
    else:
        assert found[0].device["bf16 copy"] > half[0] and not found[1].device["bf16 copy"]


def test_prompts_are_shared_where_that_is_faster():
    """Offload sends all gradients to the host after each shared prompt, here for few tokens."""
    limits = {"gpu_memory": 8.0, "host_memory": 8.0, "mode": "offload"}
    one = Planner(config(**limits), two_layers(), 8, CUDA)
    assert one.plan(one.config).config.share_prefix is True
    rows = {"prompt_from": Path("p.jsonl"), "prompt": None, "prompt_rows": tuple(range(32))}
    several = Planner(config(**limits, **rows), two_layers(), 8, CUDA)
    several.models = one.models  # what is measured of them
    plan = several.plan(several.config)
    shared = several.plan(several.config.model_copy(update={"share_prefix": True}))
    assert shared.config.share_prefix is True  # the user's word holds
    assert plan.config.share_prefix is False
    assert sum(plan.seconds.values()) < sum(shared.seconds.values())


def test_lora_has_its_own_lr(small):
    plan = Planner(config(mode="lora", **SHORT), small, 20, CPU).resolve()
    assert plan.config.lr == 2e-4
    a_layer = 16 * (2 * 128 + 2 * 96 + 3 * 224)
    assert plan.device["adapters"] == 2 * 8 * a_layer


def test_batches_shrink_with_memory():
    sizes = []
    for gib in (0.58, 0.55):
        asked = config(gpu_memory=gib, host_memory=8, mode="full", **SHORT)
        plan = Planner(asked, two_layers(), 20, CUDA).resolve()
        assert plan.device_total <= plan.device_limit == int(gib * GIB)
        sizes.append((plan.config.micro_batch, plan.config.rollout_batch))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1


@pytest.mark.parametrize(
    "changes, remedy",
    [
        ({"micro_batch": 10**6, "rollouts": 300}, "--micro-batch auto"),
        ({"rollout_batch": 3000, "rollouts": 3000}, "--rollout-batch auto"),
    ],
)
def test_refusals_name_what_is_missing_and_what_helps(changes, remedy):
    asked = config(mode="full", gpu_memory=0.56, host_memory=8, **changes, **SHORT)
    message = rf"^memory: mode full: \d\.\d+ GiB of device memory are missing \(.*; try {remedy}$"
    with pytest.raises(UserError, match=message):
        Planner(asked, two_layers(), 20, CUDA).resolve()


def test_remedies_in_the_order_of_their_cost():
    shape = {**SMALL, "num_hidden_layers": 2, "hidden_size": 1024, "vocab_size": 100_000}
    model_config = AutoConfig.for_model("llama", **shape)
    asked = config(mode="offload", moments="fp32", gradients="fp32", gpu_memory=8, host_memory=4.5)
    with pytest.raises(UserError, match="^memory: mode offload: .* of host memory") as raised:
        Planner(asked, model_config, 20, CUDA).resolve()
    assert str(raised.value).endswith(
        "try --moments bf16, or --gradients bf16, or --mode offload --offload-dir DIR"
    )


def test_no_remedy():
    with pytest.raises(UserError, match="take a smaller model"):
        Planner(config(gpu_memory=0.4, host_memory=8, **SHORT), two_layers(), 20, CUDA).resolve()


def test_planning_for_a_gpu_without_one():
    if torch.cuda.is_available():
        pytest.skip("a CUDA GPU is there")
    with pytest.raises(UserError, match="^gpu_memory: "):
        Planner(config(), two_layers(), 20, CUDA).resolve()


def test_the_demo_is_planned_as_it_is(demo):
    """A plan uses the architecture that stands in the code, and fetches nothing."""
    planned = ModelMemory(open_config("demo"), torch.float32).sizes
    model, _ = demo
    assert planned.weight_bytes == sum(p.nbytes for p in model.parameters())
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(open_config("demo"), name) == getattr(model.config, name)
