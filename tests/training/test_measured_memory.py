"""Planned memory against what steps, heads and whole runs allocate."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from training import tiny
from training.shapes import SMALL
from transformers import AutoConfig, AutoModelForCausalLM

from em_kernels.ops import chunked, inputs
from em_kernels.ops.gemm import bf16_isa
from em_kernels.ops.weight_gradient import StreamedWeightGrad
from em_kernels.streamed_loss import divergence_into, entropy_loss_into
from em_kernels.training import run as run_module
from em_kernels.training.config import Sampling, TrainConfig
from em_kernels.training.engines.shared_prefix import SharedPrefix
from em_kernels.training.engines.step import recomputation, scored_states
from em_kernels.training.models import rounding
from em_kernels.training.planning.activations import ModelMemory
from em_kernels.training.planning.components import (
    CPU_PROCESS_BYTES,
    completion_bytes,
    head_bytes,
)
from em_kernels.training.planning.plan import peak
from em_kernels.training.rollouts.sampling import Rollout, generate

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def config(**changes):
    return TrainConfig(**{"model": "m", "prompt": "p", **changes})


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
        pytest.param("qwen2", torch.bfloat16, {}, False, marks=pytest.mark.slow),
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
        states = scored_states(model, batch, begun)
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0}, {}, {"top_k": 0}, {"top_k": 0, "top_p": 1}, {"top_k": 19_990}],
    ids=["greedy", "top-k", "top-p", "all", "top-k of nearly all"],
)
def test_sampling(changes, dtype):
    model_config = AutoConfig.for_model("llama", **SMALL | {"vocab_size": 20000})
    model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    sampling, rows, prompt = Sampling(max_new_tokens=40, **changes), 16, [1] * 30
    asked, memory = config(sampling=sampling), ModelMemory(model_config, dtype)
    each = completion_bytes(asked, memory, len(prompt), cuda=False)
    seeds = [(1, row) for row in range(rows)]
    tokenizer = tiny.make_tokenizer()
    _, live = recorded(lambda: generate(model, tokenizer, [prompt] * rows, seeds, sampling))
    assert max(live) == pytest.approx(rows * sum(each.values()), rel=0.1)


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


@pytest.mark.parametrize("states", [20, 300])
def test_logits_of_both_models(states):
    """A penalty holds two logits a state, also where all fit into the budget."""
    words, width, chunk = 20000, 64, 1 << 26
    model_config = AutoConfig.for_model(
        "llama", **{**SMALL, "vocab_size": words, "hidden_size": width}
    )
    asked = config(mode="full", grad_tolerance=0, kl_weight=0.1)
    planned = head_bytes(asked, ModelMemory(model_config, torch.float32), states, chunk, cuda=False)
    hidden, weight, ref_hidden, ref_weight = (
        torch.randn(n, width) for n in (states, words, states, words)
    )
    _, live = recorded(
        lambda: divergence_into(
            lambda words, values: None, hidden, weight, ref_hidden, ref_weight, chunk_bytes=chunk
        )
    )
    assert 0.7 * planned <= max(live) <= 1.05 * planned


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
    "fp16": ("qwen2", False, {"dtype": "float16", "micro_batch": 10**6}),
    "lora": ("llama", False, {"mode": "lora"}),
    "penalty": ("llama", True, {"kl_weight": 0.5}),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "tied" else pytest.param(n, marks=pytest.mark.slow) for n in RUNS],
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
    moving = peak(found.device)
    planned = found.device_total - CPU_PROCESS_BYTES - found.device["fragments"]
    assert stays == pytest.approx(planned - moving, rel=0.05)
    assert most == pytest.approx(planned, rel=0.05)
    assert most - stays == pytest.approx(moving, rel=0.1)
