"""Builds em_kernels._C, C++ rows and GEMM for the CPU; static metadata is in pyproject.toml."""

import platform
import sys

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = ("divergence_rows", "entropy_rows", "gemm_bf16", "vocabulary")
HEADERS = ("divergence_rows", "entropy_rows", "gemm_bf16", "row_operations")
COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    # Not -ffast-math: NaN and infinities are part of the contract.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    # The stable ABI of torch 2.10 serves every later torch.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
if platform.machine() in ("x86_64", "AMD64"):
    # Without AVX2, GCC 12 spilled through MMX registers and left the x87 stack full: from then on
    # long doubles, and numpy's LAPACK, computed NaN in that thread.
    COMPILE_ARGS.append("-mno-mmx")


class OptionalBuildExtension(BuildExtension):
    """Lets an installation succeed without a compiler; an explicit `build_ext` still fails."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if "build_ext" in sys.argv:
                raise
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            print(
                f"warning: em_kernels._C was not built ({reason[0]}): the CPU will use the slower "
                "portable row kernels; `make build` builds it later",
                file=sys.stderr,
            )
            self.extensions = []


setup(
    ext_modules=[
        CppExtension(
            "em_kernels._C",
            [f"csrc/{name}.cpp" for name in SOURCES],
            depends=[f"csrc/{name}.h" for name in HEADERS],
            extra_compile_args=COMPILE_ARGS,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
