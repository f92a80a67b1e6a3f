// What the operations on rows share: checks of tensors, and a copy of each loop by instruction set.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>

#include "entropy_rows.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace em {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

template <class T>
T* data_of(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  constexpr bool is_float = std::is_same_v<std::remove_const_t<T>, float>;
  constexpr ScalarType dtype = is_float ? ScalarType::Float : ScalarType::Long;
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), name,
                  " must have shape ", shape_text(shape), ", not ", shape_text(sizes));
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", is_float ? "float32" : "int64",
                  ", not ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  if constexpr (std::is_const_v<T>) return static_cast<T*>(tensor.const_data_ptr());
  else return static_cast<T*>(tensor.mutable_data_ptr());
}

inline em::Logits checked_logits(const Tensor& y, const std::optional<Tensor>& bias,
                          const Tensor& inv_temperature, double logit_scale,
                          std::optional<double> softcap, const std::optional<Tensor>& targets) {
  STD_TORCH_CHECK(y.dim() == 2, "y must be (rows, columns), not ", shape_text(y.sizes()));
  STD_TORCH_CHECK(y.scalar_type() == ScalarType::Float, "y must be float32, not ",
                  torch::headeronly::toString(y.scalar_type()));
  const int64_t rows = y.size(0), columns = y.size(1);
  STD_TORCH_CHECK(columns <= 1 || y.stride(1) == 1, "y must have stride 1 along its columns, not ",
                  y.stride(1));
  em::Logits logits;
  logits.y = static_cast<const float*>(y.const_data_ptr());
  logits.row_stride = y.stride(0);
  logits.rows = rows;
  logits.columns = columns;
  logits.bias = bias ? data_of<const float>(*bias, "bias", {columns}) : nullptr;
  logits.inv_temperature = data_of<const float>(inv_temperature, "inv_temperature", {rows});
  logits.targets = targets ? data_of<const int64_t>(*targets, "targets", {rows}) : nullptr;
  logits.logit_scale = static_cast<float>(logit_scale);
  logits.softcap = static_cast<float>(softcap.value_or(0.0));
  STD_TORCH_CHECK(!softcap || (logits.softcap > 0.0f && std::isnormal(logits.softcap)),
                  "softcap must be positive and finite, not ", *softcap);
  return logits;
}

template <class Operation>
EM_INLINE void run_all(const Operation& operation, int64_t begin, int64_t end) {
  const bool has_bias = operation.bias != nullptr, has_softcap = operation.softcap != 0.0f;
  for (int64_t i = begin; i < end; ++i) {
    if (has_bias && has_softcap) operation.template run<true, true>(i);
    else if (has_bias) operation.template run<true, false>(i);
    else if (has_softcap) operation.template run<false, true>(i);
    else operation.template run<false, false>(i);
  }
}

#if defined(__x86_64__)
// Not target_clones, which needs glibc's ifunc, and whose arch=haswell leaves AMD on the baseline.
template <class Operation>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void run_avx512(
    const Operation& operation, int64_t begin, int64_t end) {
  run_all(operation, begin, end);
}

template <class Operation>
__attribute__((target("avx2,fma"))) void run_avx2(const Operation& operation, int64_t begin,
                                                  int64_t end) {
  run_all(operation, begin, end);
}
#endif

// A denormal e * e or p * alpha costs a microcode assist: rows were measured up to 20 times slower.
struct FlushDenormals {
#if defined(__x86_64__)
  const unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }  // results (0x8000) and operands (0x0040)
  ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

// Instruction sets, numbered as in em_kernels/kernels/cpu.py; a CPU with one has all lower ones.
enum Isa : int64_t { BASELINE, AVX2, AVX512 };

inline int64_t row_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return BASELINE;
}

template <class Operation>
void run_with(int64_t isa, const Operation& operation, int64_t begin, int64_t end) {
  [[maybe_unused]] const FlushDenormals flush_denormals;
#if defined(__x86_64__)
  if (isa == AVX512) return run_avx512(operation, begin, end);
  if (isa == AVX2) return run_avx2(operation, begin, end);
#endif
  run_all(operation, begin, end);
}

// Runs `count` parts of `elements` elements each.
template <class Operation>
void for_all(const Operation& operation, int64_t count, int64_t elements, int64_t isa) {
  STD_TORCH_CHECK(isa >= BASELINE && isa <= row_isa(),
                  "isa must be 0 (baseline), 1 (AVX2) or 2 (AVX-512), and at most this CPU's ",
                  row_isa(), ", not ", isa);
  constexpr int64_t GRAIN_SIZE = 32768;  // elements that pay for a thread: at::internal::GRAIN_SIZE
  const int64_t per_task = std::max<int64_t>(1, GRAIN_SIZE / (elements + 1));
  torch::stable::parallel_for(0, count, per_task, [&](int64_t begin, int64_t end) {
    run_with(isa, operation, begin, end);
  });
}

// Checks memory for a gradient of y; it may be y's own.
inline void check_out(const Tensor& y, const Tensor& out) {
  const auto y_sizes = y.sizes(), sizes = out.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), y_sizes.begin(), y_sizes.end()),
                  "out must have y's shape ", shape_text(y_sizes), ", not ", shape_text(sizes));
  STD_TORCH_CHECK(y.size(1) <= 1 || out.stride(1) == 1,
                  "out must have stride 1 along its columns, not ", out.stride(1));
  STD_TORCH_CHECK(y.size(0) <= 1 || out.stride(0) >= y.size(1),
                  "out's rows must not overlap: row stride ", out.stride(0), " with ",
                  y.size(1), " columns");
  STD_TORCH_CHECK(
      out.scalar_type() == ScalarType::Float || out.scalar_type() == ScalarType::BFloat16,
      "out must be float32 or bfloat16, not ", torch::headeronly::toString(out.scalar_type()));
}

}  // namespace em
