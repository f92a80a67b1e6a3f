"""`em-kernels info`: what this machine has, and which kernels are in use."""

import argparse
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import torch

from .. import __version__
from ..kernels import cpu, kernels_for, self_test
from ..ops.gemm import BF16_ISAS, bf16_isa, widens

REQUIRED = ("torch", "transformers", "safetensors", "numpy")
PORTABLE = "portable, plain torch"
UPCAST = "slabs of the weight are upcast"
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
    triton = packages_distributions().get("triton", ["triton"])[0]  # ROCm's has another name
    rows.append(("triton", installed(triton)))
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.1f} GiB"
        rows.append((f"GPU {index}", f"{gpu.name}, sm{gpu.major}{gpu.minor}, {memory}"))
    if not torch.cuda.is_available():
        rows.append(("GPU", "none that torch sees"))
    capability = torch.backends.cpu.get_cpu_capability()
    rows.append(("CPU", f"{capability}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"))
    is_built = kernels_for(torch.empty(0, 1, device="cpu")) is cpu
    rows.append(("row kernels, cpu", "C++ (em_kernels._C)" if is_built else PORTABLE))
    rows.append(("bf16 GEMM, cpu", BF16_ISAS[bf16_isa()] if bf16_isa() else f"none: {UPCAST}"))
    rows += _accelerators()
    if torch.cuda.is_available():
        with suppress(ModuleNotFoundError):  # without the extras that training needs
            from ..training.models.loading import FLASH, has_flash_attention

            flash = f"{FLASH}, where the model has it" if has_flash_attention() else "sdpa"
            rows.append(("attention in training, cuda", flash))
    rows += [(f"optional: {name}", installed(name)) for name in OPTIONAL]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    if not cpu.is_built():
        why = f"em_kernels._C is not built, or does not load ({cpu.WHY_NOT})"
        build = "Build it with `make build`, or `python setup.py build_ext --inplace`."
        print(f"{why}: the CPU uses the slower portable row kernels. {build}")
    return 0


def _accelerators() -> Iterator[tuple[str, str]]:
    """Yield what each device beside the CPU uses; on a CUDA GPU the kernels are tested for that."""
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if torch.cuda.is_available() else accelerator and accelerator.type
    if kind is None:
        return
    count = torch.cuda.device_count() if kind == "cuda" else torch.accelerator.device_count()
    for index in range(count):
        device = torch.device(f"{kind}:{index}")
        kernels, gemm = f"{PORTABLE}: Triton is used on CUDA and ROCm GPUs", f"none: {UPCAST}"
        if kind == "cuda":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is printed here
                for dtype in (torch.bfloat16, torch.float16):
                    kernels_for(torch.empty(0, 1, device=device), dtype)
            reason = self_test.failure(device)
            kernels = f"{PORTABLE}: {reason}" if reason else "Triton"
            if widens(torch.empty(0, dtype=torch.bfloat16, device=device)):
                gemm = "torch's"
        yield f"row kernels, {device}", kernels
        yield f"bf16 GEMM, {device}", gemm
