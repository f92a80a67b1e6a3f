"""Cost of the Triton kernels on each GPU generation, read from compiled code without a GPU."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from em_kernels.kernels import triton as kernels
from em_kernels.kernels.configs import config_for

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS_PER_SM = 65536  # 32-bit, on every generation here; a warp gets a multiple of 256
BLOCK_OVERHEAD = 1024  # bytes of shared memory per block that CUDA itself uses
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INTEGERS = ("rows", "columns", "split_length", "split_rows", "stride_yn", "stride_on")
HEADINGS = ["variant", "sm", "registers", "spilled", "shared", "warps", "occupancy", "SASS/logit"]
DIVISIBLE = [["tt.divisibility", 16]]
FUNCTIONS = {
    "statistics": "row_statistics_kernel",
    "gradient": "row_gradient_kernel",
    "mass": "column_mass_kernel",
}


class Arch(NamedTuple):
    """Limits of an SM, from "Technical Specifications per Compute Capability" in the CUDA guide."""

    warps: int
    blocks: int
    shared_kib: int  # per SM; a block may use 1 KiB less


ARCHS = {
    80: Arch(warps=64, blocks=32, shared_kib=164),
    86: Arch(warps=48, blocks=16, shared_kib=100),
    89: Arch(warps=48, blocks=24, shared_kib=100),
    90: Arch(warps=64, blocks=32, shared_kib=228),
    100: Arch(warps=64, blocks=32, shared_kib=228),
    120: Arch(warps=48, blocks=24, shared_kib=100),
}


class Source(NamedTuple):
    """Inputs of Triton's compiler, beside a kernel's code."""

    signature: dict[str, str]
    constants: dict
    options: dict


class Variant(NamedTuple):
    """A kernel with the dtypes and flags it is launched with."""

    kernel: str
    y: torch.dtype
    bias: torch.dtype | None
    out: torch.dtype | None  # gradient only
    softcap: bool = False
    everything: bool = False  # statistics only: collision and argmax too
    targets: bool = False  # column masses only: the other kernels always have targets
    aligned: bool = True  # logits and their row stride, to 16

    def __str__(self) -> str:
        out = f" -> {TYPES[self.out]}" if self.out else ""
        bias = f" bias:{TYPES[self.bias]}" if self.bias else ""
        flags = [name for name in ("softcap", "everything", "targets") if getattr(self, name)]
        flags += [] if self.aligned else ["unaligned"]
        return " ".join([f"{self.kernel} {TYPES[self.y]}{out}{bias}", *flags])

    def source(self, arch: int) -> Source:
        """Return the signature, constants and options that kernels/triton.py launches with."""
        config = config_for(divmod(arch, 10))
        constants = {"HAS_BIAS": self.bias is not None, "HAS_SOFTCAP": self.softcap}
        if self.kernel == "statistics":
            settings = kernels.statistics_settings(config, self.y, self.aligned)
            constants["WITH_COLLISION_AND_ARGMAX"] = self.everything
        elif self.kernel == "mass":
            settings = kernels.mass_settings(config, self.y, self.aligned)
            constants["HAS_TARGETS"] = self.targets
        else:
            settings = kernels.gradient_settings(config)
        names = self.function.arg_names
        constants |= {name: value for name, value in settings.items() if name in names}
        options = {name: value for name, value in settings.items() if name not in names}
        pointers = {"y_ptr": TYPES[self.y], "bias_ptr": TYPES[self.bias or self.y]}
        pointers |= {"targets_ptr": "i64", "argmax_ptr": "i64"}
        pointers |= {"out_ptr": TYPES[self.out]} if self.out else {}
        signature = {}
        for name in names:
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                signature[name] = "*" + pointers.get(name, "fp32")
            else:
                signature[name] = "i32" if name in INTEGERS else "fp32"
        return Source(signature, constants, options)

    @property
    def function(self) -> triton.JITFunction:
        return getattr(kernels, FUNCTIONS[self.kernel])

    def is_divisible(self, name: str) -> bool:
        """Return whether Triton may assume that an argument is a multiple of 16: split_length, and
        pointers and strides of aligned logits.
        """
        return name == "split_length" or self.aligned and name.endswith(("_ptr", "_yn", "_on"))


def variants() -> Iterator[Variant]:
    """Yield every variant that kernels/triton.py launches, except those for integers equal to 1."""
    narrow, flags = (torch.bfloat16, torch.float16), (False, True)
    fp32 = torch.float32
    for bias, softcap, everything in product((None, fp32, *narrow), flags, flags):
        yield Variant("statistics", fp32, bias, None, softcap, everything)
    for out, has_bias, softcap in product((fp32, *narrow), flags, flags):
        yield Variant("gradient", fp32, out if has_bias else None, out, softcap)
    for bias, softcap, targets in product((None, fp32, *narrow), flags, flags):
        yield Variant("mass", fp32, bias, None, softcap, targets=targets)
    for dtype in narrow:  # logits that the caller has
        yield Variant("statistics", dtype, None, None)
        yield Variant("gradient", dtype, None, dtype)
        yield Variant("mass", dtype, None, None)
    for dtype in (fp32, *narrow):
        yield Variant("statistics", dtype, None, None, aligned=False)
        yield Variant("gradient", dtype, None, dtype, aligned=False)
        yield Variant("mass", dtype, None, None, aligned=False)


class Cost(NamedTuple):
    """Measurements of one kernel variant on one GPU generation."""

    variant: Variant
    arch: int
    registers: int
    spilled: int  # bytes per thread
    shared: int  # bytes per block
    warps_per_sm: int  # resident at once
    per_logit: float | None  # SASS instructions in the loop; None for the gradient, without one
    vector_load: bool  # loads of 16 bytes
    barrier_in_loop: bool

    @property
    def violations(self) -> list[str]:
        found = {
            f"spills {self.spilled} bytes": self.spilled > 0,
            "too much shared memory": self.shared > (ARCHS[self.arch].shared_kib - 1) * 1024,
            "no 16-byte loads": self.variant.aligned and not self.vector_load,
            "a barrier in the loop": self.barrier_in_loop,
        }
        return [f"{self.name}: {text}" for text, is_so in found.items() if is_so]

    @property
    def name(self) -> str:
        return f"{self.variant} on sm{self.arch}"

    @property
    def occupancy(self) -> float:
        return self.warps_per_sm / ARCHS[self.arch].warps

    @property
    def cells(self) -> list[str]:
        per_logit = "" if self.per_logit is None else f"{self.per_logit:.1f}"
        numbers = (self.arch, self.registers, self.spilled, self.shared, self.warps_per_sm)
        return [str(self.variant), *map(str, numbers), f"{self.occupancy:.0%}", per_logit]


def compiled(variant: Variant, arch: int) -> CompiledKernel:
    """Compile a variant as its first launch on such a GPU would."""
    given = variant.source(arch)
    divisible = [i for i, name in enumerate(given.signature) if variant.is_divisible(name)]
    source = ASTSource(
        variant.function,
        signature=given.signature,
        constexprs=given.constants,
        attrs={(i,): DIVISIBLE for i in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=given.options)


def cost(variant: Variant, arch: int) -> Cost:
    """Compile a variant and read its cost from the machine code."""
    code, given = compiled(variant, arch), variant.source(arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _run("cuobjdump", "-res-usage", file)))
        sass = _run("nvdisasm", "-c", file)
    registers, shared = int(usage["REG"]), code.metadata.shared
    has_loop = variant.kernel != "gradient"
    body = _loop(sass) if has_loop else sass.splitlines()
    instructions = sum(bool(re.match(r"\s+/\*[0-9a-f]+\*/", line)) for line in body)
    logits = given.constants.get("UNROLL", 1) * given.constants.get("VECTOR", 1)
    return Cost(
        variant,
        arch,
        registers,
        int(usage["STACK"]) + int(usage["LOCAL"]),
        shared,
        warps_per_sm(ARCHS[arch], given.options["num_warps"], registers, shared),
        instructions / logits if has_loop else None,
        any(re.search(r"LDG\S*\.128", line) for line in body),
        has_loop and any("BAR." in line for line in body),
    )


def warps_per_sm(arch: Arch, warps: int, registers: int, shared: int) -> int:
    """Return how many warps fit on an SM at once: the theoretical occupancy."""
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS_PER_SM // 4 // warp_registers * 4 // warps  # in each quarter
    by_shared = arch.shared_kib * 1024 // (shared + BLOCK_OVERHEAD)
    return warps * min(arch.warps // warps, arch.blocks, by_registers, by_shared)


def report(archs: list[int]) -> int:
    """Print the whole table, then the violations; return 1 if there are any."""
    work = [(variant, arch) for variant in variants() for arch in archs]
    costs: list[Cost] = []
    with get_context("spawn").Pool(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.imap(_cost, work):
            costs.append(found)
            print(f"\rcompiled {len(costs)} of {len(work)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print_table([HEADINGS, *(found.cells for found in costs)])
    violations = [text for found in costs for text in found.violations]
    print("\n".join(violations) or f"{len(costs)} variants, none over a limit")
    worst = max(costs, key=lambda found: (len(found.violations), -found.occupancy, found.registers))
    print(f"worst: {worst.name}: {worst.registers} registers, occupancy {worst.occupancy:.0%}")
    return 1 if violations else 0


def print_table(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *cells]))


def _cost(work: tuple[Variant, int]) -> Cost:
    return cost(*work)


def _loop(sass: str) -> list[str]:
    """Return the longest stretch of lines from a label to a branch back to it."""
    lines = sass.splitlines()
    labels: dict[str, int] = {}
    longest: list[str] = []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = i
        if (branch := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and branch[1] in labels:
            longest = max(longest, lines[labels[branch[1]] : i + 1], key=len)
    return longest


def _run(tool: str, option: str, file) -> str:
    command = [TOOLS / tool, option, file.name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(arguments: list[str]) -> int:
    """Print the table for --compile-report; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks --compile-report",
        description="Compile every Triton kernel for every GPU generation and print its registers, "
        "spills, shared memory, occupancy and instructions per logit. Needs no GPU; takes minutes; "
        "exit 1 when a limit is violated.",
    )
    parser.add_argument(
        "--compile-report", action="store_true", help="print the table, instead of measuring"
    )
    parser.add_argument(
        "--arch", type=int, nargs="*", help="GPU generations, such as 90 (default: all)"
    )
    known = parser.parse_args(arguments)
    unknown = set(known.arch or ()) - set(ARCHS)
    if unknown:
        parser.error(
            f"--arch: {unknown.pop()} is unknown; use some of {', '.join(map(str, ARCHS))}"
        )
    return report(known.arch or list(ARCHS))
