"""Proof that Qwen2.5-Math-7B and 1.5B train on 24 GB: make gpu-24gb, on a CUDA GPU of any size.

Every part in a process of its own, held to 22 GiB of the device: random bf16 weights of the exact
shape, updates of 64 completions of 128 + 512 tokens, none of which ends early: the worst case.
Parts that are in the results file are not run again; one that does not fit is named.
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
from em_kernels.training.planning.planner import resolve
from em_kernels.training.settings import UserError
from em_kernels.training.trainer import train

GIB = 2**30
CAP_GIB = 22.0  # the context and a desktop take the rest of 24
SECONDS = 45.0  # of a part: another update is begun where it will end in time
SHAPES = {  # Qwen2.5-Math's: hidden, MLP, layers, heads, KV heads, vocabulary, tied
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
}
SMALL = (64, 128, 2, 4, 2, 512)  # instead of the first of these, in a dry run
PARTS = {
    "7B offload": {"mode": "offload", "moments": "bf16"},
    "7B lora": {"mode": "lora"},
    "1.5B offload": {"mode": "offload"},
    "1.5B full": {"mode": "full"},
}


class Enough(BaseException):
    """The part's time is over; not an Exception, after which train would save the model."""


def save_task(folder: Path, size: str, dry_run: bool) -> None:
    """A folder with config and tokenizer, of bytes; no weights. No logit is the end's."""
    hidden, mlp, layers, heads, kv_heads, vocab = SMALL if dry_run else SHAPES[size][:-1]
    AutoConfig.for_model(
        "qwen2",
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=SHAPES[size][-1],
        max_position_embeddings=4096,
    ).save_pretrained(folder)
    words = {word: i for i, word in enumerate(sorted(ByteLevel.alphabet()))}
    words["<|endoftext|>"] = vocab
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def run_part(name: str, dry_run: bool, folder: Path) -> dict:
    """The stored result of a part; {"skipped": why} where it does not fit."""
    size, device = name.split()[0], torch.device("cpu" if dry_run else "cuda")
    rollouts, prompt, new, seconds = (8, 16, 8, 1.0) if dry_run else (64, 128, 512, SECONDS)
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
        plan = resolve(asked, model_config, prompt, device)
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
        beside = total - free - torch.cuda.memory_reserved()  # context; a desktop, if there is one
        found["device_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        found["device_used_gib"] = found["device_reserved_gib"] + beside / GIB
    return {key: round(x, 2) if isinstance(x, float) else x for key, x in found.items()}


def in_own_process(name: str, dry_run: bool) -> dict:
    """A dry run forks, which is quick; after a fork CUDA may not be there."""
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
    """0 done, 1 a part failed, 2 the user can mend it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--again", action="store_true", help="also parts that were measured")
    parser.add_argument("--dry-run", action="store_true", help="two small layers on the CPU")
    parser.add_argument("--results", type=Path, help="file, instead of results/24gb-<device>.json")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_24gb: error: torch sees no CUDA GPU; --dry-run needs none", file=sys.stderr)
        return 2
    kind, failed = "cpu" if options.dry_run else "cuda", False
    usual = Path("runs") if options.dry_run else store.RESULTS
    path = options.results or usual / f"24gb-{store.path_of(kind).name}"
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
