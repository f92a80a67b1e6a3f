"""Facts about this device and its speed at copies and GEMMs: the ceilings for the kernels."""

import platform
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.tuning import Sizes, median_ms
from em_kernels.ops.gemm import gemm

PACKAGES = ("torch", "triton", "transformers", "pytest", "trl", "liger-kernel", "verl")
PACKAGES += ("cut-cross-entropy", "quack-kernels")


def environment(sizes: Sizes) -> dict:
    """Return device, versions, and rates of a copy, a square bf16 GEMM and the head's own GEMMs."""
    found: dict = {"python": platform.python_version(), "versions": {}}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found["versions"][name] = version(name)
    if sizes.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": about.multi_processor_count,
            "l2_mib": about.L2_cache_size / 2**20,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
        if shutil.which("nvidia-smi"):
            ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(ask, capture_output=True, text=True).stdout.strip()

    def normal(*shape: int) -> torch.Tensor:  # zeros would be faster than data
        return torch.randn(shape, dtype=torch.bfloat16, device=sizes.device)

    def tflops(n: int, k: int, m: int, run: Callable[[], object]) -> float:
        return float(f"{2e-9 * n * k * m / median_ms(sizes.device, run):.3g}")

    source = torch.randint(256, (sizes.copied,), dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    copy_ms = median_ms(sizes.device, lambda: target.copy_(source))
    found["copy_gb_per_s"] = float(f"{2e-6 * sizes.copied / copy_ms:.4g}")
    side = sizes.square
    a, b = normal(side, side), normal(side, side)
    found["square_tflops"] = tflops(side, side, side, lambda: a @ b)
    (_, d, v), n, m = sizes.head, sizes.rows, sizes.gathered
    found |= {"rows": n, "gathered": m}
    hidden, weight, dy = normal(m, d), normal(v, d), normal(m, v)
    few, logits = hidden[:n], torch.empty(n, v, device=sizes.device)
    dh, dw = (torch.zeros(x.shape, device=sizes.device) for x in (hidden, weight))
    found["head_tflops"] = {
        "logits": tflops(n, d, v, lambda: gemm(logits, few, weight.t())),
        "logits in bf16": tflops(n, d, v, lambda: few @ weight.t()),
        "dhidden": tflops(m, d, v, lambda: gemm(dh, dy, weight)),
        "dhidden in bf16": tflops(m, d, v, lambda: dy @ weight),
        "dweight, added": tflops(m, d, v, lambda: gemm(dw, dy.t(), hidden, accumulate=True)),
        "dweight in bf16": tflops(m, d, v, lambda: dy.t() @ hidden),
    }
    return found
