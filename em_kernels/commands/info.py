"""`em-kernels info`: what this machine has, and which kernels are in use."""

import argparse
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__
from ..kernels import cpu, kernels_for
from ..ops.gemm import BF16_ISAS, bf16_isa

REQUIRED = ("torch", "triton", "transformers", "safetensors", "numpy")
OPTIONAL = ("accelerate", "flash-attn", "vllm", "deepspeed", "bitsandbytes")


def run(arguments: list[str]) -> int:
    about = "Versions, device, row kernels in use, optional packages."
    argparse.ArgumentParser(prog="em-kernels info", description=about).parse_args(arguments)

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    rows = [("em_kernels", __version__), ("python", platform.python_version())]
    rows += [(name, installed(name)) for name in REQUIRED]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.1f} GiB"
        rows.append((f"GPU {index}", f"{gpu.name}, sm{gpu.major}{gpu.minor}, {memory}"))
    if not torch.cuda.is_available():
        rows.append(("GPU", "none that torch sees"))
    capability = torch.backends.cpu.get_cpu_capability()
    rows.append(("CPU", f"{capability}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"))
    names = {"cpu": "C++ (em_kernels._C)", "portable": "portable, plain torch"}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        kernels = kernels_for(torch.empty(0, 1, device=device)).__name__.rsplit(".", 1)[1]
        rows.append((f"row kernels, {device}", names.get(kernels, "Triton")))
    if torch.cuda.is_available():
        with suppress(ModuleNotFoundError):  # without the extras that training needs
            from ..training.models.loading import FLASH, has_flash_attention

            flash = f"{FLASH}, where the model has it" if has_flash_attention() else "sdpa"
            rows.append(("attention in training, cuda", flash))
    isa = BF16_ISAS[bf16_isa()] if bf16_isa() else "none: slabs of the weight are upcast"
    rows.append(("bf16 GEMM, cpu", isa))
    rows += [(f"optional: {name}", installed(name)) for name in OPTIONAL]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    if not cpu.is_built():
        why = f"em_kernels._C is not built, or does not load ({cpu.WHY_NOT})"
        build = "Build it with `make build`, or `python setup.py build_ext --inplace`."
        print(f"{why}: the CPU uses the slower portable row kernels. {build}")
    return 0
