// Registers em_kernels::divergence_sums and divergence_gradient for fp32 logits on the CPU.
#include "divergence_rows.h"

#include "row_operations.h"

namespace {

using namespace em;

Pair checked_pair(const Tensor& y, const std::optional<Tensor>& bias, const Tensor& inv_temperature,
                  double logit_scale, std::optional<double> softcap, const Tensor& ref_y,
                  const std::optional<Tensor>& ref_bias, double ref_logit_scale,
                  std::optional<double> ref_softcap, const Tensor& per_row, double beta) {
  Pair pair{checked_logits(y, bias, inv_temperature, logit_scale, softcap, std::nullopt)};
  pair.ref = checked_logits(ref_y, ref_bias, inv_temperature, ref_logit_scale, ref_softcap,
                            std::nullopt);
  STD_TORCH_CHECK(pair.ref.columns == pair.columns, "ref_y must have y's shape ",
                  shape_text(y.sizes()), ", not ", shape_text(ref_y.sizes()));
  pair.per_row = data_of<const float>(per_row, "per_row", {7, pair.rows});
  STD_TORCH_CHECK(beta >= 0.0 && beta <= 1.0, "beta must be in [0, 1], not ", beta);
  pair.beta = static_cast<float>(beta);
  pair.rest = static_cast<float>(1.0 - beta);
  pair.is_forward = beta == 0.0;
  pair.is_reverse = beta == 1.0;
  return pair;
}

void divergence_sums(Tensor y, std::optional<Tensor> bias, Tensor inv_temperature,
                     double logit_scale, std::optional<double> softcap, Tensor ref_y,
                     std::optional<Tensor> ref_bias, double ref_logit_scale,
                     std::optional<double> ref_softcap, Tensor per_row, double beta, Tensor sums,
                     int64_t isa) {
  DivergenceSums operation{checked_pair(y, bias, inv_temperature, logit_scale, softcap, ref_y,
                                        ref_bias, ref_logit_scale, ref_softcap, per_row, beta)};
  operation.sums = data_of<float>(sums, "sums", {2, operation.rows});
  for_all(operation, operation.rows, operation.columns, isa);
}

template <class Out>
void run_gradient(const Pair& pair, const Tensor& out, int64_t isa) {
  DivergenceGradient<Out> operation{pair};
  operation.out = static_cast<Out*>(out.mutable_data_ptr());
  operation.out_stride = out.stride(0);
  for_all(operation, operation.rows, operation.columns, isa);
}

void divergence_gradient(Tensor y, std::optional<Tensor> bias, Tensor inv_temperature,
                         double logit_scale, std::optional<double> softcap, Tensor ref_y,
                         std::optional<Tensor> ref_bias, double ref_logit_scale,
                         std::optional<double> ref_softcap, Tensor per_row, double beta,
                         Tensor out, int64_t isa) {
  const Pair pair = checked_pair(y, bias, inv_temperature, logit_scale, softcap, ref_y, ref_bias,
                                 ref_logit_scale, ref_softcap, per_row, beta);
  check_out(y, out);
  if (out.scalar_type() == ScalarType::Float) return run_gradient<float>(pair, out, isa);
  run_gradient<Bfloat16>(pair, out, isa);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(em_kernels, library) {
  library.def(
      "divergence_sums(Tensor y, Tensor? bias, Tensor inv_temperature, float logit_scale, "
      "float? softcap, Tensor ref_y, Tensor? ref_bias, float ref_logit_scale, float? ref_softcap, "
      "Tensor per_row, float beta, Tensor(a!) sums, int isa) -> ()");
  library.def(
      "divergence_gradient(Tensor y, Tensor? bias, Tensor inv_temperature, float logit_scale, "
      "float? softcap, Tensor ref_y, Tensor? ref_bias, float ref_logit_scale, float? ref_softcap, "
      "Tensor per_row, float beta, Tensor(a!) out, int isa) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(em_kernels, CPU, library) {
  library.impl("divergence_sums", TORCH_BOX(&divergence_sums));
  library.impl("divergence_gradient", TORCH_BOX(&divergence_gradient));
}
