"""`em-kernels train`: One-shot Entropy Minimization."""

import torch

from ..training.console import Terminal
from ..training.trainer import train
from . import RANK
from .flags import train_settings

HELP = """--resume RUN continues a stopped or killed run with its own settings.

Examples:
  em-kernels train --model demo --prompt 'What is 2 + 3?' --steps 2 --rollouts 8 \\
    --max-new-tokens 64
  em-kernels train --resume runs/one-shot-em
  accelerate launch -m em_kernels.cli train ...  (several GPUs; or torchrun)"""


def run(arguments: list[str]) -> int:
    config, resume = train_settings("train", arguments, HELP)
    result = train(config, console=Terminal(stderr=True), resume=resume)
    if RANK == "0":
        print(result.checkpoint, flush=True)
    if torch.distributed.is_initialized():  # Exit without this may abort.
        torch.distributed.destroy_process_group()
    return 0
