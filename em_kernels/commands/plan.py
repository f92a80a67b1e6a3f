"""`em-kernels plan`: what a run needs, and whether this machine or another has it."""

import argparse
import json
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from ..training.config import TrainConfig
from ..training.console import Terminal
from ..training.distributed import ENGINES, LaunchSpec
from ..training.interrupts import doing
from ..training.models.loading import architecture, in_short
from ..training.planning.plan import GIB, PHASES, Plan, phases
from ..training.planning.planner import Planner
from ..training.settings import UserError
from ..training.task import check_context
from .flags import as_flags, train_settings

HELP = """Nothing but the model's config.json is read: --model may also name that file. More flags:
--prompt-tokens N, of the prompt's length (128); --json, everything as JSON; --ranks N, of as many
processes on a machine, with --engine fsdp2 or deepspeed where these divide the model, and --on-host
where they keep the optimizer's state there.

For another machine: --gpu-memory and --host-memory take GiB, of which a card sold with 24 GB has 22
to 23.5, and no GPU need be here. Example: em-kernels plan --model Qwen/Qwen2.5-Math-7B
--gpu-memory 22.5 --host-memory 89"""
CAUTION = (
    "Entropy minimisation is sensitive to the prompt and the seed; a plan promises that a run "
    "fits, not that the model gets better."
)
PINNED = ("mode", "four_bit", "offload_dir", "moments", "gradients")


def run(arguments: list[str]) -> int:
    """Print what a run needs; 0 if the chosen mode fits, 1 if it does not."""
    before = argparse.ArgumentParser(prog="em-kernels plan", add_help=False, allow_abbrev=False)
    before.add_argument("--json", action="store_true")
    before.add_argument("--prompt-tokens", type=int, default=128)
    before.add_argument("--ranks", type=int, default=1)
    before.add_argument("--engine", choices=ENGINES, default=ENGINES[0])
    before.add_argument("--on-host", action="store_true")
    known, rest = before.parse_known_args(arguments)
    config, _ = train_settings("plan", rest, HELP)
    for name in ("prompt_tokens", "ranks"):
        if getattr(known, name) < 1:
            raise UserError(f"{name}: must be at least 1")
    if known.on_host and known.engine == ENGINES[0]:
        raise UserError("on_host: goes with an engine; replicas have --mode offload")
    world = LaunchSpec(known.ranks, known.ranks, known.engine, known.on_host)
    model_config = open_config(config.model)
    longest = known.prompt_tokens, config.sampling.max_new_tokens
    check_context(model_config, *longest, "prompt_tokens: are", "lower it")
    there = torch.cuda.is_available() or config.gpu_memory is not None
    device = torch.device("cuda" if config.device != "cpu" and there else "cpu")
    if config.device == "cuda":
        device = torch.device("cuda")
    what = f"planning memory of {architecture(model_config)}"
    with Terminal(stderr=True).status("running the model's shapes"), doing(what):
        download = download_bytes(config.model)
        planner = Planner(config, model_config, known.prompt_tokens, device, download, world=world)
        modes, chosen = planner.modes(), planner.choose()
    command = shlex.join([*launcher(world), "train", *as_flags(command_of(config, chosen))])
    if known.json:
        plans = [as_json(plan) for plan in modes]
        found = {"modes": plans, "chosen": as_json(chosen), "command": command, "note": CAUTION}
        print(json.dumps(found, indent=2))
    else:
        show(Terminal(), modes, chosen, command)
        if world.ranks > 1:
            print(f"All of this is of one of {world.ranks} processes on one machine.")
    return 0 if chosen.fits else 1


def launcher(world: LaunchSpec) -> list[str]:
    """The words that a launch command begins with."""
    if world == LaunchSpec():
        return ["em-kernels"]
    options = {
        "replicas": ["--multi_gpu"] if world.ranks > 1 else [],
        "fsdp2": ["--use_fsdp", "--fsdp_version", "2"],
        "deepspeed": ["--use_deepspeed", "--zero_stage", "2"],
    }[world.engine]
    if world.on_host and world.engine == "fsdp2":
        options += ["--fsdp_offload_params", "true"]
    elif world.on_host:
        options += ["--offload_optimizer_device", "cpu"]
    count = ["--num_processes", str(world.ranks)]
    return ["accelerate", "launch", *count, *options, "-m", "em_kernels.cli"]


def open_config(model: str) -> PreTrainedConfig:
    """Raises: UserError where there is none."""
    if not model:
        raise UserError('model: missing; name a hub id, a local folder, a config.json, or "demo"')
    if model == "demo":
        return LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            dtype="float32",
        )
    path = Path(model).expanduser()
    if model.startswith((".", "/", "~")) and not path.exists():
        raise UserError(f"model: there is no {model}")
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers and the hub client raise many kinds
        raise UserError(f"model: cannot open {model!r}: {in_short(error)}") from error


def download_bytes(model: str) -> int | None:
    """Bytes of weights to download; 0 if they are here, None if the hub does not tell."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if model == "demo" or Path(model).expanduser().exists():
        return 0
    names = ("model.safetensors", "model.safetensors.index.json")
    if any(isinstance(try_to_load_from_cache(model, name), str) for name in names):
        return 0
    try:
        files = HfApi().model_info(model, files_metadata=True, timeout=5).siblings or []
    except Exception:  # offline, most likely
        return None
    return sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))


def command_of(config: TrainConfig, chosen: Plan) -> TrainConfig:
    """The user's settings, with what the plan chose that changes the result or where it is kept."""
    changes: dict[str, Any] = {name: getattr(chosen.config, name) for name in PINNED}
    path = Path(config.model)
    if path.suffix == ".json":
        changes["model"] = str(path.parent)
    if config.prompt is None and config.prompt_from is None:
        changes["prompt"] = "YOUR PROMPT"
    return config.model_copy(update=changes)


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes and seconds."""
    found = {**vars(plan), "config": plan.config.model_dump(mode="json")}
    found["rates"] = plan.rates._asdict()
    names = ("name", "fits", "problems", "device_total", "host_total", "run_seconds")
    return {name: getattr(plan, name) for name in names} | {"phases": phases(plan.device)} | found


def show(console: Console, modes: list[Plan], chosen: Plan, command: str) -> None:
    """The table of modes, what the chosen one is made of, and its command."""
    one = not chosen.host
    columns = ["mode", "memory" if one else "device", "host", "disk", "micro-batch", "rollouts"]
    table = Table(*columns, "update", "run", "fits", title=f"{chosen.config.model}: GiB, minutes")
    for plan in modes:
        sizes = [plan.device_total, plan.host_total, sum(plan.disk.values()) + plan.download]
        seconds = [sum(plan.seconds.values()), plan.run_seconds]
        table.add_row(
            plan.name,
            *(f"{size / GIB:.1f}" for size in sizes),
            f"{plan.config.micro_batch} tokens",
            f"{plan.config.rollout_batch} at once",
            *(f"{s / 60:.1f}" for s in seconds),
            "yes" if plan.fits else "no",
        )
    console.print(table)
    parts = Table(f"mode {chosen.name}", "GiB", "", title="What it is made of")
    for name, size in chosen.device.items():
        when = [phase for phase, members in PHASES.items() if name in members]
        text = f"in {' and '.join(when)}" if when else "" if one else "device"
        if size >= GIB // 1000:
            parts.add_row(name, f"{size / GIB:.2f}", text)
    for where, elsewhere in (("host", chosen.host), ("disk", chosen.disk)):
        for name, size in elsewhere.items():
            if size >= GIB // 1000:
                parts.add_row(name, f"{size / GIB:.2f}", where)
    console.print(parts)
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    there = f"memory {chosen.device_limit / GIB:.1f} GiB"
    say("There:", there if one else f"device {there}, host {chosen.host_limit / GIB:.1f} GiB")
    often = ", ".join(f"{name} {s:.1f}" for name, s in chosen.seconds.items())
    once = ", ".join(f"{name} {s:.1f}" for name, s in chosen.once.items())
    new, r = chosen.config.sampling.max_new_tokens, chosen.rates
    say(f"Seconds of an update, at most, of {new} new tokens each: {often}. Once: {once}.")
    say(
        f"As {r.flops / 1e12:g} TFLOP/s, {r.bandwidth / 1e9:g} GB/s of device memory, "
        f"{r.pcie / 1e9:g} to the host, {r.host / 1e9:g} in AdamW there, {r.disk / 1e9:g} of disk, "
        f"{r.download / 1e9:g} of download, {r.layers:g} layers/s when sampling: "
        + ("two cores of a processor." if one else "a 24 GB card such as an RTX 3090 or 4090.")
    )
    if chosen.fits:
        say(f"Mode {chosen.name} fits. To run it:\n\n{command}\n")
    else:
        say(f"Mode {chosen.name} does not fit: {'; '.join(chosen.problems)}.")
        say(f"It would with {', or with '.join(chosen.remedies) or 'a smaller model'}.")
    say(CAUTION)
