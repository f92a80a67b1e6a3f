// Equations (10) and (11) of em_kernels/reference_divergence.py for rows of fp32 logits; torch-free.
#pragma once

#include "entropy_rows.h"

namespace em {

constexpr float MAX_EXPONENT = 80.0f;  // of ratios: what is beyond is multiplied by less than e^-80

// The logarithm of x > 0, normal.
EM_INLINE float log_of_normal(float x) {
  constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;  // n * LN2_HIGH is exact
  constexpr uint32_t SQRT_HALF = 0x3f3504f3u;
  const uint32_t shifted = bit_cast<uint32_t>(x) - SQRT_HALF;
  const float n = static_cast<float>(bit_cast<int32_t>(shifted) >> 23);
  const float mantissa = bit_cast<float>((shifted & 0x007fffffu) + SQRT_HALF);  // below sqrt(2)
  // 2 atanh(w), |w| <= 0.172; the series' next term is below 1e-9 of it.
  const float w = (mantissa - 1.0f) / (mantissa + 1.0f), square = w * w;
  const float tail = ((square * (1.0f / 9) + 1.0f / 7) * square + 1.0f / 5) * square + 1.0f / 3;
  return n * LN2_HIGH + (n * LN2_LOW + 2.0f * (w * square * tail + w));
}

// log(1 + x) for x in [-0.5, 1].
EM_INLINE float log1p_near(float x) {
  const float w = x / (2.0f + x), square = w * w;  // 2 atanh(w), |w| <= 1/3
  float tail = ((square * (1.0f / 15) + 1.0f / 13) * square + 1.0f / 11) * square + 1.0f / 9;
  tail = ((tail * square + 1.0f / 7) * square + 1.0f / 5) * square + 1.0f / 3;
  return 2.0f * (w * square * tail + w);
}

EM_INLINE float clamp_ratio(float x) { return clamp_exponent(x > MAX_EXPONENT ? MAX_EXPONENT : x); }

// e^x - 1
EM_INLINE float expm1_of_ratio(float x) {
  const ExpParts e = exp_parts(clamp_ratio(x));
  return e.scale * e.expm1_r + (e.scale - 1.0f);
}

// log(rest + share e^x), for share + rest = 1.
EM_INLINE float log_mixture(float x, float share, float rest) {
  const ExpParts e = exp_parts(clamp_ratio(x));
  const float change = share * (e.scale * e.expm1_r + (e.scale - 1.0f));
  const float sum = rest + share * (e.scale * e.expm1_r + e.scale);
  const bool is_near = change > -0.5f && change < 1.0f;
  const float near = log1p_near(is_near ? change : 0.0f);
  return is_near ? near : log_of_normal(sum);
}

EM_INLINE float probability(float log_p) { return exp_or_zero(clamp_exponent(log_p), log_p); }

EM_INLINE float log_ratio_of(float log_p, float log_q) {
  return log_p == log_q ? 0.0f : log_p - log_q;  // both -inf: nothing to tell apart
}

// p log(p / q): 0 where p is 0, inf where only q is.
EM_INLINE float times(float p, float log_ratio) {
  const float product = log_ratio == -INFINITY ? 0.0f : p * log_ratio;
  return log_ratio == INFINITY ? INFINITY : product;
}

// p log(p / q) - p + q >= 0, by its Taylor series where p is near q.
EM_INLINE float excess(float p, float q, float log_ratio) {
  const float x = log_ratio;
  const float series = (((1.0f / 720 * x - 1.0f / 120) * x + 1.0f / 24) * x - 1.0f / 6) * x + 0.5f;
  return std::fabs(x) < 0.25f ? p * (x * x * series) : times(p, x) - p + q;
}

// A model's logits and those of a reference, with the same rows, columns and temperatures.
struct Pair : Logits {
  Logits ref;
  // (7, rows): m, log s, the reference's m, log s; log(p / q) at p's argmax; c; the row's weight
  const float* per_row;
  float beta, rest;             // rest = 1 - beta
  bool is_forward, is_reverse;  // beta is 0, or 1, before it was rounded to fp32

  EM_INLINE bool is_finite(int64_t row) const {
    bool finite = true;
    for (int i = 0; i < 4; ++i) finite = finite && std::isfinite(per_row[i * rows + row]);
    return finite;
  }

  template <bool has_bias, bool has_softcap>
  EM_INLINE void log_probabilities(const Logits& logits, int64_t row, int64_t start, int count,
                                   int head, float* __restrict log_p,
                                   float* __restrict slope) const {
    transform<has_bias, has_softcap, true>(logits, logits.y + row * logits.row_stride + start,
                                           start, count, logits.inv_temperature[row], log_p, slope);
    const float max = per_row[2 * head * rows + row], log_sum = per_row[(2 * head + 1) * rows + row];
#pragma omp simd
    for (int j = 0; j < count; ++j) log_p[j] = (log_p[j] - max) - log_sum;
  }

  // Overwrites `unused`.
  EM_INLINE void ref_log_probabilities(int64_t row, int64_t start, int count,
                                       float* __restrict log_q, float* __restrict unused) const {
    if (ref.bias && ref.softcap != 0.0f)
      log_probabilities<true, true>(ref, row, start, count, 1, log_q, unused);
    else if (ref.bias) log_probabilities<true, false>(ref, row, start, count, 1, log_q, unused);
    else if (ref.softcap != 0.0f)
      log_probabilities<false, true>(ref, row, start, count, 1, log_q, unused);
    else log_probabilities<false, false>(ref, row, start, count, 1, log_q, unused);
  }
};

struct DivergenceSums : Pair {
  float* sums;  // (2, rows): (10), and c of (11)

  template <bool has_bias, bool has_softcap>
  EM_INLINE void run(int64_t row) const {
    alignas(64) float log_p[BLOCK_V], log_q[BLOCK_V], unused[BLOCK_V];
    const bool finite = is_finite(row);
    const float pivot = per_row[4 * rows + row], of_pivot = -log_mixture(-pivot, beta, rest);
    double value = 0.0, centre = 0.0;
    for (int64_t start = 0; finite && start < columns; start += BLOCK_V) {
      const int count = static_cast<int>(std::min<int64_t>(BLOCK_V, columns - start));
      ref_log_probabilities(row, start, count, log_q, unused);
      log_probabilities<has_bias, has_softcap>(*this, row, start, count, 0, log_p, unused);
      float block_value = 0.0f, block_centre = 0.0f;
      if (is_reverse) {
#pragma omp simd reduction(+ : block_value, block_centre)
        for (int j = 0; j < count; ++j) {
          const float p = probability(log_p[j]), x = log_ratio_of(log_p[j], log_q[j]);
          block_value += excess(p, probability(log_q[j]), x);
          block_centre += times(p, x - pivot);
        }
      } else if (is_forward) {
#pragma omp simd reduction(+ : block_value)
        for (int j = 0; j < count; ++j) {
          const float q = probability(log_q[j]), x = log_ratio_of(log_q[j], log_p[j]);
          block_value += excess(q, probability(log_p[j]), x);
        }
      } else {
#pragma omp simd reduction(+ : block_value, block_centre)
        for (int j = 0; j < count; ++j) {
          const float p = probability(log_p[j]), q = probability(log_q[j]);
          const float x = log_ratio_of(log_p[j], log_q[j]), mixture = beta * q + rest * p;
          const float of_p = -log_mixture(-x, beta, rest), of_q = -log_mixture(x, rest, beta);
          block_value += rest * excess(p, mixture, of_p) + beta * excess(q, mixture, of_q);
          block_centre += p * (of_p - of_pivot);
        }
      }
      value += block_value;
      centre += block_centre;
    }
    sums[row] = finite ? static_cast<float>(value) : NAN;
    sums[rows + row] = finite ? static_cast<float>(centre) : NAN;
  }
};

// A row of `out` may begin where its row of y does: each element is read before it is overwritten.
template <class Out>
struct DivergenceGradient : Pair {
  Out* out;
  int64_t out_stride;

  template <bool has_bias, bool has_softcap>
  EM_INLINE void run(int64_t row) const {
    alignas(64) float log_p[BLOCK_V], log_q[BLOCK_V], slope[BLOCK_V], dz[BLOCK_V];
    const float pivot = per_row[4 * rows + row], of_pivot = -log_mixture(-pivot, beta, rest);
    const float centre = per_row[5 * rows + row];
    const float scale = per_row[6 * rows + row] * inv_temperature[row] * logit_scale;
    const bool finite = is_finite(row) && std::isfinite(centre);
    for (int64_t start = 0; start < columns; start += BLOCK_V) {
      const int count = static_cast<int>(std::min<int64_t>(BLOCK_V, columns - start));
      Out* __restrict dy = out + row * out_stride + start;
      if (!finite) {
        for (int j = 0; j < count; ++j) store(NAN, dy[j]);
        continue;
      }
      ref_log_probabilities(row, start, count, log_q, slope);
      log_probabilities<has_bias, has_softcap>(*this, row, start, count, 0, log_p, slope);
      if (is_reverse) {
#pragma omp simd
        for (int j = 0; j < count; ++j)
          dz[j] = probability(log_p[j]) * ((log_ratio_of(log_p[j], log_q[j]) - pivot) - centre);
      } else if (is_forward) {
#pragma omp simd
        for (int j = 0; j < count; ++j) {
          const float x = log_ratio_of(log_p[j], log_q[j]);
          const float change = expm1_of_ratio(-std::fabs(x));
          const float larger = probability(x < 0.0f ? log_q[j] : log_p[j]);
          dz[j] = x < 0.0f ? larger * change : -larger * change;
        }
      } else {
#pragma omp simd
        for (int j = 0; j < count; ++j) {
          const float of_p = -log_mixture(-log_ratio_of(log_p[j], log_q[j]), beta, rest);
          dz[j] = rest * probability(log_p[j]) * ((of_p - of_pivot) - centre);
        }
      }
#pragma omp simd
      for (int j = 0; j < count; ++j) {
        const float value = has_softcap ? dz[j] * scale * slope[j] : dz[j] * scale;
        store(log_p[j] == -INFINITY ? 0.0f : value, dy[j]);
      }
    }
  }
};

}  // namespace em
