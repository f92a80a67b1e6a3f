// Registers em_kernels::row_statistics, row_gradient and column_mass for fp32 logits on the CPU.
#include <Python.h>

#include <vector>

#include "row_operations.h"

namespace {

using namespace em;

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
  check_out(y, out);
  if (out.scalar_type() == ScalarType::Float)
    return run_row_gradient<float>(terms, out, isa);
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
