"""`em-kernels plan`: the memory, disk and time that a run needs, and whether a machine has them."""

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
from ..training.models import gguf
from ..training.models.demo_model import ARCHITECTURE
from ..training.models.loading import architecture, in_short
from ..training.planning.gpus import BANDWIDTH_SHARE, CARDS, PRODUCTS_SHARE, find_card
from ..training.planning.plan import CPU_RATES, GIB, PHASES, Plan, phases
from ..training.planning.planner import Planner
from ..training.settings import UserError
from ..training.task import check_context
from .flags import as_flags, train_settings

HELP = f"""Plans memory, disk and time from the model's config.json, which --model may also name, or
from the header of a GGUF file. More flags:
  --gpu NAME         plan for this card: {", ".join(CARDS)}
  --prompt-tokens N  length of the prompt (default: 128)
  --json             print everything as JSON
  --ranks N          plan for one of N processes on one machine (default: 1)
  --engine NAME      fsdp2 or deepspeed, if one of these shards the model
  --on-host          that engine keeps the optimizer's state in host memory

For another machine: --gpu and --host-memory, which takes GiB; for another card --gpu-memory takes
GiB. No GPU is needed here. Without them, a CPU's speed is measured, which takes some seconds.

Examples:
  em-kernels plan --model Qwen/Qwen2.5-Math-7B --gpu 4090 --host-memory 89
  em-kernels plan --model Qwen/Qwen2.5-Math-7B --gpu-memory 46 --host-memory 120"""
CAUTION = """Entropy minimisation is sensitive to the prompt and the seed; a plan promises that a \
run fits, not that the model gets better."""


def run(arguments: list[str]) -> int:
    """Print what a run needs; return 0 if the chosen mode fits, 1 if it does not."""
    parser = argparse.ArgumentParser(prog="em-kernels plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gpu")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0])
    parser.add_argument("--on-host", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    config, _ = train_settings("plan", rest, HELP)
    config.check_mode()
    for name in ("prompt_tokens", "ranks"):
        if getattr(known, name) < 1:
            raise UserError(f"{name}: must be at least 1")
    if known.on_host and known.engine == ENGINES[0]:
        raise UserError(
            "on_host: goes with --engine fsdp2 or deepspeed; without one, use --mode offload"
        )
    card = None if known.gpu is None else find_card(known.gpu)
    if card is not None and config.gpu_memory is not None:
        raise UserError("gpu: brings its own memory; leave out gpu_memory, or gpu")
    if card is not None and config.device == "cpu":
        raise UserError("gpu: does not go with device cpu; leave out one of them")
    launch = LaunchSpec(known.ranks, known.ranks, known.engine, known.on_host)
    model_config = open_config(config.model)
    tokens, new_tokens = known.prompt_tokens, config.sampling.max_new_tokens
    check_context(model_config, tokens, new_tokens, "prompt_tokens:", "lower it")
    cuda = torch.cuda.is_available() or (card or config.gpu_memory) is not None
    kind = config.device if config.device != "auto" else "cuda" if cuda else "cpu"
    what = f"planning memory of {architecture(model_config)}"
    with Terminal(stderr=True).status("running the model's shapes"), doing(what):
        download = download_bytes(config.model)
        device = torch.device(kind)
        here = config.host_memory is None  # else it is another machine that is planned for
        planner = Planner(config, model_config, tokens, device, download, 0, launch, here, card)
        modes, chosen = planner.modes(), planner.choose()
    command = shlex.join([*launcher(launch), "train", *as_flags(command_of(config, chosen))])
    if known.json:
        found = {"modes": list(map(as_json, modes)), "chosen": as_json(chosen)}
        print(json.dumps({**found, "command": command, "note": CAUTION}, indent=2))
    else:
        show(Terminal(), modes, chosen, command)
        if launch.ranks > 1:
            print(f"Everything above is for one of {launch.ranks} processes on one machine.")
    return 0 if chosen.fits else 1


def launcher(launch: LaunchSpec) -> list[str]:
    """Return the beginning of the command that launches these processes."""
    if launch == LaunchSpec():
        return ["em-kernels"]
    options, on_host = {
        "replicas": ("--multi_gpu" if launch.ranks > 1 else "", ""),
        "fsdp2": ("--use_fsdp --fsdp_version 2", "--fsdp_offload_params true"),
        "deepspeed": ("--use_deepspeed --zero_stage 2", "--offload_optimizer_device cpu"),
    }[launch.engine]
    flags = f"--num_processes {launch.ranks} {options} {on_host if launch.on_host else ''}"
    return ["accelerate", "launch", *flags.split(), "-m", "em_kernels.cli"]


def open_config(model: str) -> PreTrainedConfig:
    """Open the config of a model, or a config.json; UserError if that is not possible."""
    if not model:
        known = 'a hub id, a local folder, a config.json, a GGUF file, or "demo"'
        raise UserError(f"model: missing; name {known}")
    if model == "demo":
        return LlamaConfig(**ARCHITECTURE)
    path = Path(model).expanduser()
    if model.startswith((".", "/", "~")) and not path.exists():
        raise UserError(f"model: there is no {model}")
    if path.suffix == gguf.SUFFIX and not path.is_dir():
        return gguf.read_config(path)
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers and the hub client raise many kinds
        raise UserError(f"model: cannot open {model!r}: {in_short(error)}") from error


def download_bytes(model: str) -> int | None:
    """Return the bytes of weights to download: 0 if they are here, None if the hub cannot say."""
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
    """Return the user's settings for the printed command, with mode and precisions as planned."""
    pinned = ("mode", "four_bit", "offload_dir", "moments", "gradients")
    changes: dict[str, Any] = {name: getattr(chosen.config, name) for name in pinned}
    path = Path(config.model)
    if path.suffix == ".json":
        changes["model"] = str(path.parent)
    if config.prompt is None and config.prompt_from is None:
        changes["prompt"] = "YOUR PROMPT"
    return config.model_copy(update=changes)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values, in bytes and seconds."""
    names = ("name", "fits", "problems", "device_total", "host_total", "run_seconds")
    found = {name: getattr(plan, name) for name in names} | {"phases": phases(plan.device)}
    settings, rates = plan.config.model_dump(mode="json"), plan.rates._asdict()
    return {**found, **vars(plan), "config": settings, "rates": rates}


def show(console: Console, modes: list[Plan], chosen: Plan, command: str) -> None:
    """Print a table of the modes, the components of the chosen one, and its command."""
    shared = not chosen.host  # on a CPU, where host and device share their memory
    columns = ["mode", "memory" if shared else "device", "host", "disk", "micro-batch", "rollouts"]
    title = f"{chosen.config.model}: sizes in GiB, times in minutes"
    table = Table(*columns, "update", "run", "fits", title=title)
    for plan in modes:
        sizes = [plan.device_total, plan.host_total, sum(plan.disk.values()) + plan.download]
        batches = f"{plan.config.micro_batch} tokens", f"{plan.config.rollout_batch} at once"
        seconds = [sum(plan.seconds.values()), plan.run_seconds]
        cells = [f"{size / GIB:.1f}" for size in sizes]
        cells += [*batches, *(f"{s / 60:.1f}" for s in seconds), "yes" if plan.fits else "no"]
        table.add_row(plan.name, *cells)
    console.print(table)
    parts = Table(f"mode {chosen.name}", "GiB", "", title="Components")
    places = ("" if shared else "device", "host", "disk")
    for where, part in zip(places, (chosen.device, chosen.host, chosen.disk), strict=True):
        for name, size in part.items():
            when = [phase for phase, members in PHASES.items() if name in members]
            if size >= GIB // 1000:
                place = f"in {' and '.join(when)}" if when else where
                parts.add_row(name, f"{size / GIB:.2f}", place)
    console.print(parts)
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    limits, r = f"memory {chosen.device_limit / GIB:.1f} GiB", chosen.rates
    known, launches = "Measured on this processor", ""
    if shared and r == CPU_RATES:
        known = "Assuming two cores of a processor"
    if not shared:
        limits = f"device {limits}, host {chosen.host_limit / GIB:.1f} GiB"
        known = (
            f"Assuming {PRODUCTS_SHARE:.0%} of the published products and {BANDWIDTH_SHARE:.0%} of "
            f"the published bandwidth of one {chosen.card} (no GPU has confirmed this)"
        )
        launches = f"; {r.launches:g} launches/s in sampling"
    each, once = (
        ", ".join(f"{name} {s:.1f}" for name, s in seconds.items())
        for seconds in (chosen.seconds, chosen.once)
    )
    full = f"{chosen.config.sampling.max_new_tokens} tokens"
    say(f"Available: {limits}")
    say(f"Seconds of an update in which all completions reach {full}: {each}. Once: {once}.")
    say(
        f"{known}: {r.flops / 1e12:.3g} TFLOP/s in training, {r.sampled_flops / 1e12:.3g} in "
        f"sampling, which reads {r.read / 1e9:.3g} GB/s and chooses from {r.entries / 1e6:.0f} "
        f"million vocabulary entries/s; {r.bandwidth / 1e9:.3g} GB/s of device memory, "
        f"{r.host / 1e9:.3g} in AdamW on the host. "
        f"Assuming also {r.pcie / 1e9:g} GB/s between host and device, {r.disk / 1e9:g} of disk, "
        f"{r.download / 1e9:g} of download{launches}."
    )
    if chosen.fits:
        say(f"Mode {chosen.name} fits. To run it:\n\n{command}\n")
    else:
        say(f"Mode {chosen.name} does not fit: {'; '.join(chosen.problems)}.")
        say(f"It would fit with {', or with '.join(chosen.remedies) or 'a smaller model'}.")
    say(CAUTION)
