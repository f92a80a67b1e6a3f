// out (+)= a @ b for bf16 operands, fp32 accumulation and output; torch-free, x86-64 only.
//
// A panel is 32 rows of a (or columns of b) over a block of K, packed in tiles of 16 x 32 of K. A
// tile of a holds 16 rows of 32 k. A tile of b holds, for each pair of k, 16 columns' two values
// side by side. Both instruction sets read the same tiles, and flush denormals to zero.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's _mm512_undefined
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace em {

#define EM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define EM_AVX512_INLINE EM_AVX512 inline __attribute__((always_inline))

using bf16 = uint16_t;

constexpr int TILE = 16, TILE_K = 32;
constexpr int TILE_SIZE = TILE * TILE_K;  // 1 KiB
constexpr int PANEL = 2 * TILE;
// Measured (Xeon with AMX and 2 MiB of L2, 2026-11): benchmarks/LOG.md.
constexpr int64_t BLOCK_K = 1024;
constexpr int64_t BLOCK_B_SIZE = 3 << 17;  // elements of b held in L2: 768 KiB

// A line is a row of a or a column of b: element (line, k) is at line * stride + k if unit_k, else
// at line + k * stride.
struct Operand {
  const bf16* data;
  int64_t stride;
  bool unit_k;
  const bf16* at(int64_t line, int64_t k) const {
    return data + (unit_k ? line * stride + k : line + k * stride);
  }
};

struct Product {
  float* out;
  int64_t out_stride;
  Operand a, b;
  int64_t inner;
  bool accumulate;
};

struct Workspace {  // 840 KiB per thread
  alignas(64) bf16 a[PANEL * BLOCK_K];
  alignas(64) bf16 b[BLOCK_B_SIZE];
  alignas(64) float sums[2][PANEL * PANEL];
};

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The first `count` of 16 lanes.
inline __mmask16 first(int64_t count) {
  return count >= 16 ? 0xffff : (1u << std::max<int64_t>(count, 0)) - 1;
}

EM_AVX512_INLINE void transpose(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // x[4 g + c], lane l: column 4 l + c of rows 4 g .. 4 g + 3
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    y[c] = _mm512_shuffle_i32x4(x[c], x[c + 4], 0x88);
    y[c + 4] = _mm512_shuffle_i32x4(x[c], x[c + 4], 0xdd);
    y[c + 8] = _mm512_shuffle_i32x4(x[c + 8], x[c + 12], 0x88);
    y[c + 12] = _mm512_shuffle_i32x4(x[c + 8], x[c + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    x[c] = _mm512_shuffle_i32x4(y[c], y[c + 8], 0x88);
    x[c + 4] = _mm512_shuffle_i32x4(y[c + 4], y[c + 12], 0x88);
    x[c + 8] = _mm512_shuffle_i32x4(y[c], y[c + 8], 0xdd);
    x[c + 12] = _mm512_shuffle_i32x4(y[c + 4], y[c + 12], 0xdd);
  }
}

// Packs one tile and prefetches the memory `ahead` elements further. Pads with zeros beyond `lines`
// and `count`, where memory may hold NaN.
template <bool unit_k, bool transposed>
EM_AVX512_INLINE void pack_tile(const bf16* from, int64_t stride, int64_t ahead, int64_t lines,
                                int64_t count, bf16* to) {
  __m512i x[16];
  if constexpr (unit_k) {
    const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      x[i] = _mm512_maskz_loadu_epi16(i < lines ? mask : 0, from + i * stride);
      _mm_prefetch(reinterpret_cast<const char*>(from + i * stride + ahead), _MM_HINT_T1);
    }
  } else {
    const __mmask16 mask = first(lines);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const bf16* pair = from + 2 * i * stride;
      const __m256i low = _mm256_maskz_loadu_epi16(2 * i < count ? mask : 0, pair);
      const __m256i high = _mm256_maskz_loadu_epi16(2 * i + 1 < count ? mask : 0, pair + stride);
      x[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                             _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      _mm_prefetch(reinterpret_cast<const char*>(pair + ahead), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(pair + stride + ahead), _MM_HINT_T1);
    }
  }
  if constexpr (transposed) transpose(x);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * TILE_K, x[i]);
}

// Packs `lines` lines and `count` k from (line, k) on into panels, reading along contiguous memory.
template <bool unit_k, bool transposed>
EM_AVX512 void pack_as(const Operand& operand, int64_t line, int64_t lines, int64_t k,
                       int64_t count, bf16* to) {
  const int64_t tiles = 2 * ceil_div(lines, PANEL), steps = ceil_div(count, TILE_K);
  const int64_t outer = unit_k ? tiles : steps, inner = unit_k ? steps : tiles;
  const int64_t ahead = unit_k ? TILE * operand.stride
                        : lines > PANEL ? TILE_K * operand.stride : PANEL;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t tile = unit_k ? i : j, step = unit_k ? j : i;
      pack_tile<unit_k, transposed>(
          operand.at(line + tile * TILE, k + step * TILE_K), operand.stride, ahead,
          lines - tile * TILE, count - step * TILE_K,
          to + ((tile / 2 * steps + step) * 2 + tile % 2) * TILE_SIZE);
    }
  }
}

EM_AVX512 inline void pack_a(const Operand& a, int64_t row, int64_t rows, int64_t k, int64_t count,
                             bf16* to) {
  if (a.unit_k) pack_as<true, false>(a, row, rows, k, count, to);
  else pack_as<false, true>(a, row, rows, k, count, to);
}

EM_AVX512 inline void pack_b(const Operand& b, int64_t column, int64_t columns, int64_t k,
                             int64_t count, bf16* to) {
  if (b.unit_k) pack_as<true, true>(b, column, columns, k, count, to);
  else pack_as<false, false>(b, column, columns, k, count, to);
}

enum class Store { PLAIN, STREAM, ADD };

// The product of two panels, stored to out a few rows at a time while the next is computed.
struct Result {
  float* sums;  // (PANEL, PANEL)
  float* out;
  int64_t stride, rows;
  __mmask16 left, right;
  Store how;

  EM_AVX512_INLINE void store_half(const float* from, float* to, __mmask16 mask) const {
    __m512 x = _mm512_load_ps(from);
    if (how == Store::ADD) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, to));
    if (how == Store::STREAM) _mm512_stream_ps(to, x);
    else _mm512_mask_storeu_ps(to, mask, x);
  }

  EM_AVX512_INLINE void store_rows(int64_t count) {
    for (; count > 0 && rows > 0; --count, --rows, sums += PANEL, out += stride) {
      store_half(sums, out, left);
      store_half(sums + TILE, out + TILE, right);
    }
  }

  EM_AVX512_INLINE void prefetch_rows(int64_t begin, int64_t count) const {
    if (how != Store::ADD) return;
    for (int64_t row = begin; row < std::min(begin + count, rows); ++row) {
      __builtin_prefetch(out + row * stride, 1, 2);
      __builtin_prefetch(out + row * stride + TILE, 1, 2);
    }
  }
};

struct Avx512 {
  static void begin() {}
  static void end() {}
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) static void multiply(
      const bf16* a, const bf16* b, int64_t steps, const Result& result, Result& previous) {
    previous.store_rows(PANEL);
    constexpr int ROWS = 8;  // x 32 columns: 16 accumulators
    for (int row = 0; row < PANEL; row += ROWS) {
      const bf16* a_tile = a + row / TILE * TILE_SIZE + row % TILE * TILE_K;
      const bf16* b_tile = b;
      __m512 sum[ROWS][2];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
      for (int64_t step = 0; step < steps; ++step) {
        for (int pair = 0; pair < TILE_K / 2; ++pair) {
          const __m512bh left = (__m512bh)_mm512_load_si512(b_tile + pair * 2 * TILE);
          const __m512bh right = (__m512bh)_mm512_load_si512(b_tile + TILE_SIZE + pair * 2 * TILE);
#pragma GCC unroll 8
          for (int i = 0; i < ROWS; ++i) {
            int both;
            std::memcpy(&both, a_tile + i * TILE_K + pair * 2, sizeof both);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, left);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, right);
          }
        }
        a_tile += 2 * TILE_SIZE;
        b_tile += 2 * TILE_SIZE;
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        _mm512_store_ps(result.sums + (row + i) * PANEL, sum[i][0]);
        _mm512_store_ps(result.sums + (row + i) * PANEL + TILE, sum[i][1]);
      }
    }
  }
};

#define EM_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl")))
// gcc 12 does not know that its tile intrinsics read and write memory.
#define EM_MEMORY_BARRIER __asm__ volatile("" ::: "memory")

struct Amx {
  struct alignas(64) Config {  // of eight tiles, as the CPU reads it
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

  EM_AMX static void begin() {
    const Config config;
    EM_MEMORY_BARRIER;
    _tile_loadconfig(&config);
  }

  EM_AMX static void end() { _tile_release(); }

  EM_AMX static void multiply(const bf16* a, const bf16* b, int64_t steps, const Result& result,
                              Result& previous) {
    const int64_t rows = ceil_div(PANEL, std::max<int64_t>(steps, 1));
    EM_MEMORY_BARRIER;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
      previous.store_rows(rows);
      result.prefetch_rows(step * rows, rows);
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_loadd(5, a + TILE_SIZE, 64);
      _tile_loadd(7, b + TILE_SIZE, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      a += 2 * TILE_SIZE;
      b += 2 * TILE_SIZE;
    }
    constexpr int STRIDE = PANEL * sizeof(float);
    _tile_stored(0, result.sums, STRIDE);
    _tile_stored(1, result.sums + TILE, STRIDE);
    _tile_stored(2, result.sums + TILE * PANEL, STRIDE);
    _tile_stored(3, result.sums + TILE * PANEL + TILE, STRIDE);
    EM_MEMORY_BARRIER;
  }
};

// Computes rows [row_begin, row_end) and columns [column_begin, column_end) of out. The order of
// each sum depends on K alone.
template <class Isa>
EM_AVX512 void multiply_part(const Product& product, int64_t row_begin, int64_t row_end,
                             int64_t column_begin, int64_t column_end, Workspace& workspace) {
  const int64_t blocks = std::max<int64_t>(1, ceil_div(product.inner, BLOCK_K));
  const int64_t block_k = ceil_div(ceil_div(product.inner, blocks), TILE_K) * TILE_K;
  const int64_t block_columns = BLOCK_B_SIZE / std::max<int64_t>(block_k, 1) / PANEL * PANEL;
  const int64_t stride = product.out_stride;
  const uintptr_t address = reinterpret_cast<uintptr_t>(product.out);
  const bool aligned = (address | stride * sizeof(float)) % sizeof(__m512) == 0;
  Result previous = {};
  int64_t k = 0, panels = 0;
  Isa::begin();
  do {  // once even where K is 0
    const int64_t count = std::min(block_k, product.inner - k), steps = ceil_div(count, TILE_K);
    for (int64_t left = column_begin; left < column_end; left += block_columns) {
      const int64_t right = std::min(column_end, left + block_columns);
      pack_b(product.b, left, right - left, k, count, workspace.b);
      for (int64_t row = row_begin; row < row_end; row += PANEL) {
        pack_a(product.a, row, std::min<int64_t>(PANEL, row_end - row), k, count, workspace.a);
        const bf16* b_panel = workspace.b;
        for (int64_t column = left; column < right; column += PANEL) {
          const int64_t rows = std::min<int64_t>(PANEL, row_end - row), columns = right - column;
          const Store how = product.accumulate || k > 0   ? Store::ADD
                            : aligned && columns >= PANEL ? Store::STREAM
                                                          : Store::PLAIN;
          const Result result = {workspace.sums[panels++ % 2], product.out + row * stride + column,
                                 stride, rows, first(columns), first(columns - TILE), how};
          Isa::multiply(workspace.a, b_panel, steps, result, previous);
          previous.store_rows(PANEL);
          previous = result;
          b_panel += steps * 2 * TILE_SIZE;
        }
      }
    }
    k += block_k;
  } while (k < product.inner);
  previous.store_rows(PANEL);
  Isa::end();
  _mm_sfence();  // the streamed stores, before another thread reads them
}

}  // namespace em
