"""Train models of the shapes of Qwen2.5-Math-7B and 1.5B in 24 GB, on a CUDA GPU of any size; make
gpu-24gb runs it.

Each part runs in a process of its own, limited to 22 GiB of the device, with random bf16 weights.
An update has 64 completions of 128 + 512 tokens, none of which ends early: the worst case. Parts
that the results file has are not run again; one that does not fit is reported as skipped.
"""

import argparse
import importlib.util
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import em_kernels
from benchmarks import store
from benchmarks.inputs import PROMPT
from benchmarks.loops import EachUpdate
from em_kernels.ops.free_memory import peak_memory_gib
from em_kernels.training.config import Sampling, TrainConfig
from em_kernels.training.planning.planner import Planner
from em_kernels.training.settings import UserError
from em_kernels.training.trainer import train

GIB = 2**30
CAP_GIB = 22.0  # The CUDA context and a desktop take the rest of 24.
PART_SECONDS = 45.0  # A part starts another update only if that should end in time.


class Shape(NamedTuple):
    """Sizes of a Qwen2 model."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


SHAPES = {
    "7B": Shape(3584, 18944, 28, 28, 4, 152064, False),
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151936, True),
}
DRY_SHAPE = Shape(64, 128, 2, 4, 2, 512, True)
PARTS = {
    "7B offload": {"mode": "offload", "moments": "bf16"},
    "7B lora": {"mode": "lora"},
    "1.5B offload": {"mode": "offload"},
    "1.5B full": {"mode": "full"},
}


class Enough(BaseException):
    """Stops a part's training; not an Exception, after which train would save the model."""


def save_task(folder: Path, size: str, dry_run: bool) -> None:
    """Write a config and a byte tokenizer, but no weights.

    The tokenizer's EOS lies beyond the vocabulary, so that no completion ends early.
    """
    shape = DRY_SHAPE._replace(tied=SHAPES[size].tied) if dry_run else SHAPES[size]
    AutoConfig.for_model(
        "qwen2",
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
    ).save_pretrained(folder)
    tokens = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))}
    tokens["<|endoftext|>"] = shape.vocab
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def run_part(name: str, dry_run: bool, folder: Path) -> dict:
    """Run a part and return its result, or {"skipped": why} if it does not fit."""
    size, device = name.split()[0], torch.device("cpu" if dry_run else "cuda")
    rollouts, prompt, new, seconds = (8, 16, 8, 1.0) if dry_run else (64, 128, 512, PART_SECONDS)
    began, cap_gib = time.perf_counter(), CAP_GIB
    if not dry_run:
        free, total = torch.cuda.mem_get_info()
        cap_gib = min(cap_gib, free / GIB)
        torch.cuda.set_per_process_memory_fraction(cap_gib * GIB / total)
    save_task(folder, size, dry_run)
    asked = TrainConfig(
        model=str(folder),
        prompt=PROMPT[:prompt],
        chat_template=False,
        output=folder / "run",
        steps=1000,
        rollouts=rollouts,
        sampling=Sampling(max_new_tokens=new),
        save_at=(),
        save_optimizer=False,
        device=device.type,
        dtype="bfloat16",
        gpu_memory=cap_gib,
        **PARTS[name],
    )
    model_config = AutoConfig.from_pretrained(folder)
    try:
        plan = Planner(asked, model_config, prompt, device).resolve()
    except UserError as error:
        return {"skipped": str(error)}
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    rows, started = list[dict](), time.perf_counter()

    def done(row: dict) -> None:
        rows.append(row)
        now = time.perf_counter()
        if now - began + (now - started) / len(rows) > seconds:
            raise Enough

    with suppress(Enough):
        train(asked, model=model, console=Console(file=EachUpdate(asked.output, done)))
    found = {
        "moments": plan.config.moments,
        "gradients": plan.config.gradients,
        "cap_gib": cap_gib,
        "before_s": started - began,
        "device_peak_gib": rows[-1]["peak_memory_gib"],
        "planned_device_gib": plan.allocated / GIB,
        "host_peak_gib": peak_memory_gib(torch.device("cpu")),
        "planned_host_gib": plan.host_total / GIB,
        "planned_parts_gib": {key: round(n / GIB, 3) for key, n in plan.device.items()},
        "updates": rows,
        "versions": {"em_kernels": em_kernels.__version__, "torch": torch.__version__},
    }
    if not dry_run:
        free, total = torch.cuda.mem_get_info()
        beside = total - free - torch.cuda.memory_reserved()  # the context, and a desktop
        found["device_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        found["device_used_gib"] = found["device_reserved_gib"] + beside / GIB
    return {key: round(x, 2) if isinstance(x, float) else x for key, x in found.items()}


def in_own_process(name: str, dry_run: bool) -> dict:
    """Run a part in a process of its own. A dry run forks, which is quicker; CUDA forbids it."""
    if name.endswith("lora") and importlib.util.find_spec("peft") is None:
        return {"skipped": "peft is not installed"}
    context = multiprocessing.get_context("forkserver" if dry_run else "spawn")
    if dry_run:
        context.set_forkserver_preload(["em_kernels.training.trainer"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            with ProcessPoolExecutor(1, context) as pool:
                return pool.submit(run_part, name, dry_run, Path(folder)).result()
        except (UserError, torch.OutOfMemoryError, BrokenProcessPool) as error:
            return {"skipped": f"failed: {type(error).__name__}: {error}"}


def line_of(name: str, row: dict) -> str:
    if "skipped" in row:
        return f"{name}: skipped: {row['skipped']}"
    last = row["updates"][-1]
    used = f" ({row['device_used_gib']} in use)" if "device_used_gib" in row else ""
    return (
        f"{name}: device peak {row['device_peak_gib']} GiB{used}, planned "
        f"{row['planned_device_gib']}; host peak {row['host_peak_gib']}, planned "
        f"{row['planned_host_gib']}; {last['update']} updates, the last: sampling "
        f"{last['sampling_s']:.1f} s, training {last['training_s']:.1f} s, "
        f"{last['tokens_per_s']:.0f} tokens/s"
    )


def main(arguments: list[str]) -> int:
    """Run the parts; return 0 when done, 1 if one failed, 2 for an error the user can mend."""
    program = "python -m benchmarks.gpu_24gb"
    parser = argparse.ArgumentParser(program, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--again", action="store_true", help="also run parts that the results file has"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="two small layers on the CPU, to test the script"
    )
    parser.add_argument(
        "--results", type=Path, help="file to add to (default: results/24gb-<device>.json)"
    )
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_24gb: error: torch sees no CUDA GPU; --dry-run needs none", file=sys.stderr)
        return 2
    kind, failed = "cpu" if options.dry_run else "cuda", False
    folder = Path("runs") if options.dry_run else store.RESULTS
    path = options.results or folder / f"24gb-{store.path_of(kind).name}"
    try:
        stored = store.load(path)["parts"] if path.exists() else {}
        for name in PARTS:
            if "skipped" not in stored.get(name, {"skipped": ""}) and not options.again:
                print(f"{name}: in {path}; --again measures it again")
                continue
            row = in_own_process(name, options.dry_run)
            print(line_of(name, row), flush=True)
            failed |= row.get("skipped", "").startswith("failed")
            store.merge(path, kind, "parts", {name: row})
    except store.BenchError as error:
        print(f"gpu_24gb: error: {error}", file=sys.stderr)
        return 2
    print(f"written to {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
