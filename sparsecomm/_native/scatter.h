// Sums of sparse and dense vectors into dense ones.
#pragma once

#include <optional>

#include "scalar.h"

namespace sc {
namespace {

constexpr size_t kAhead = 32;  // indices to prefetch ahead; hides the misses of caches and of address translation

inline void scatter_add(float* out, const uint32_t* idx, const float* val, size_t nnz) {
  size_t i = 0;
  for (; i + kAhead + 4 <= nnz; i += 4) {
    for (size_t j = 0; j < 4; ++j) __builtin_prefetch(out + idx[i + kAhead + j], 1);
    for (size_t j = 0; j < 4; ++j) out[idx[i + j]] += val[i + j];
  }
  for (; i < nnz; ++i) out[idx[i]] += val[i];
}

inline void convert_region(const float* from, size_t n, Half* to) {
  size_t i = 0;
#if SC_SIMD
  for (; i + V::W <= n; i += V::W) V::store_half(&to[i].bits, V::load(from + i));
#endif
  for (; i < n; ++i) to[i].bits = half_from(from[i]);
}
inline void convert_region(const float* from, size_t n, Bf16* to) {
  for (size_t i = 0; i < n; ++i) to[i].bits = bf16_from(from[i]);
}

// Adds the parts' elements in [first, first + n) to `region`, which holds these elements, part after part. Each part is
// advanced behind the elements that were added.
template <class Note>
inline void add_parts(float* region, uint64_t first, size_t n, Part* parts, size_t nparts, Note note) {
  for (size_t p = 0; p < nparts; ++p) {
    Part& part = parts[p];
    const uint32_t* const idx = part.indices;
    const float* const val = part.values;
    size_t i = 0;
    // Indices are ascending and distinct, so at most n of them are below first + n.
    while (i < part.nnz && idx[i] < first + n) {
      region[idx[i] - first] += val[i];
      note(idx[i] - first);
      ++i;
    }
    part.indices += i;
    part.values += i;
    part.nnz -= i;
  }
}

// Elements of a region that received a sum.
struct Touched {
  uint64_t* seen = nullptr;
  uint32_t* where = nullptr;
  size_t count = 0;

  explicit Touched(size_t region) {
    const size_t words = region / 64;
    seen = static_cast<uint64_t*>(scratch(kRegion, words * 8 + (region + 1) * 4));
    where = reinterpret_cast<uint32_t*>(seen + words);
    std::memset(seen, 0, words * 8);
  }
  void note(uint64_t i) {
    const uint64_t bit = uint64_t(1) << (i % 64);
    where[count] = uint32_t(i);
    count += (seen[i / 64] & bit) == 0;
    seen[i / 64] |= bit;
  }
  void scale(float* region, float factor) {
    for (size_t j = 0; j < count; ++j) {
      region[where[j]] *= factor;
      seen[where[j] / 64] = 0;
    }
    count = 0;
  }
};

// Returns whether scaling all elements would take longer than scaling only those that received a sum.
inline bool is_sparse(size_t n, const Part* parts, size_t nparts, float scale) {
  size_t pairs = 0;
  for (size_t p = 0; p < nparts; ++p) pairs += parts[p].nnz;
  const bool keeps_zero = scale > 0.0f && bits_of(scale) < kInfBits;
  return scale != 1.0f && keeps_zero && pairs < n / 16;
}

// Works region by region, so that zeroing, adding, scaling and rounding happen in the cache and memory is written once.
template <class T>
void scatter_reduce_typed(T* out, size_t n, Part* parts, size_t nparts, float scale) {
  constexpr bool kInPlace = sizeof(T) == 4;
  constexpr size_t kRegionSize = kInPlace ? 65536 : 32768;
  float* region = nullptr;
  std::optional<Touched> touched;
  if constexpr (kInPlace) {
    if (is_sparse(n, parts, nparts, scale)) touched.emplace(kRegionSize);
  } else {
    region = static_cast<float*>(scratch(kRegion, kRegionSize * sizeof(float)));
  }
  for (size_t first = 0; first < n; first += kRegionSize) {
    const size_t count = min_of(kRegionSize, n - first);
    if constexpr (kInPlace) region = out + first;
    std::memset(region, 0, count * sizeof(float));
    if (touched) {
      add_parts(region, first, count, parts, nparts, [&](uint64_t i) { touched->note(i); });
      touched->scale(region, scale);
    } else {
      add_parts(region, first, count, parts, nparts, [](uint64_t) {});
      if (scale != 1.0f)
        for (size_t i = 0; i < count; ++i) region[i] *= scale;
    }
    if constexpr (!kInPlace) convert_region(region, count, out + first);
  }
}

inline void scatter_reduce(void* out, int type, size_t n, Part* parts, size_t nparts, float scale) {
  switch (type) {
    case kF16: return scatter_reduce_typed(static_cast<Half*>(out), n, parts, nparts, scale);
    case kBf16: return scatter_reduce_typed(static_cast<Bf16*>(out), n, parts, nparts, scale);
    default: return scatter_reduce_typed(static_cast<float*>(out), n, parts, nparts, scale);
  }
}

inline void add_dense(float* out, const uint8_t* data, size_t n) {
  for (size_t i = 0; i < n; ++i) out[i] += float_of(load32(data + 4 * i));
}

}  // namespace
}  // namespace sc
