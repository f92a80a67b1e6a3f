"""Plans against known arithmetic, to the byte, and against the recorded memory of real runs."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from training import tiny
from training.shapes import QWEN, SMALL, two_layers
from transformers import AutoConfig, AutoModelForCausalLM

from em_kernels.commands.plan import open_config
from em_kernels.functional import entropy_loss_into
from em_kernels.ops import chunked, inputs
from em_kernels.ops.gemm import bf16_isa
from em_kernels.ops.weight_gradient import StreamedWeightGrad
from em_kernels.training import run as run_module
from em_kernels.training.config import Sampling, TrainConfig
from em_kernels.training.engines.step import SharedPrefix, recomputation, scored_states
from em_kernels.training.models import rounding
from em_kernels.training.planning import planner
from em_kernels.training.planning.activations import ModelMemory
from em_kernels.training.planning.components import fixed_bytes, head_bytes, logit_row_bytes
from em_kernels.training.planning.plan import GIB, phases
from em_kernels.training.planning.planner import Planner
from em_kernels.training.rollouts.sampling import Rollout
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
    for rank, size in ((16, 0.6), (64, 2.4)):
        device, host, _ = always(model.planner, mode="lora", lora_rank=rank)
        state = sum(device[name] for name in ("adapters", "moments", "gradients"))
        assert device["master"] == 0 and state == 16 * rank * 28 * (
            4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944)
        )
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


@only_7b
def test_7b_is_offloaded_from_a_24_gb_card(model):
    planner = model.planner
    plan = planner.choose()
    assert plan.name == "offload" and plan.fits
    assert (plan.config.moments, plan.config.gradients) == ("bf16", "fp32")
    assert 18 * GIB < plan.device_total <= plan.device_limit
    assert plan.config.micro_batch >= 4096 and plan.config.rollout_batch == 64
    assert plan.config.gradient_checkpointing is True and plan.config.dtype == "bfloat16"
    assert plan.device_total == sum(
        plan.device[name] for name in ("weights", "buffers", "context", "fragments")
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


@pytest.fixture(autouse=True, scope="module")
def measurements():
    """Measure each model once: that takes seconds and depends on nothing else."""
    kept, real = {}, planner.ModelMemory

    def measured(model_config, *others):
        key = [model_config.to_json_string(use_diff=False)]
        key += [(x.lora_rank, x.lora_targets) if isinstance(x, TrainConfig) else x for x in others]
        key = tuple(key)
        return kept.get(key) or kept.setdefault(key, real(model_config, *others))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "ModelMemory", measured)
        yield


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


def test_lora_has_its_own_lr(small):
    plan = Planner(config(mode="lora", **SHORT), small, 20, CPU).resolve()
    assert plan.config.lr == 2e-4
    a_layer = 16 * (2 * 128 + 2 * 96 + 3 * 224)
    assert plan.device["adapters"] == 4 * 8 * a_layer


def test_batches_shrink_with_memory():
    sizes = []
    for gib in (0.56, 0.53):
        asked = config(gpu_memory=gib, host_memory=8, mode="full", **SHORT)
        plan = Planner(asked, two_layers(), 20, CUDA).resolve()
        assert plan.device_total <= plan.device_limit == int(gib * GIB)
        sizes.append((plan.config.micro_batch, plan.config.rollout_batch))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1


@pytest.mark.parametrize(
    "changes, remedy",
    [
        ({"micro_batch": 10**6, "rollouts": 600}, "--micro-batch auto"),
        ({"rollout_batch": 600, "rollouts": 600}, "--rollout-batch auto"),
    ],
)
def test_refusals_name_what_is_missing_and_what_helps(changes, remedy):
    asked = config(mode="full", gpu_memory=0.54, host_memory=8, **changes, **SHORT)
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


def recorded(function):
    """Return each allocation and the bytes in memory after it; earlier allocations do not count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    sizes = [event.nbytes() for event in memory]
    return sizes, list(itertools.accumulate(sizes))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    "kind, dtype, options, shared",
    [
        ("qwen2", torch.bfloat16, {}, True),
        ("qwen2", torch.bfloat16, {}, False),
        ("gemma2", torch.float32, {"head_dim": 16, "query_pre_attn_scalar": 16}, False),
        ("gpt2", torch.float32, {}, False),  # its layers are Conv1D
    ],
)
def test_activations_to_the_byte(kind, dtype, options, shared, recompute):
    attention = "eager" if kind == "gemma2" else "sdpa"
    model_config = AutoConfig.for_model(kind, **SMALL, **options)
    memory = ModelMemory(model_config, dtype, attention)
    assert memory.can_share_prefix == (kind != "gemma2")  # not with a sliding window
    assert 0 < memory.sizes.largest_linear < memory.sizes.linear_parameters
    rows, prompt, new = 4, 20, 40
    found = memory.activations(rows, prompt, new, shared, recompute)
    model = AutoModelForCausalLM.from_config(
        model_config, dtype=dtype, attn_implementation=attention
    ).eval()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = [Rollout([1] * prompt, [2] * new, False)] * rows

    def step():
        begun = SharedPrefix(model, batch[0].prompt_ids) if shared else None
        states = scored_states(model, batch, begun, False)
        states = states if begun is None else torch.cat([begun.last, states])
        assert len(states) == found.head_rows
        states.backward(torch.zeros_like(states))
        del states
        if begun is not None:
            begun.backward()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a CPU's attention takes memory for each thread
    try:  # oneDNN would repack weights on some CPUs
        with recomputation(model, recompute), torch.backends.mkldnn.flags(enabled=False):
            _, live = recorded(step)
    finally:
        torch.set_num_threads(threads)
    assert max(live) == pytest.approx(found.peak, rel=1e-4)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("words, width, states, chunk", [(20000, 64, 300, 28), (9000, 512, 90, 22)])
def test_head(words, width, states, chunk, trained):
    shape = {**SMALL, "vocab_size": words, "hidden_size": width}
    model_config = AutoConfig.for_model("llama", **shape)
    asked = config(dtype="float32", mode="full" if trained else "lora", grad_tolerance=0)
    memory = ModelMemory(model_config, torch.float32)
    planned = head_bytes(asked, memory, states, 1 << chunk, cuda=False)
    hidden, weight = torch.randn(states, width), torch.randn(words, width)
    sink = (lambda words, values: None) if trained else None
    mask = torch.ones(states, dtype=torch.float64)
    _, live = recorded(
        lambda: entropy_loss_into(sink, hidden, weight, mask=mask, chunk_bytes=1 << chunk)
    )
    assert max(live) == pytest.approx(planned, rel=0.05)


@pytest.mark.skipif(bf16_isa() == 0, reason="this CPU multiplies no bf16")
@pytest.mark.parametrize("states", [20, 33, 50, 300])  # one chunk, four, more
def test_head_on_a_gpu_where_dy_of_chunks_waits(states, monkeypatch):
    """Run the GPU's loop on the CPU: its memory stays within the plan and the budget."""
    words, width, chunk = 20000, 64, 1 << 22
    shape = {**SMALL, "vocab_size": words, "hidden_size": width}
    model_config = AutoConfig.for_model("llama", **shape)
    changes = {"dtype": "bfloat16", "grad_tolerance": 0, "gpu_memory": 8.0, "host_memory": 8.0}
    asked = config(mode="full", **changes)
    memory = ModelMemory(model_config, torch.bfloat16)
    planned = head_bytes(asked, memory, states, chunk, cuda=True)
    monkeypatch.setattr(inputs.HeadInputs, "dy_has_own_buffer", True)
    monkeypatch.setattr(chunked, "TILE", 8)
    hidden, weight = (torch.randn(n, width, dtype=torch.bfloat16) for n in (states, words))
    counts, add_all = [], StreamedWeightGrad.add_all

    def counted(sink, dy, *arguments):
        counts.append(len(dy))
        add_all(sink, dy, *arguments)

    monkeypatch.setattr(StreamedWeightGrad, "add_all", counted)
    _, live = recorded(
        lambda: entropy_loss_into(lambda words, values: None, hidden, weight, chunk_bytes=chunk)
    )
    assert max(live) <= 1.05 * planned
    assert counts == {20: [20], 33: [33], 50: [50], 300: [68] * 4 + [28]}[states]


MARK = 12_345_677  # bytes
RUNS = {
    "tied": ("llama", True, {}),
    "recomputed": ("qwen2", False, {"gradient_checkpointing": True, "micro_batch": 10**6}),
    "not shared": ("llama", True, {"share_prefix": False, "micro_batch": 10**6}),
    "bf16": (
        "qwen2",
        False,
        {"dtype": "bfloat16", "moments": "bf16", "gradients": "bf16", "micro_batch": 10**6},
    ),
    "lora": ("llama", False, {"mode": "lora"}),
}


@pytest.mark.parametrize(
    "name",
    [n if n in ("tied", "lora") else pytest.param(n, marks=pytest.mark.slow) for n in RUNS],
)
def test_whole_runs_within_5_percent(name, tmp_path, monkeypatch):
    """Memory from the second update on: what stays, and the peak of what comes and goes."""
    kind, tied, changes = RUNS[name]
    shape = {"hidden_size": 192, "intermediate_size": 500, "num_hidden_layers": 4}
    source = tiny.save_tiny(tmp_path / "model", kind, tied=tied, **shape)
    asked = tiny.settings(
        source,
        tmp_path / "run",
        sampling=Sampling(max_new_tokens=60),
        chat_template=False,
        **{"micro_batch": 120, "rollout_batch": 6, **changes},
    )
    monkeypatch.setattr(rounding, "_noise", {})  # earlier tests have filled it
    plan = []
    update = run_module.Run.update

    def marked(run, number, stop):
        if number == 2:
            plan.append(run.plan)
            torch.empty(MARK, dtype=torch.uint8)
        update(run, number, stop)

    monkeypatch.setattr(run_module.Run, "update", marked)
    dtype = getattr(torch, asked.dtype)

    def whole():
        tiny.run(asked, tiny.make_model(kind, tied=tied, dtype=dtype, **shape))

    sizes, live = recorded(whole)
    start = sizes.index(MARK)
    stays, most = live[start - 1], max(live[start + 2 :])
    (found,) = plan
    moving = max(phases(found.device).values())
    assert stays == pytest.approx(found.device_total - moving, rel=0.05)
    assert most == pytest.approx(found.device_total, rel=0.05)
    assert most - stays == pytest.approx(moving, rel=0.1)


def test_the_demo_is_planned_as_it_is(demo):
    """A plan uses the architecture that stands in the code, and fetches nothing."""
    planned = ModelMemory(open_config("demo"), torch.float32).sizes
    model, _ = demo
    assert planned.weight_bytes == sum(p.nbytes for p in model.parameters())
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(open_config("demo"), name) == getattr(model.config, name)
