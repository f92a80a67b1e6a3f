// Registers em_kernels::spread_rows and advise_huge_pages for the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "entropy_rows.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Writes zeros past the caches: a plain store would first read the memory that it overwrites.
void stream_zeros(char* to, int64_t bytes) {
#if defined(__x86_64__)
  const auto misaligned = reinterpret_cast<uintptr_t>(to) % 16;
  const int64_t head = misaligned ? std::min<int64_t>(bytes, 16 - misaligned) : 0;
  std::memset(to, 0, head);
  for (to += head, bytes -= head; bytes >= 16; to += 16, bytes -= 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_setzero_si128());
#endif
  std::memset(to, 0, bytes);
}

template <class Out>
void spread(const Tensor& values, const int64_t* words, float factor, const Tensor& out) {
  const int64_t count = values.size(0), size = values.size(1), total = out.size(0);
  std::vector<int64_t> place(total, -1);
  for (int64_t k = 0; k < count; ++k) {
    STD_TORCH_CHECK(words[k] >= 0 && words[k] < total && place[words[k]] < 0,
                    "words must be distinct, within [0, ", total, ")");
    place[words[k]] = k;
  }
  const float* from = static_cast<const float*>(values.const_data_ptr());
  Out* to = static_cast<Out*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, total, 64, [&](int64_t begin, int64_t end) {
    for (int64_t word = begin; word < end; ++word) {
      Out* __restrict row = to + word * size;
      if (place[word] < 0) {
        stream_zeros(reinterpret_cast<char*>(row), size * sizeof(Out));
        continue;
      }
      const float* __restrict value = from + place[word] * size;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) em::store(value[i] * factor, row[i]);
    }
#if defined(__x86_64__)
    _mm_sfence();
#endif
  });
}

// Writes each row of out once: values times the factor at the vocabulary indices `words`, else 0.
void spread_rows(Tensor values, Tensor words, double factor, Tensor out) {
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Long && words.dim() == 1 &&
                      words.is_contiguous(),
                  "words must be int64 (K,), contiguous");
  const int64_t* index = static_cast<const int64_t*>(words.const_data_ptr());
  STD_TORCH_CHECK(values.dim() == 2 && values.scalar_type() == ScalarType::Float &&
                      values.is_contiguous() && values.size(0) == words.numel(),
                  "values must be float32 (K, D), contiguous");
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.size(1) == values.size(1),
                  "out must be (V, D), contiguous");
  if (out.scalar_type() == ScalarType::Float)
    return spread<float>(values, index, static_cast<float>(factor), out);
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::BFloat16, "out must be float32 or bfloat16");
  spread<em::Bfloat16>(values, index, static_cast<float>(factor), out);
}

// Asks for pages of 2 MiB: the first use of 4 KiB pages costs more time than a GEMM.
void advise_huge_pages([[maybe_unused]] Tensor x) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t end = begin + x.numel() * x.element_size();
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, last = end / PAGE * PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(em_kernels, library) {
  library.def("spread_rows(Tensor values, Tensor words, float factor, Tensor(a!) out) -> ()");
  library.def("advise_huge_pages(Tensor(a!) x) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(em_kernels, CPU, library) {
  library.impl("spread_rows", TORCH_BOX(&spread_rows));
  library.impl("advise_huge_pages", TORCH_BOX(&advise_huge_pages));
}
