// Registers em_kernels::row_statistics, row_gradient and column_mass for fp32 logits on the CPU.
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "entropy_rows.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

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

em::Logits checked_logits(const Tensor& y, const std::optional<Tensor>& bias,
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

int64_t row_isa() {
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

void row_statistics(Tensor y, std::optional<Tensor> bias, Tensor inv_temperature,
                    double logit_scale, std::optional<double> softcap,
                    std::optional<Tensor> targets, Tensor parts, Tensor argmax, int64_t isa) {
  em::RowStatistics operation{
      checked_logits(y, bias, inv_temperature, logit_scale, softcap, targets)};
  operation.parts = data_of<float>(parts, "parts", {6, operation.rows});
  operation.argmax = data_of<int64_t>(argmax, "argmax", {operation.rows});
  for_all(operation, operation.rows, operation.columns, isa);
}

em::RowTerms checked_terms(const em::Logits& logits, const Tensor& m, const Tensor& log_s,
                           const Tensor& coefficients) {
  em::RowTerms terms{logits};
  terms.m = data_of<const float>(m, "m", {terms.rows});
  terms.log_s = data_of<const float>(log_s, "log_s", {terms.rows});
  terms.coefficients = data_of<const float>(coefficients, "coefficients", {6, terms.rows});
  return terms;
}

template <class Out>
void run_row_gradient(const em::RowTerms& terms, const Tensor& out, int64_t isa) {
  em::RowGradient<Out> operation{terms};
  operation.out = static_cast<Out*>(out.mutable_data_ptr());
  operation.out_stride = out.stride(0);
  for_all(operation, operation.rows, operation.columns, isa);
}

void row_gradient(Tensor y, std::optional<Tensor> bias, Tensor inv_temperature, double logit_scale,
                  std::optional<double> softcap, std::optional<Tensor> targets, Tensor m,
                  Tensor log_s, Tensor coefficients, Tensor out, int64_t isa) {
  const em::RowTerms terms =
      checked_terms(checked_logits(y, bias, inv_temperature, logit_scale, softcap, targets), m,
                    log_s, coefficients);
  const auto y_sizes = y.sizes(), sizes = out.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), y_sizes.begin(), y_sizes.end()),
                  "out must have y's shape ", shape_text(y_sizes), ", not ", shape_text(sizes));
  STD_TORCH_CHECK(terms.columns <= 1 || out.stride(1) == 1,
                  "out must have stride 1 along its columns, not ", out.stride(1));
  STD_TORCH_CHECK(terms.rows <= 1 || out.stride(0) >= terms.columns,
                  "out's rows must not overlap: row stride ", out.stride(0), " with ",
                  terms.columns, " columns");
  if (out.scalar_type() == ScalarType::Float)
    return run_row_gradient<float>(terms, out, isa);
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::BFloat16,
                  "out must be float32 or bfloat16, not ",
                  torch::headeronly::toString(out.scalar_type()));
  run_row_gradient<em::Bfloat16>(terms, out, isa);
}

void column_mass(Tensor y, std::optional<Tensor> bias, Tensor inv_temperature, double logit_scale,
                 std::optional<double> softcap, std::optional<Tensor> targets, Tensor m,
                 Tensor log_s, Tensor coefficients, Tensor mass, Tensor row_sums, int64_t isa) {
  em::ColumnMass operation{
      checked_terms(checked_logits(y, bias, inv_temperature, logit_scale, softcap, targets), m,
                    log_s, coefficients)};
  const int64_t rows = operation.rows;
  const int64_t blocks = (operation.columns + em::BLOCK_V - 1) / em::BLOCK_V;
  std::vector<float> partial(blocks * rows);
  operation.mass = data_of<float>(mass, "mass", {operation.columns});
  operation.row_sums = partial.data();
  for_all(operation, blocks, rows * em::BLOCK_V, isa);
  float* sums = data_of<float>(row_sums, "row_sums", {rows});
  for (int64_t row = 0; row < rows; ++row) {  // an order that no thread count changes
    double sum = 0.0;
    for (int64_t block = 0; block < blocks; ++block) sum += partial[block * rows + row];
    sums[row] = static_cast<float>(sum);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(em_kernels, library) {
  library.def("row_isa() -> int");
  library.def(
      "row_statistics(Tensor y, Tensor? bias, Tensor inv_temperature, float logit_scale, "
      "float? softcap, Tensor? targets, Tensor(a!) parts, Tensor(b!) argmax, int isa) -> ()");
  library.def(
      "row_gradient(Tensor y, Tensor? bias, Tensor inv_temperature, float logit_scale, "
      "float? softcap, Tensor? targets, Tensor m, Tensor log_s, Tensor coefficients, "
      "Tensor(a!) out, int isa) -> ()");
  library.def(
      "column_mass(Tensor y, Tensor? bias, Tensor inv_temperature, float logit_scale, "
      "float? softcap, Tensor? targets, Tensor m, Tensor log_s, Tensor coefficients, "
      "Tensor(a!) mass, Tensor(b!) row_sums, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(em_kernels, CPU, library) {
  library.impl("row_statistics", TORCH_BOX(&row_statistics));
  library.impl("row_gradient", TORCH_BOX(&row_gradient));
  library.impl("column_mass", TORCH_BOX(&column_mass));
}

STABLE_TORCH_LIBRARY_IMPL(em_kernels, CompositeExplicitAutograd, library) {
  library.impl("row_isa", TORCH_BOX(&row_isa));
}

// Importing em_kernels._C is what loads the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
