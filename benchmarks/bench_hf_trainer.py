"""Time and memory of EntropyTrainer and of a Trainer with all logits in memory, each measured in a
process of its own, into results/hf_trainer.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

import em_kernels
from benchmarks import store
from benchmarks.timed import timed
from em_kernels.hf_trainer import EntropyTrainer

ROUNDS, STEPS, ROWS, LENGTH, TAU = 3, 2, 4, 512, 0.5
# Qwen2-0.5B with 2 layers instead of 24.
MODEL = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
MODEL |= {"num_hidden_layers": 2, "num_attention_heads": 14, "num_key_value_heads": 2}


class LogitsTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logp = (model(**inputs).logits[:, :-1].float() / TAU).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return (entropy * (labels[:, 1:] != -100)).sum() / num_items_in_batch


TRAINERS = {"logits": (LogitsTrainer, {}), "EntropyTrainer": (EntropyTrainer, {"temperature": TAU})}


def train_and_measure(kind: str) -> dict:
    """Train for a few steps; return time and memory. The first step warms up."""
    base, settings = TRAINERS[kind]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**MODEL, tie_word_embeddings=True))
    ids = torch.randint(MODEL["vocab_size"], (ROWS * (STEPS + 1), LENGTH))
    data = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as output:
        options = {"per_device_train_batch_size": ROWS, "max_steps": STEPS + 1, "use_cpu": True}
        options |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        arguments = TrainingArguments(output, logging_steps=1, **options)
        trainer = timed(base)(model, arguments, train_dataset=data, **settings)
        usage = [resource.getrusage(resource.RUSAGE_SELF)]
        trainer.train()
        usage.append(resource.getrusage(resource.RUSAGE_SELF))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    wall, cpu = (statistics.median(column) for column in zip(*trainer.times[1:], strict=True))
    before, peak = (at.ru_maxrss / 2**20 for at in usage)
    peaks = {"peak_gib": peak, "peak_before_training_gib": before}
    return {**peaks, "step_s": wall, "step_cpu_s": cpu, "losses": losses}


def main() -> None:
    rounds: dict[str, list[dict]] = {kind: [] for kind in TRAINERS}
    for kind in [*TRAINERS] * ROUNDS:
        run = [sys.executable, "-m", "benchmarks.bench_hf_trainer", "--trainer", kind]
        rounds[kind].append(json.loads(subprocess.check_output(run, text=True).splitlines()[-1]))
    facts = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.bench_hf_trainer",
        "model": f"random Qwen2, fp32, {MODEL}; {ROWS} x {LENGTH} tokens, AdamW",
        "versions": {m.__name__: m.__version__ for m in (em_kernels, torch, transformers)},
    }
    results = {}
    for kind, rows in rounds.items():
        names = rows[0].keys() - {"losses"}
        medians = {name: statistics.median(row[name] for row in rows) for name in sorted(names)}
        results[kind] = {**medians, **facts, "rounds": rows}
    store.merge(store.RESULTS / "hf_trainer.json", "cpu", "trainer", results)


if __name__ == "__main__":
    program = "python -m benchmarks.bench_hf_trainer"
    parser = argparse.ArgumentParser(program, description=__doc__, allow_abbrev=False)
    parser.add_argument("--trainer", choices=TRAINERS, help=argparse.SUPPRESS)
    kind = parser.parse_args().trainer
    print(json.dumps(train_and_measure(kind))) if kind else main()
