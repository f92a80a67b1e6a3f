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
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.gpu_generations import ARCHS, gpu_name, target, warps_per_sm
from em_kernels.kernels import triton as kernels
from em_kernels.kernels.configs import config_for
from em_kernels.ops.sparse import SAMPLE
from em_kernels.reference import TokenStats

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOAT_STATS = TokenStats._fields[:5]
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FLOATS = (
    *("logit_scale", "softcap", "vocab_size", "tolerance", "log2_columns"),
    *("ref_logit_scale", "ref_softcap", "beta", "rest"),
)
INT64 = (
    "targets",
    "argmax",
    "argmax_out",
    "indices",
    "rows",
    "row_of",
    "new_row_of",
    "counts",
    "sample",
)
HEADINGS = ["variant", "GPU", "registers", "spilled", "shared", "warps", "occupancy", "SASS/logit"]
DIVISIBLE = [["tt.divisibility", 16]]
FUNCTIONS = {
    "statistics": "row_statistics_kernel",
    "gradient": "row_gradient_kernel",
    "mass": "column_mass_kernel",
    "columns": "column_gradient_kernel",
    "finish": "finish_rows_kernel",
    "factors": "gradient_factors_kernel",
    "choice": "choose_columns_kernel",
    "divergence": "divergence_sums_kernel",
    "divergence gradient": "divergence_gradient_kernel",
}
HAVE_LOOPS = ("statistics", "mass")  # over logits, which bounds their time


class Source(NamedTuple):
    """Inputs of Triton's compiler, beside a kernel's code."""

    signature: dict[str, str]
    constants: dict
    options: dict


class Variant(NamedTuple):
    """A kernel with the dtypes and flags it is launched with."""

    kernel: str
    y: torch.dtype = torch.float32
    bias: torch.dtype | None = None
    out: torch.dtype | None = None  # of a gradient, or of the choice's shares
    softcap: bool = False
    everything: bool = False  # statistics: collision and argmax too
    targets: bool = False
    upstream: tuple[str, ...] = ()  # factors: statistics that have a gradient
    aligned: bool = True  # logits and their row stride, to 16
    kind: int | None = None  # of a divergence, whose two heads are alike

    def __str__(self) -> str:
        out = f" -> {TYPES[self.out]}" if self.out else ""
        bias = f" bias:{TYPES[self.bias]}" if self.bias else ""
        flags = [name for name in ("softcap", "everything", "targets") if getattr(self, name)]
        flags += [*self.upstream] + ([] if self.aligned else ["unaligned"])
        flags += [] if self.kind is None else [("forward", "reverse", "mixed")[self.kind]]
        return " ".join([f"{self.kernel} {TYPES[self.y]}{out}{bias}", *flags])

    def source(self, arch: int | str) -> Source:
        """Return the signature, constants and options that kernels/triton.py launches with."""
        settings, names = self._settings(arch), self.function.arg_names
        constants = {
            "HAS_BIAS": self.bias is not None,
            "HAS_SOFTCAP": self.softcap,
            "HAS_TARGETS": self.targets,
            "WITH_COLLISION_AND_ARGMAX": self.everything,
            "KIND": self.kind,
            "REF_HAS_BIAS": self.bias is not None,
            "REF_HAS_SOFTCAP": self.softcap,
        }
        absent = set(FLOAT_STATS) - set(self.upstream)
        constants |= {f"g_{name}_ptr": None for name in absent}
        constants = {name: value for name, value in (constants | settings).items() if name in names}
        options = {name: value for name, value in settings.items() if name not in names}
        pointers = dict.fromkeys((f"{name}_ptr" for name in INT64), "i64")
        bias = TYPES[self.bias or self.y]
        pointers |= {"y_ptr": TYPES[self.y], "bias_ptr": bias, "ref_bias_ptr": bias}
        pointers |= {} if self.targets else {"targets_ptr": TYPES[self.y]}
        pointers |= {"out_ptr": TYPES[self.out], "shares_ptr": TYPES[self.out]} if self.out else {}
        signature = {}
        for name in names:
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                signature[name] = "*" + pointers.get(name, "fp32")
            else:
                signature[name] = "fp32" if name in FLOATS else "i32"
        return Source(signature, constants, options)

    def _settings(self, arch: int | str) -> dict:
        """Return constants and options that the kernel's launch settings give."""
        config = config_for(divmod(arch, 10) if isinstance(arch, int) else (9, 4))
        if self.kernel == "statistics":
            return kernels.statistics_settings(config, self.y, self.aligned)
        if self.kernel == "mass":
            return kernels.mass_settings(config, self.y, self.aligned)
        if self.kernel in ("gradient", "columns", "divergence", "divergence gradient"):
            return kernels.gradient_settings(config, rows_too=self.kernel == "gradient")
        if self.kernel == "choice":
            return {**kernels.CHOOSE, "SAMPLE_LANES": SAMPLE}
        return kernels.FINISH

    @property
    def function(self) -> triton.JITFunction:
        return getattr(kernels, FUNCTIONS[self.kernel])

    @property
    def loads_rows(self) -> bool:
        """True where threads load adjacent logits."""
        return self.aligned and self.kernel in ("statistics", "gradient", "mass")

    def is_divisible(self, name: str) -> bool:
        """Return whether Triton may assume that an argument is a multiple of 16: split_length, and
        pointers and strides of aligned logits.
        """
        return (
            name == "split_length" or self.aligned and name.endswith(("_ptr", "_yn", "_on", "_rn"))
        )


def variants() -> Iterator[Variant]:
    """Yield the variants that kernels/triton.py launches, except those for integers equal to 1.

    Of the factors only some, as there are 31.
    """
    narrow, flags = (torch.bfloat16, torch.float16), (False, True)
    fp32 = torch.float32
    for bias, softcap, everything in product((None, fp32, *narrow), flags, flags):
        for targets in flags:
            yield Variant("statistics", fp32, bias, None, softcap, everything, targets)
    for out, has_bias, softcap, targets in product((fp32, *narrow), flags, flags, flags):
        for kernel in ("gradient", "columns"):
            bias = out if has_bias else None
            yield Variant(kernel, fp32, bias, out, softcap, targets=targets)
    for bias, softcap, targets in product((None, fp32, *narrow), flags, flags):
        yield Variant("mass", fp32, bias, None, softcap, targets=targets)
    for everything, targets in product(flags, flags):
        yield Variant("finish", everything=everything, targets=targets)
    for upstream in (("entropy",), ("logprob",), FLOAT_STATS):
        yield Variant("factors", upstream=upstream)
    for out in (fp32, *narrow):
        yield Variant("choice", out=out)
    for kind, has_bias, softcap, out in product(range(3), flags, flags, (fp32, *narrow)):
        bias = out if has_bias else None
        yield Variant("divergence gradient", fp32, bias, out, softcap, kind=kind)
        if has_bias or out == fp32:
            yield Variant("divergence", fp32, bias, None, softcap, kind=kind)
    for dtype in narrow:  # logits that the caller has
        yield Variant("statistics", dtype)
        yield Variant("gradient", dtype, out=dtype)
    for dtype in (fp32, *narrow):
        yield Variant("statistics", dtype, aligned=False)
        yield Variant("gradient", dtype, out=dtype, aligned=False)


class Cost(NamedTuple):
    """Measurements of one kernel variant on one GPU generation."""

    variant: Variant
    arch: int | str
    registers: int
    spilled: int  # bytes per thread
    shared: int  # bytes per block
    warps_per_sm: int  # resident at once
    per_logit: float | None  # SASS instructions in the loop over logits; None without one
    vector_load: bool  # loads of 16 bytes
    barrier_in_loop: bool

    @property
    def violations(self) -> list[str]:
        found = {
            f"spills {self.spilled} bytes": self.spilled > 0,
            "too much shared memory": self.shared > (ARCHS[self.arch].shared_kib - 1) * 1024,
            "no 16-byte loads": self.variant.loads_rows and not self.vector_load,
            "a barrier in the loop": self.barrier_in_loop,
        }
        return [f"{self.name}: {text}" for text, is_so in found.items() if is_so]

    @property
    def name(self) -> str:
        return f"{self.variant} on {gpu_name(self.arch)}"

    @property
    def occupancy(self) -> float:
        return self.warps_per_sm / ARCHS[self.arch].warps

    @property
    def cells(self) -> list[str]:
        per_logit = "" if self.per_logit is None else f"{self.per_logit:.1f}"
        numbers = (
            gpu_name(self.arch),
            self.registers,
            self.spilled,
            self.shared,
            self.warps_per_sm,
        )
        return [str(self.variant), *map(str, numbers), f"{self.occupancy:.0%}", per_logit]


def compiled(variant: Variant, arch: int | str) -> CompiledKernel:
    """Compile a variant as its first launch on such a GPU would."""
    given = variant.source(arch)
    divisible = [i for i, name in enumerate(given.signature) if variant.is_divisible(name)]
    source = ASTSource(
        variant.function,
        signature=given.signature,
        constexprs=given.constants,
        attrs={(i,): DIVISIBLE for i in divisible},
    )
    return triton.compile(source, target=target(arch), options=given.options)


def cost(variant: Variant, arch: int | str) -> Cost:
    """Compile a variant and read its cost from the machine code."""
    code, given = compiled(variant, arch), variant.source(arch)
    if isinstance(arch, str):
        return amd_cost(variant, arch, code, given.options["num_warps"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _run("cuobjdump", "-res-usage", file)))
        sass = _run("nvdisasm", "-c", file)
    registers, shared = int(usage["REG"]), code.metadata.shared
    has_loop = variant.kernel in HAVE_LOOPS
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


def amd_cost(variant: Variant, arch: str, code: CompiledKernel, warps: int) -> Cost:
    """Read the cost from the metadata of AMD's assembly; instructions are not counted."""
    text = code.asm["amdgcn"]
    number = {
        name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)
    }
    registers, limits = number["vgpr_count"], ARCHS[arch]
    by_registers = limits.registers // (-(-registers // 8) * 8) // warps
    by_shared = limits.shared_kib * 1024 // max(1, code.metadata.shared)
    return Cost(
        variant,
        arch,
        registers,
        4 * (number["vgpr_spill_count"] + number["sgpr_spill_count"]),
        code.metadata.shared,
        warps * min(limits.warps // warps, limits.blocks, by_registers, by_shared),
        None,
        re.search(r"load_(dwordx4|b128)", text) is not None,
        False,
    )


def report(archs: list[int | str]) -> int:
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


def _cost(work: tuple[Variant, int | str]) -> Cost:
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
        "--arch",
        type=lambda name: int(name) if name.isdecimal() else name,
        nargs="*",
        help="GPU generations, such as 90 or gfx942 (default: all)",
    )
    known = parser.parse_args(arguments)
    unknown = set(known.arch or ()) - set(ARCHS)
    if unknown:
        parser.error(
            f"--arch: {unknown.pop()} is unknown; use some of {', '.join(map(str, ARCHS))}"
        )
    return report(known.arch or list(ARCHS))
