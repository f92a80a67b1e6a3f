"""The Triton kernels, exactly as launched, compile for every GPU generation within its limits."""

from itertools import product

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from benchmarks import compile_report
from benchmarks.compile_report import (
    ARCHS,
    FLOAT_STATS,
    FUNCTIONS,
    Variant,
    compiled,
    cost,
    gpu_name,
    variants,
)
from em_kernels.kernels import triton as kernels
from em_kernels.kernels.portable import FinishedRows
from em_kernels.ops.sparse import SAMPLE
from em_kernels.reference import RowParts, RowTransform, TokenStats
from em_kernels.reference_divergence import DivergenceTerms

ALL = [pytest.param(v, arch, id=f"{v} {gpu_name(arch)}") for v in variants() for arch in ARCHS]
HEAVIEST = [  # of each kernel
    max(
        (v for v in variants() if (v.kernel, v.aligned) == (kernel, True)),
        key=lambda v: len(str(v)),
    )
    for kernel in FUNCTIONS
]
IN_16_BITS = [
    v._replace(bias=v.bias and torch.bfloat16, out=v.out and torch.bfloat16) for v in HEAVIEST
]
ENDS = (75, 86, "gfx942", "gfx1100")  # the oldest, the least shared memory, both of AMD's
ONES = ("rows", "columns", "count", "parts", "sample_size", "stride_yn", "stride_on", "split_rows")
FEW = [p for p in ALL if p.values[0] in IN_16_BITS and p.values[1] in ENDS]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("variant, arch", FEW)
def test_within_the_limits(variant, arch):
    """The heaviest variant of each kernel, on hard targets, spills nothing and fits."""
    assert cost(variant, arch).violations == []


@pytest.mark.slow
@pytest.mark.parametrize("variant, arch", [param for param in ALL if param not in FEW])
def test_others_within_the_limits(variant, arch):
    assert cost(variant, arch).violations == []


def test_loop_costs_no_more_than_memory():
    """An H200 can issue 26 instructions while it reads the 4 bytes of a logit.

    It has 132 SMs of 128 lanes at 1.8 GHz, and 4.8 TB/s.
    """
    plain = next(variants())
    assert (plain.bias, plain.softcap, plain.everything) == (None, False, False)
    found = cost(plain, 90)
    assert 5 < found.per_logit < 20 and found.occupancy >= 0.5


def test_column_masses_cost_no_more_than_memory():
    """An H200 can issue 26 instructions per logit, a B200 18 (148 SMs at 1.9 GHz, 8 TB/s)."""
    plain = next(variant for variant in variants() if variant.kernel == "mass")
    assert (plain.bias, plain.softcap, plain.targets) == (None, False, False)
    found, on_b200 = cost(plain, 90), cost(plain, 100)
    assert 5 < found.per_logit < 20 and 5 < on_b200.per_logit < 18
    assert found.occupancy >= 0.5 and not found.barrier_in_loop


@pytest.mark.parametrize("variant", HEAVIEST, ids=list(FUNCTIONS))
def test_arguments_of_1_are_constants(variant):
    """Triton compiles in integer arguments that are 1, as for one row of one logit."""
    signature, constants, options = variant.source(90)
    ones = {name: 1 for name in signature if name in ONES and signature[name] == "i32"}
    assert ones
    source = ASTSource(
        variant.function,
        signature=signature | dict.fromkeys(ones, "constexpr"),
        constexprs=constants | ones,
    )
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_16_bits_are_rounded_to_nearest(kind):
    """The compiled kernel rounds as torch does, though the interpreter truncates to bf16."""
    narrow = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    found = compiled(Variant("gradient", torch.float32, None, narrow), 90).asm["ptx"]
    assert f"cvt.rn.{kind}" in found and f"cvt.rz.{kind}" not in found


def hashable(signature, constants, options):
    return tuple(tuple(sorted(part.items())) for part in (signature, constants, options))


def test_variants_are_what_is_launched(monkeypatch):
    enumerated = [hashable(*variant.source(90)) for variant in variants()]
    assert len(enumerated) == 176
    launched = set()

    class Recorder:
        def __init__(self, kernel):
            self.names = kernel.arg_names

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *arguments, **named):
            given = dict(zip(self.names, arguments, strict=False))
            signature = {name: mangle_type(value) for name, value in given.items()}
            constants = {name: value for name, value in named.items() if name in self.names}
            constants |= {name: None for name, value in given.items() if value is None}
            options = {name: value for name, value in named.items() if name not in constants}
            assert sorted({*signature, *constants}) == sorted(self.names)
            signature |= dict.fromkeys(constants, "constexpr")
            launched.add(hashable(signature, constants, options))

    for name in FUNCTIONS.values():
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name)))

    def launch(dtype, bias, out, softcap, everything, targets, columns=32):
        y = torch.zeros(3, columns, dtype=dtype)
        bias = None if bias is None else torch.zeros(columns, dtype=bias)
        targets = torch.zeros(3, dtype=torch.int64) if targets else None
        row, per_row = RowTransform(bias, torch.ones(3), 2, softcap, targets), torch.zeros(8, 3)
        kernels.row_statistics(y, row, everything)
        kernels.row_gradient(y, row, per_row, torch.zeros_like(y).to(out))
        if dtype == torch.float32 and columns == 32:  # the loops over chunks
            kernels.column_mass(y, row, per_row)
            indices = torch.arange(3)
            kernels.gradient_of_columns(y, row, per_row, indices, out, torch.zeros(3))

    def launch_divergence(bias, out, softcap, beta):
        y, ref_y = torch.zeros(2, 3, 32)
        bias = None if bias is None else torch.zeros(32, dtype=bias)
        row = RowTransform(bias, torch.ones(3), 2, softcap)
        terms = DivergenceTerms(y, row, ref_y, row, torch.zeros(7, 3), beta)
        kernels.divergence_sums(terms)
        kernels.divergence_gradient(terms, torch.zeros_like(y).to(out))

    narrow, flags = (torch.bfloat16, torch.float16), (False, True)
    for weight, has_bias, softcap, beta in product(
        (torch.float32, *narrow), flags, (None, 30), (0, 1, 0.5)
    ):
        launch_divergence(weight if has_bias else None, weight, softcap, beta)
    for weight, has_bias, softcap, everything, targets in product(
        (torch.float32, *narrow), flags, (None, 30), flags, flags
    ):
        bias = weight if has_bias else None
        launch(torch.float32, bias, weight, softcap, everything, targets)
    for dtype, columns in product((torch.float32, *narrow), (32, 33)):  # entropy_from_logits
        launch(dtype, None, dtype, None, False, False, columns)
    for everything, targets in product(flags, flags):
        parts = RowParts(*torch.zeros(6, 2, 3), torch.zeros(2, 3, dtype=torch.int64))
        if not everything:
            parts = parts._replace(q1=None, total=None, argmax=None)
        kernels.finish_rows(parts, 32, torch.zeros(3, dtype=torch.int64) if targets else None)
    rows = FinishedRows(TokenStats(*torch.zeros(5, 3)), *torch.zeros(2, 3))
    for names in (("entropy",), ("logprob",), FLOAT_STATS):
        upstream = TokenStats(**{name: torch.zeros(3) for name in names})
        kernels.gradient_factors(rows, upstream, 32)
    for dtype in (torch.float32, *narrow):
        mass = torch.zeros(2 * SAMPLE)
        kernels.choose_columns(mass, torch.full((len(mass),), -1), 0.5, SAMPLE, dtype)
    assert launched == set(enumerated)


def test_command(monkeypatch, capfd):
    plain = [next(variants())]
    monkeypatch.setattr(compile_report, "variants", lambda: iter(plain))
    command = ["--compile-report", "--arch", "90"]
    assert compile_report.main(command) == 0
    stdout, stderr = capfd.readouterr()
    lines = stdout.splitlines()
    assert lines[0].split()[:2] == ["variant", "GPU"] and lines[1].split()[:3] == [
        "statistics", "fp32", "sm90"
    ]  # fmt: skip
    assert lines[-1].startswith("worst: statistics fp32 on sm90: ")
    assert "compiled 1 of 1" in stderr
    monkeypatch.setitem(ARCHS, 90, ARCHS[90]._replace(shared_kib=1))
    assert compile_report.main(command) == 1
    assert "statistics fp32 on sm90: too much shared memory" in capfd.readouterr().out


def test_unknown_arch(capfd):
    with pytest.raises(SystemExit) as exit:
        compile_report.main(["--compile-report", "--arch", "7"])
    assert (
        exit.value.code == 2
        and "--arch: 7 is unknown; use some of 75, 80, 86" in capfd.readouterr().err
    )
