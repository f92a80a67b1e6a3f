"""The commands of `em-kernels`, one file each: run(arguments) returns the exit code."""

import os

RANK = os.environ.get("RANK", "0")  # set by accelerate and torchrun
