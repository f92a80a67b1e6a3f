// Registers em_kernels::gemm_bf16 for the CPU: bf16 operands, fp32 result, which torch lacks there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>

// AMX intrinsics need gcc 11 or clang 12; older compilers build no GEMM.
#if __has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>)
#define EM_HAS_AMX_HEADER
#endif
#if defined(__x86_64__) && defined(__linux__) && defined(EM_HAS_AMX_HEADER)
#define EM_GEMM_BF16
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "gemm_bf16.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Isa : int64_t { NONE, AVX512_BF16, AMX };  // as em_kernels/ops/gemm.py names them

#if defined(EM_GEMM_BF16)
// Also asks Linux for the tile registers, as every process must before it uses them.
bool has_amx() {
  // Not __builtin_cpu_supports: clang before 19 does not know "amx-bf16".
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & AMX_BF16) || !(edx & AMX_TILE)) return false;
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

Isa best_isa() {
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl"))
    return NONE;
  return has_amx() ? AMX : AVX512_BF16;
}

em::Operand operand_of(const Tensor& x, const char* name, int k_dim) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, name, " must be bfloat16, not ",
                  torch::headeronly::toString(x.scalar_type()));
  const int line_dim = 1 - k_dim;
  const bool unit_k = x.stride(k_dim) == 1 || x.size(k_dim) <= 1;
  STD_TORCH_CHECK(unit_k || x.stride(line_dim) == 1 || x.size(line_dim) <= 1, name,
                  " must have stride 1 in one of its dimensions, not strides (", x.stride(0), ", ",
                  x.stride(1), ")");
  return {static_cast<const em::bf16*>(x.const_data_ptr()), x.stride(unit_k ? line_dim : k_dim),
          unit_k};
}

// Each thread computes one part of out and packs its own operands: square parts pack the least.
void multiply(const em::Product& product, int64_t rows, int64_t columns, Isa isa) {
  constexpr double GRAIN_SIZE = 1 << 20;  // multiplications that pay for a thread
  const double work = static_cast<double>(rows) * columns * product.inner / GRAIN_SIZE;
  const int64_t most = torch::stable::get_num_threads();
  const int64_t threads = work < most ? static_cast<int64_t>(work) + 1 : most;
  int64_t down = 1, least = INT64_MAX;
  for (int64_t i = 1; i <= threads; ++i) {
    const int64_t packed = em::ceil_div(rows, i) + em::ceil_div(columns, threads / i);
    if (threads % i == 0 && packed < least) least = packed, down = i;
  }
  const int64_t across = threads / down;
  const int64_t part_rows = em::ceil_div(em::ceil_div(rows, down), em::PANEL) * em::PANEL;
  const int64_t part_columns = em::ceil_div(em::ceil_div(columns, across), em::PANEL) * em::PANEL;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    static thread_local const std::unique_ptr<em::Workspace> workspace(new em::Workspace);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = part / across * part_rows, column = part % across * part_columns;
      const int64_t row_end = std::min(rows, row + part_rows);
      const int64_t column_end = std::min(columns, column + part_columns);
      if (row >= row_end || column >= column_end) continue;
      const auto multiply_part = isa == AMX ? em::multiply_part<em::Amx>
                                            : em::multiply_part<em::Avx512>;
      multiply_part(product, row, row_end, column, column_end, *workspace);
    }
  });
}
#endif

int64_t gemm_bf16_isa() {
#if defined(EM_GEMM_BF16)
  static const Isa isa = best_isa();
  return isa;
#else
  return NONE;
#endif
}

void gemm_bf16(Tensor out, Tensor a, Tensor b, bool accumulate, int64_t isa) {
  STD_TORCH_CHECK(isa > NONE && isa <= gemm_bf16_isa(), "isa must be 1 (AVX512-BF16) or 2 (AMX), ",
                  "and at most this CPU's ", gemm_bf16_isa(), ", not ", isa);
  STD_TORCH_CHECK(out.dim() == 2 && a.dim() == 2 && b.dim() == 2,
                  "out, a and b must be matrices, not of ", out.dim(), ", ", a.dim(), " and ",
                  b.dim(), " dimensions");
  STD_TORCH_CHECK(a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1),
                  "out (M, N) = a (M, K) @ b (K, N) cannot be (", out.size(0), ", ", out.size(1),
                  ") = (", a.size(0), ", ", a.size(1), ") @ (", b.size(0), ", ", b.size(1), ")");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "out must be float32, not ",
                  torch::headeronly::toString(out.scalar_type()));
  STD_TORCH_CHECK(out.size(1) <= 1 || out.stride(1) == 1,
                  "out must have stride 1 along its columns, not ", out.stride(1));
  STD_TORCH_CHECK(out.size(0) <= 1 || out.stride(0) >= out.size(1),
                  "out is overwritten, so its rows must not overlap: row stride ", out.stride(0),
                  " with ", out.size(1), " columns");
#if defined(EM_GEMM_BF16)
  const em::Product product{static_cast<float*>(out.mutable_data_ptr()), out.stride(0),
                            operand_of(a, "a", 1), operand_of(b, "b", 0), a.size(1), accumulate};
  multiply(product, out.size(0), out.size(1), static_cast<Isa>(isa));
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(em_kernels, library) {
  library.def("gemm_bf16(Tensor(a!) out, Tensor a, Tensor b, bool accumulate, int isa) -> ()");
  library.def("gemm_bf16_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(em_kernels, CPU, library) {
  library.impl("gemm_bf16", TORCH_BOX(&gemm_bf16));
}

STABLE_TORCH_LIBRARY_IMPL(em_kernels, CompositeExplicitAutograd, library) {
  library.impl("gemm_bf16_isa", TORCH_BOX(&gemm_bf16_isa));
}
