"""Time and memory of a GRPO step on the CPU, with TRL's statistics, with ours, and with all logits
in memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from functools import partial

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, set_seed
from trl import GRPOConfig, GRPOTrainer

from benchmarks.timed import timed
from em_kernels.training.models.demo_model import fetch_demo
from em_kernels.trl import FusedGRPOTrainer

ROUNDS, STEPS, ROWS = 3, 3, 8
PROMPT = "Natalia sold clips to 48 of her friends in April, and then half as many in May. " * 3
WIDE = {"vocab_size": 151936, "hidden_size": 512, "intermediate_size": 1408}
WIDE |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
SETTINGS = {"max_completion_length": 128, "entropy_coef": 0.01, "logging_steps": 1}
SETTINGS |= {"use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}


class LogitsTrainer(GRPOTrainer):
    def _get_per_token_logps_and_entropies(self, model, ids, mask, length, **others):
        with self.accelerator.autocast():
            found = model(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1)
        logp = found.logits[:, :-1].float().log_softmax(-1)
        logps = logp.gather(-1, ids[:, -length:, None])[..., 0]
        return logps, -(logp.exp() * logp).sum(-1), None


TRAINERS = {"trl": GRPOTrainer, "em_kernels": FusedGRPOTrainer, "all logits": LogitsTrainer}


def train_and_measure(kind: type[GRPOTrainer], model: str, dtype: str) -> dict:
    """Train for a few steps; return time and memory. The first step warms up."""
    set_seed(0)
    create, what = AutoModelForCausalLM.from_config, Qwen2Config(**WIDE, tie_word_embeddings=True)
    if model == "demo":
        create, what = AutoModelForCausalLM.from_pretrained, fetch_demo()
        create = partial(create, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as output:
        config = {"per_device_train_batch_size": ROWS, "num_generations": ROWS, **SETTINGS}
        config |= {"max_steps": STEPS + 1, "num_iterations": STEPS + 1, "bf16": dtype == "bf16"}
        trainer = timed(kind)(
            create(what),
            lambda completions, **others: list(map(float, map(len, completions))),
            GRPOConfig(output, **config),
            Dataset.from_dict({"prompt": [PROMPT]}),
            processing_class=AutoTokenizer.from_pretrained(fetch_demo()),
        )
        trainer.train()
    seconds, cpu_seconds = (statistics.median(x) for x in zip(*trainer.times[1:], strict=True))
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    steps = trainer.state.log_history[:-1]
    logged = {name: [step[name] for step in steps] for name in ("loss", "entropy", "grad_norm")}
    return {"s": seconds, "cpu_s": cpu_seconds, "peak_gib": peak_gib, **logged}


if __name__ == "__main__":
    program = "python -m benchmarks.bench_trl"
    parser = argparse.ArgumentParser(program, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "model",
        choices=("wide", "demo"),
        help="wide: 2 random layers, 151936 vocabulary entries; demo: the 135M model",
    )
    parser.add_argument("dtype", choices=("fp32", "bf16"), help="bf16: autocast over fp32 weights")
    parser.add_argument("--trainer", choices=TRAINERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        row = train_and_measure(TRAINERS[options.trainer], options.model, options.dtype)
        sys.exit(print(json.dumps(row)))
    found: dict[str, list[dict]] = {name: [] for name in TRAINERS}
    for name in [*TRAINERS] * ROUNDS:
        command = [sys.executable, "-m", "benchmarks.bench_trl", *sys.argv[1:], "--trainer", name]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name].append(json.loads(run.stdout.splitlines()[-1]))
    for name, runs in found.items():
        print(name, *({key: [run[key] for run in runs]} for key in runs[0]), sep="\n  ")
