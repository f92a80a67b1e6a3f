"""Plans for a named card: what they assume of it, what is refused, what sampling on it costs."""

import json

import pytest
import torch
from rich.console import Console
from training.shapes import QWEN, SMALL, two_layers
from training.tiny import make_model
from transformers import AutoConfig

from em_kernels.commands import plan
from em_kernels.training.config import Sampling, TrainConfig
from em_kernels.training.planning.activations import ModelMemory, _Launches
from em_kernels.training.planning.batch_sizes import CHOICE_LAUNCHES
from em_kernels.training.planning.gpus import (
    BANDWIDTH_SHARE,
    CARDS,
    DEFAULT,
    PRODUCTS_SHARE,
    card_of,
    gpu_rates,
)
from em_kernels.training.planning.plan import GIB
from em_kernels.training.planning.planner import Planner
from em_kernels.training.rollouts.sampling import generate
from em_kernels.training.settings import UserError

CUDA = torch.device("cuda")
NAMES = {card.name: name for name, card in CARDS.items()}
FLAGS = ["--host-memory", "8", "--max-new-tokens", "40", "--prompt-tokens", "20"]
FLAGS += ["--micro-batch", "960", "--rollout-batch", "64", "--gradient-checkpointing", "False"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    two_layers().save_pretrained(path)
    return path


def planner(name, models, **changes):
    """Return a planner of a small model; `models` are shared, so that each is measured once."""
    asked = {"model": "m", "prompt": "p", "host_memory": 8, "mode": "full", "micro_batch": 960}
    asked |= {"rollout_batch": 64, "gradient_checkpointing": False, **changes}
    asked["sampling"] = {"max_new_tokens": 40, **asked.get("sampling", {})}
    found = Planner(TrainConfig(**asked), two_layers(), 20, CUDA, card=CARDS[name])
    found.models = models.setdefault(found.dtype, {})
    return found


def test_every_card_has_its_memory_speed_and_dtype():
    models = {}
    for name, card in CARDS.items():
        found = planner(name, models).resolve()
        assert found.device_limit == card.usable_gib * GIB and found.card == card.name
        assert found.rates.flops == found.rates.sampled_flops == PRODUCTS_SHARE * card.tflops * 1e12
        assert found.rates.read == found.rates.bandwidth == BANDWIDTH_SHARE * card.gb_per_s * 1e9
        assert (found.config.dtype == "float16") == (name == "t4")


def test_more_bandwidth_or_products_never_take_longer():
    models = {}
    for slower, faster in (("3090", "4090"), ("4090", "5090"), ("a100-40", "a100-80")):
        seconds = [sum(planner(n, models).resolve().seconds.values()) for n in (slower, faster)]
        assert seconds[0] >= seconds[1] > 0


def test_a_card_that_torch_knows_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for card in (*CARDS.values(), DEFAULT._replace(name="NVIDIA GeForce RTX 4090 Laptop GPU")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=card.name: name)
        assert card_of(CUDA) == CARDS.get(NAMES.get(card.name), DEFAULT)


def test_command(folder, capsys):
    arguments = ["--model", str(folder), "--gpu", "4090", *FLAGS]
    assert plan.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["card"] == CARDS["4090"].name
    assert found["chosen"]["device_limit"] == 22.5 * GIB
    # The run takes what is free on the card then.
    assert "--gpu" not in found["command"] and found["chosen"]["config"]["gpu_memory"] is None
    found = planner("4090", {}).resolve()
    plan.show(Console(), [found], found, "")
    text = capsys.readouterr().out
    assert CARDS["4090"].name in text and "82.6 TFLOP/s" in text and "no GPU has" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "3080"], f"^gpu: '3080' is unknown; choose one of {', '.join(CARDS)}$"),
        (["--gpu", "3090", "--gpu-memory", "20"], "^gpu: .*gpu_memory"),
        (["--gpu", "3090", "--device", "cpu"], "^gpu: .*cpu"),
    ],
)
def test_refusals(flags, message, folder):
    with pytest.raises(UserError, match=message):
        plan.run(["--model", str(folder), *FLAGS, *flags])


def test_launches_are_those_of_the_model_and_of_the_choice(tokenizer):
    """Operations of the sampling loop on a real model; Sampling() has every step of the choice."""
    model = make_model("qwen2", vocab_size=267)
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    prompts, counts = [[5, 6, 7]] * 3, []
    for new in (8, 16):
        with _Launches() as launched:
            sampling = Sampling(max_new_tokens=new)
            done = generate(model, tokenizer, prompts, [(0, i) for i in range(3)], sampling)
        assert all(len(x.response_ids) == new for x in done)
        counts.append(launched.count)
    step, planned = (counts[1] - counts[0]) / 8, ModelMemory(model.config, torch.float32).launches
    assert planned < step <= planned + CHOICE_LAUNCHES


def test_launches_of_a_layer():
    """40 of a layer of Qwen2's; 4 more for each of its 7 linear layers with an adapter."""
    config = AutoConfig.for_model("qwen2", **SMALL)
    for lora, each in ((None, 40), (TrainConfig(), 68)):
        memory = ModelMemory(config, torch.bfloat16, lora=lora)
        few, more = (model.launches() for model in memory.models)
        assert more - few == each and memory.launches - few == each * (config.num_hidden_layers - 2)


def test_sampling_seconds_add_up():
    """Where the device is slower than Python: weights or products, keys and values, the choice."""
    new, rollouts, models = 40, 64, {}
    found = planner("3060", models, rollouts=rollouts)
    chosen, memory = found.resolve(), next(iter(models[torch.bfloat16].values()))
    slow = found.card._replace(gb_per_s=0.01, tflops=1e-6)
    rates = gpu_rates(slow, chosen.config.sampling, memory.vocab_size)
    found.card, found.plans = slow, {}
    matrices, token = memory.sizes.matrix_parameters, memory.cache_bytes(20) // 20
    kept = sum(20 + t for t in range(new)) + 20 + new  # read at each token; written once
    seconds = [
        max(new * 2 * matrices / rates.read, rollouts * new * 2 * matrices / rates.flops),
        rollouts * kept * token / rates.bandwidth,
        rollouts * new * memory.vocab_size / rates.entries,
    ]
    assert found.resolve().seconds["sampling"] == pytest.approx(sum(seconds), rel=0.02)
    # Python launches a step's operations in one time, however fast the device is.
    found.card, found.plans = slow._replace(gb_per_s=1e6, tflops=1e6), {}
    launched = new * (memory.launches + CHOICE_LAUNCHES) / rates.launches
    assert found.resolve().seconds["sampling"] == pytest.approx(launched)


@pytest.mark.slow
def test_1_5b_on_a_16_gb_card_without_bf16():
    asked = TrainConfig(model="m", prompt="p", host_memory=60)
    found = Planner(asked, QWEN["1.5B"], 128, CUDA, card=CARDS["t4"])
    fits = {mode.name: mode.fits for mode in found.modes()}
    assert fits == {"full": False} | dict.fromkeys([*fits][1:], True)
    assert found.choose().name == "offload" and found.dtype == torch.float16
