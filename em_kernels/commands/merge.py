"""`em-kernels merge`: a LoRA's adapters summed into its base model."""

import argparse
from pathlib import Path

from ..training.runs.merge import merge


def run(arguments: list[str]) -> int:
    """Merge, and print the new folder."""
    parser = argparse.ArgumentParser(
        prog="em-kernels merge",
        description="Write a plain transformers folder, in bf16, of a LoRA run: the base model "
        "with the adapters added to its weights, in fp32, layer by layer. A base held in 4 bits "
        "in training is merged unquantised. Runs on the CPU, in the base model's memory.",
    )
    parser.add_argument("adapter", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    known = parser.parse_args(arguments)
    print(merge(known.adapter, known.output))
    return 0
