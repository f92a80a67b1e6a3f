"""The Triton kernels, exactly as launched, compile for every GPU generation within its limits."""

from itertools import product

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from benchmarks import compile_report
from benchmarks.compile_report import ARCHS, FUNCTIONS, Variant, compiled, cost, variants
from em_kernels.kernels import triton as kernels
from em_kernels.reference import Coefficients, RowTransform

ALL = [pytest.param(v, arch, id=f"{v} sm{arch}") for v in variants() for arch in ARCHS]
HEAVIEST = (
    "bias:bf16 softcap everything",
    "-> bf16 bias:bf16 softcap",
    "mass fp32 bias:bf16 softcap targets",
)
SMALLEST = min(ARCHS, key=lambda arch: (ARCHS[arch].shared_kib, arch))  # the tightest limits
ONES = ("rows", "columns", "stride_yn", "stride_on", "split_rows")
FEW = [p for p in ALL if str(p.values[0]).endswith(HEAVIEST) and p.values[1] == SMALLEST]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("variant, arch", FEW)
def test_within_the_limits(variant, arch):
    """The heaviest variant of each kernel spills nothing and fits into shared memory."""
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


@pytest.mark.parametrize("kernel", ["statistics", "gradient", "mass"])
def test_arguments_of_1_are_constants(kernel):
    """Triton compiles in integer arguments that are 1, as for one row of one logit."""
    signature, constants, options = next(
        v for v in variants() if v.kernel == kernel and v.bias
    ).source(90)  # fmt: skip
    ones = {name: 1 for name in signature if name in ONES}
    source = ASTSource(
        getattr(kernels, FUNCTIONS[kernel]),
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
    assert len(enumerated) == 59
    launched = set()

    class Recorder:
        def __init__(self, kernel):
            self.names = kernel.arg_names

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *arguments, **named):
            signature = dict(zip(self.names, map(mangle_type, arguments), strict=False))
            constants = {name: value for name, value in named.items() if name in self.names}
            options = {name: value for name, value in named.items() if name not in constants}
            assert sorted([*signature, *constants]) == sorted(self.names)
            signature |= dict.fromkeys(constants, "constexpr")
            launched.add(hashable(signature, constants, options))

    for name in FUNCTIONS.values():
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name)))

    def launch(dtype, bias, out, softcap, everything, columns=32):
        y = torch.zeros(3, columns, dtype=dtype)
        bias = None if bias is None else torch.zeros(columns, dtype=bias)
        row = RowTransform(bias, torch.ones(3), 2, softcap, torch.zeros(3, dtype=torch.int64))
        kernels.row_statistics(y, row, everything)
        per_row = (*torch.zeros(2, 3), Coefficients(*torch.zeros(6, 3)))
        kernels.row_gradient(y, row, *per_row, torch.zeros_like(y).to(out))
        targets = row.targets if everything else None
        kernels.column_mass(y, row._replace(targets=targets), *per_row)

    narrow = (torch.bfloat16, torch.float16)
    for weight, has_bias, softcap, everything in product(
        (torch.float32, *narrow), (False, True), (None, 30), (False, True)
    ):
        launch(torch.float32, weight if has_bias else None, weight, softcap, everything)
    for dtype, columns in product((torch.float32, *narrow), (32, 33)):  # entropy_from_logits
        launch(dtype, None, dtype, None, False, columns)
    assert launched == set(enumerated)


def test_command(monkeypatch, capfd):
    plain = [next(variants())]
    monkeypatch.setattr(compile_report, "variants", lambda: iter(plain))
    command = ["--compile-report", "--arch", "90"]
    assert compile_report.main(command) == 0
    stdout, stderr = capfd.readouterr()
    lines = stdout.splitlines()
    assert lines[0].split()[:2] == ["variant", "sm"] and lines[1].split()[:3] == [
        "statistics", "fp32", "90"
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
        and "--arch: 7 is unknown; use some of 80, 86" in capfd.readouterr().err
    )
