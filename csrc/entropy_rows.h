// Equations (1)-(8) of em_kernels/reference.py for rows of fp32 logits; torch-free.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// Inlined into each instruction set's copy of the loops.
#define EM_INLINE inline __attribute__((always_inline))

namespace em {

constexpr float MIN_EXPONENT = -87.0f;  // e^-87.34 is the smallest normal fp32
constexpr int BLOCK_V = 1024;  // measured (Xeon with AVX-512, 2026-11): 0.47 ns a logit, 2048: 0.55

template <class To, class From>
EM_INLINE To bit_cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Clamps from below to where e^x would be denormal; NaN stays NaN.
EM_INLINE float clamp_exponent(float x) { return x < MIN_EXPONENT ? MIN_EXPONENT : x; }

// e^x = scale + scale * expm1_r
struct ExpParts {
  float scale, expm1_r;
};

// e^x = 2^n e^r with x = n ln 2 + r, for x in [-87, 87] or NaN.
EM_INLINE ExpParts exp_parts(float x) {
  constexpr float LOG2_E = 1.44269504f;
  constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;  // n * LN2_HIGH is exact
  constexpr float ROUND_TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x)
  const float shifted = x * LOG2_E + ROUND_TO_INTEGER;
  const float n = shifted - ROUND_TO_INTEGER;
  const float r = (x - n * LN2_HIGH) - n * LN2_LOW;
  // Minimax (Remez) of expm1 on |r| <= ln(2)/2, relative error 1.3e-8.
  const float head = (1.38825167e-3f * r + 8.36654713e-3f) * r + 4.16672007e-2f;
  const float tail = (head * r + 1.66665434e-1f) * r + 4.99999981e-1f;
  return {bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u), r * r * tail + r};
}

// e^x for x in [-87, 87] or NaN; measured over every float in [-87, -1e-30]: at most 1.05 ulp from
// fp64.
EM_INLINE float exp_in_range(float x) {
  const ExpParts e = exp_parts(x);
  return e.scale * e.expm1_r + e.scale;
}

// e^x for x = clamp_exponent(unclamped), exactly 0 where that clamped.
EM_INLINE float exp_or_zero(float x, float unclamped) {
  const float e = exp_in_range(x);
  return unclamped < MIN_EXPONENT ? 0.0f : e;
}

struct Tanh {
  float value, slope;  // measured over every float: at most 1.3 and 3.5 ulp from fp64
};

EM_INLINE Tanh tanh_and_slope(float x) {
  const float size = std::fabs(x), square = x * x;
  // Minimax (Remez) of tanh on |x| <= 0.7, relative error 1.5e-8.
  const float head = (-5.13866215e-3f * square + 2.00919700e-2f) * square - 5.35588612e-2f;
  const float tail = (head * square + 1.33291107e-1f) * square - 3.33331899e-1f;
  const float small = size * square * tail + size;
  const float e = exp_in_range(clamp_exponent(-2.0f * size));
  const float complement = 2.0f * e / (1.0f + e);
  const bool is_small = size < 0.7f;
  return {std::copysign(is_small ? small : 1.0f - complement, x),
          is_small ? 1.0f - small * small : complement * (2.0f - complement)};
}

// Arguments that all operations share. Row i starts at y + i * row_stride.
struct Logits {
  const float* y;
  int64_t row_stride, rows, columns;
  const float* bias;             // (columns,) or null
  const float* inv_temperature;  // (rows,)
  const int64_t* targets;        // (rows,) or null
  float logit_scale, softcap;    // softcap 0: none
};

// Fetches the next block while this one is computed (measured: 0.55 to 0.47 ns a logit).
EM_INLINE void prefetch(const float* y, int64_t count) {
  for (int64_t j = 0; j < std::min<int64_t>(count, BLOCK_V); j += 64 / sizeof(float))
    __builtin_prefetch(y + j, 0, 2);
}

// Maps a float's bits to an integer of the same order, and back.
EM_INLINE int32_t order_key(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// Writes z of one block; for the gradient also the slope dc/du, else returns the maximum.
template <bool has_bias, bool has_softcap, bool for_gradient>
EM_INLINE float transform(const Logits& logits, const float* __restrict y, int64_t start, int count,
                          float inv_temperature, float* __restrict z, float* __restrict slope) {
  const float* bias = has_bias ? logits.bias + start : nullptr;
  const float scale = has_softcap ? logits.logit_scale / logits.softcap : logits.logit_scale;
  const float cap = logits.softcap;
  int32_t max = order_key(bit_cast<int32_t>(-INFINITY));  // clang vectorises no float maximum
#pragma omp simd reduction(max : max)
  for (int j = 0; j < count; ++j) {
    const float v = has_bias ? y[j] + bias[j] : y[j];
    float c = scale * v;
    if constexpr (has_softcap) {
      const Tanh t = tanh_and_slope(c);
      c = cap * t.value;
      if constexpr (for_gradient) slope[j] = t.slope;
    }
    const float value = v == -INFINITY ? -INFINITY : c * inv_temperature;
    z[j] = value;
    if constexpr (!for_gradient) {
      const int32_t key = order_key(bit_cast<int32_t>(value));
      max = key > max ? key : max;
    }
  }
  return bit_cast<float>(order_key(max));
}

// The lowest index that reaches max; adds the block's sum of z to row_total.
EM_INLINE int lead_and_total(const float* __restrict z, int count, float max, double& row_total) {
  // If logits are nearly equal, fp32 lanes lose up to 1e-6 of the sum, nothing of differences.
  const float origin = std::isfinite(z[0]) ? z[0] : 0.0f;
  int lead = count;
  float total = 0.0f;
#pragma omp simd reduction(min : lead) reduction(+ : total)
  for (int j = 0; j < count; ++j) {
    const int candidate = z[j] == max ? j : count;
    lead = candidate < lead ? candidate : lead;
    total += z[j] - origin;
  }
  double exact = total + static_cast<double>(count) * origin;
  if (!std::isfinite(exact)) {  // a -inf, a NaN, or a sum beyond fp32
    exact = 0.0;
#pragma omp simd reduction(+ : exact)
    for (int j = 0; j < count; ++j) exact += z[j];
  }
  row_total += exact;
  return lead;
}

// Equation (1) over a part of a row.
struct Part {
  double max, s, t, q;  // s and q without the argmax's own 1
  int64_t argmax;
};

// Equation (7); `earlier` holds the lower columns and so wins ties.
inline Part merge(const Part& earlier, const Part& later) {
  const bool earlier_wins = earlier.max >= later.max;
  const Part &high = earlier_wins ? earlier : later, &low = earlier_wins ? later : earlier;
  if (low.argmax < 0) return high;
  const double shift = low.max - high.max;
  const double r = shift < MIN_EXPONENT ? 0.0 : std::exp(shift);
  return {high.max, high.s + r * (1.0 + low.s), high.t + r * (low.t + (1.0 + low.s) * shift),
          high.q + r * r * (1.0 + low.q), high.argmax};
}

// z[argmax] must already be -inf.
EM_INLINE Part sum_block(const float* __restrict z, int count, float max, int64_t argmax) {
  float s = 0.0f, t = 0.0f, q = 0.0f;
#pragma omp simd reduction(+ : s, t, q)
  for (int j = 0; j < count; ++j) {
    const float x = z[j] - max;
    const float clamped = clamp_exponent(x);
    const float e = exp_or_zero(clamped, x);
    s += e;
    t += e * clamped;
    q += e * e;
  }
  return {max, s, t, q, argmax};
}

struct RowStatistics : Logits {
  float* parts;  // (6, rows): m, s', t, target logit, q', sum of z
  int64_t* argmax;

  template <bool has_bias, bool has_softcap>
  EM_INLINE void run(int64_t row) const {
    const float* y_row = y + row * row_stride;
    const int64_t k = targets ? targets[row] : -1;
    alignas(64) float z[BLOCK_V];
    Part sums{-INFINITY, 0.0, 0.0, 0.0, -1};
    double total = 0.0;
    float target_logit = -INFINITY;
    bool valid = true;
    for (int64_t start = 0; valid && start < columns; start += BLOCK_V) {
      const int count = static_cast<int>(std::min<int64_t>(BLOCK_V, columns - start));
      const float max = transform<has_bias, has_softcap, false>(
          *this, y_row + start, start, count, inv_temperature[row], z, nullptr);
      prefetch(y_row + start + count, columns - start - count);
      const int lead = lead_and_total(z, count, max, total);
      valid = !std::isnan(total) && max != INFINITY;
      if (k >= start && k < start + count) target_logit = z[k - start];
      if (!valid || max == -INFINITY) continue;
      z[lead] = -INFINITY;
      sums = merge(sums, sum_block(z, count, max, start + lead));
    }
    const double values[6] = {sums.max, sums.s, sums.t, target_logit, sums.q, total};
    for (int i = 0; i < 6; ++i)
      parts[i * rows + row] = valid ? static_cast<float>(values[i]) : NAN;
    argmax[row] = valid ? sums.argmax : -1;
  }
};

// p (alpha + beta log p + rho p) of equation (8).
EM_INLINE float p_terms(float log_p, float alpha, float beta, float rho) {
  const float clamped = clamp_exponent(log_p);
  const float p = exp_or_zero(clamped, log_p);
  return p * (alpha + beta * clamped + rho * p);
}

struct Bfloat16 {
  uint16_t bits;
};

// Rounds to nearest, ties to even; NaN stays NaN.
EM_INLINE void store(float value, Bfloat16& to) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

EM_INLINE void store(float value, float& to) { to = value; }

// Equation (8) of rows whose m and log s are known.
struct RowTerms : Logits {
  const float *m, *log_s;     // (rows,)
  const float* coefficients;  // (6, rows): alpha, beta, gamma, delta, rho, at_target

  // dy of `count` columns from `start` on. Writes each element after all reads of it.
  template <bool has_bias, bool has_softcap, class Out>
  EM_INLINE void gradient_block(int64_t row, int64_t start, int count, Out* __restrict dy) const {
    const float max = m[row], log_sum = log_s[row];
    if (!std::isfinite(max) || !std::isfinite(log_sum)) {
      for (int j = 0; j < count; ++j) store(NAN, dy[j]);
      return;
    }
    const float alpha = coefficients[row], beta = coefficients[rows + row];
    const float gamma = coefficients[2 * rows + row], delta = coefficients[3 * rows + row];
    const float rho = coefficients[4 * rows + row], at_target = coefficients[5 * rows + row];
    const float scale = inv_temperature[row] * logit_scale;
    alignas(64) float z[BLOCK_V], slope[has_softcap ? BLOCK_V : 1];
    transform<has_bias, has_softcap, true>(*this, y + row * row_stride + start, start, count,
                                           inv_temperature[row], z, slope);
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const float log_p = (z[j] - max) - log_sum;
      const float dz = p_terms(log_p, alpha - gamma, beta, rho) + delta;
      const float dc = has_softcap ? dz * scale * slope[j] : dz * scale;
      store(z[j] == -INFINITY ? 0.0f : dc, dy[j]);
    }
    const int64_t k = targets ? targets[row] : -1;
    if (k < start || k >= start + count || z[k - start] == -INFINITY) return;
    const int j = static_cast<int>(k - start);
    const float log_p = (z[j] - max) - log_sum;
    const float dz = p_terms(log_p, alpha, beta, rho) + at_target + delta;
    store(dz * scale * (has_softcap ? slope[j] : 1.0f), dy[j]);
  }
};

// A row of `out` may begin where its row of y does: each element is read before it is overwritten.
template <class Out>
struct RowGradient : RowTerms {
  Out* out;
  int64_t out_stride;

  template <bool has_bias, bool has_softcap>
  EM_INLINE void run(int64_t row) const {
    for (int64_t start = 0; start < columns; start += BLOCK_V) {
      const int count = static_cast<int>(std::min<int64_t>(BLOCK_V, columns - start));
      prefetch(y + row * row_stride + start + count, columns - start - count);
      gradient_block<has_bias, has_softcap>(row, start, count, out + row * out_stride + start);
    }
  }
};

// Sums of |dy| over the rows, and of dy over one block of columns; dy itself is never stored.
struct ColumnMass : RowTerms {
  float* mass;      // (columns,)
  float* row_sums;  // (blocks of columns, rows)

  template <bool has_bias, bool has_softcap>
  EM_INLINE void run(int64_t block) const {
    const int64_t start = block * BLOCK_V;
    const int count = static_cast<int>(std::min<int64_t>(BLOCK_V, columns - start));
    alignas(64) float dy[BLOCK_V], total[BLOCK_V] = {};
    for (int64_t row = 0; row < rows; ++row) {
      if (row + 1 < rows) prefetch(y + (row + 1) * row_stride + start, count);
      gradient_block<has_bias, has_softcap>(row, start, count, dy);
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int j = 0; j < count; ++j) {
        total[j] += std::fabs(dy[j]);
        sum += dy[j];
      }
      row_sums[block * rows + row] = sum;
    }
    for (int j = 0; j < count; ++j) mass[start + j] = total[j];
  }
};

}  // namespace em
