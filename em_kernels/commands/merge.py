"""`em-kernels merge`: a run's LoRA adapters added to its base model."""

import argparse
from pathlib import Path

from ..training.runs.merge import merge


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="em-kernels merge",
        description="Add a LoRA run's adapters to the base model's weights, layer by layer in "
        "fp32, and write a plain bf16 transformers folder. A base that was trained on in 4 bits is "
        "merged unquantised. Runs on the CPU and needs host memory for the base model.",
    )
    adapter = "folder of a LoRA run (its newest checkpoint is merged) or of a checkpoint"
    parser.add_argument("adapter", type=Path, metavar="RUN_OR_CHECKPOINT", help=adapter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    known = parser.parse_args(arguments)
    print(merge(known.adapter, known.output))
    return 0
