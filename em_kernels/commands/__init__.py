"""The commands of `em-kernels`, one file each: run(arguments) returns the exit code."""

import os

RANK = os.environ.get("RANK", "0")  # of a process that accelerate or torchrun started
