// accumulate_select: residual + grad, and selection of the sums that reach a threshold, in one pass over memory.
#pragma once

#include "scalar.h"

namespace sc {
namespace {

// One bit for each element, set if its accumulated value is not finite; `words` is null until the first one is found.
struct BadMap {
  uint64_t* words = nullptr;
  size_t n = 0;

  __attribute__((noinline)) void set(size_t i) {
    if (!words) {
      const size_t bytes = (n + 63) / 64 * 8;
      words = static_cast<uint64_t*>(scratch(kBadMap, bytes));
      std::memset(words, 0, bytes);
    }
    words[i / 64] |= uint64_t(1) << (i % 64);
  }
  bool has(size_t i) const { return words[i / 64] >> (i % 64) & 1; }
};

// Output of selected pairs, and counts. `overflow` counts elements that met the threshold but found no room.
struct Sink {
  uint32_t* indices;
  float* values;
  size_t capacity;
  size_t stored = 0;
  uint64_t overflow = 0;
  uint64_t nonfinite = 0;
  BadMap* bad = nullptr;
};

// Handles any element and any capacity, slowly: tails, vectors with non-finite lanes, and the last few places.
template <class T, bool kScaled>
__attribute__((noinline)) void select_careful(Sink& sink, const T* grad, float* residual, size_t begin, size_t end,
                                              uint32_t threshold, float scale) {
  for (size_t i = begin; i < end; ++i) {
    const float acc = acc_at<T, kScaled>(grad, residual, i, scale);
    const uint32_t m = magnitude(acc);
    if (m >= kInfBits) {
      ++sink.nonfinite;
      if (sink.bad) sink.bad->set(i);
    } else if (m >= threshold) {
      if (sink.stored < sink.capacity) {
        sink.indices[sink.stored] = uint32_t(i);
        sink.values[sink.stored++] = acc;
        residual[i] = 0.0f;
      } else {
        ++sink.overflow;
        residual[i] = acc;
      }
    } else {
      residual[i] = acc;
    }
  }
}

#if SC_SIMD

// Handles elements [begin, end). `threshold` holds the bits of a magnitude, at most those of infinity.
template <class T, bool kScaled>
void select_range(Sink& sink, const T* grad, float* residual, size_t begin, size_t end, uint32_t threshold,
                  float scale) {
  constexpr bool kHasGrad = sizeof(T) != 1;
  constexpr size_t W = V::W, kStep = 32, G = kStep / W;  // groups of 32 were fastest at all densities
  const typename V::I want = V::set1(threshold), inf = V::set1(kInfBits);
  const typename V::F factor = V::set1(scale);
  typename V::I index = V::iota(uint32_t(begin));
  const typename V::I stride = V::set1(uint32_t(W));
  uint32_t* const out_i = sink.indices;
  float* const out_v = sink.values;
  const size_t capacity = sink.capacity;
  size_t stored = sink.stored;
  uint64_t overflow = 0;
  size_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    typename V::F acc[G];
    typename V::I mag[G];
    typename V::M hit[G];
    typename V::I top = V::set1(0u);
    for (size_t j = 0; j < G; ++j) {
      acc[j] = V::load(residual + i + j * W);
      if constexpr (kHasGrad) {
        typename V::F g = V::load_grad(grad + i + j * W);
        if constexpr (kScaled) g = V::mul(g, factor);
        acc[j] = V::add(acc[j], g);
      }
      mag[j] = V::magnitude(acc[j]);
      top = V::max(top, mag[j]);
      hit[j] = V::ge(mag[j], want);
    }
    const unsigned any = V::bits(V::ge(top, want));
    typename V::I at[G];
    for (size_t j = 0; j < G; ++j) {
      at[j] = index;
      index = V::add(index, stride);
    }
    if (__builtin_expect(any == 0, 1)) {
      if constexpr (kHasGrad)
        for (size_t j = 0; j < G; ++j) V::store(residual + i + j * W, acc[j]);
      continue;
    }
    if (__builtin_expect(V::bits(V::ge(top, inf)) == 0 && stored + kStep <= capacity, 1)) {
      for (size_t j = 0; j < G; ++j) {
        V::store(residual + i + j * W, V::zero_where(hit[j], acc[j]));
        V::compress(out_i + stored, out_v + stored, at[j], acc[j], hit[j]);
        stored += size_t(__builtin_popcount(V::bits(hit[j])));
      }
    } else if (stored == capacity && V::bits(V::ge(top, inf)) == 0) {
      for (size_t j = 0; j < G; ++j) {
        if constexpr (kHasGrad) V::store(residual + i + j * W, acc[j]);
        overflow += unsigned(__builtin_popcount(V::bits(hit[j])));
      }
    } else {
      sink.stored = stored;
      select_careful<T, kScaled>(sink, grad, residual, i, i + kStep, threshold, scale);
      stored = sink.stored;
    }
  }
  sink.overflow += overflow;
  sink.stored = stored;
  select_careful<T, kScaled>(sink, grad, residual, i, end, threshold, scale);
}

#else

// Without vector intrinsics. The compiler vectorises the arithmetic of a block; only blocks with a selected element are
// walked element by element, without branches.
template <class T, bool kScaled>
void select_range(Sink& sink, const T* grad, float* residual, size_t begin, size_t end, uint32_t threshold,
                  float scale) {
  constexpr bool kHasGrad = sizeof(T) != 1;
  constexpr size_t kStep = 64;
  size_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    float acc[kStep];
    int32_t top = 0;
    for (size_t j = 0; j < kStep; ++j) {
      acc[j] = acc_at<T, kScaled>(grad, residual, i + j, scale);
      const int32_t m = int32_t(magnitude(acc[j]));
      top = m > top ? m : top;
    }
    if (uint32_t(top) < threshold) {
      if constexpr (kHasGrad) std::memcpy(residual + i, acc, sizeof acc);
      continue;
    }
    if (uint32_t(top) < kInfBits && sink.stored + kStep <= sink.capacity) {
      uint32_t* const out_i = sink.indices + sink.stored;
      float* const out_v = sink.values + sink.stored;
      size_t count = 0;
      for (size_t j = 0; j < kStep; ++j) {
        const bool hit = magnitude(acc[j]) >= threshold;
        out_i[count] = uint32_t(i + j);
        out_v[count] = acc[j];
        residual[i + j] = hit ? 0.0f : acc[j];
        count += hit;
      }
      sink.stored += count;
    } else {
      select_careful<T, kScaled>(sink, grad, residual, i, i + kStep, threshold, scale);
    }
  }
  select_careful<T, kScaled>(sink, grad, residual, i, end, threshold, scale);
}

#endif

template <class T>
void select_typed(Sink& sink, const void* grad, float* residual, size_t begin, size_t end, uint32_t threshold,
                  float scale) {
  const T* g = static_cast<const T*>(grad);
  if (sizeof(T) == 1 || scale == 1.0f)
    select_range<T, false>(sink, g, residual, begin, end, threshold, scale);
  else
    select_range<T, true>(sink, g, residual, begin, end, threshold, scale);
}

inline void select_any(Sink& sink, const void* grad, int type, float* residual, size_t begin, size_t end,
                       uint32_t threshold, float scale) {
  switch (type) {
    case kF32: return select_typed<float>(sink, grad, residual, begin, end, threshold, scale);
    case kF16: return select_typed<Half>(sink, grad, residual, begin, end, threshold, scale);
    case kBf16: return select_typed<Bf16>(sink, grad, residual, begin, end, threshold, scale);
    default: return select_typed<NoGrad>(sink, grad, residual, begin, end, threshold, scale);
  }
}

inline SelectOut accumulate_select(const void* grad, int type, float* residual, size_t n, uint32_t threshold,
                                   uint32_t* out_indices, float* out_values, size_t capacity, float scale) {
  Sink sink{out_indices, out_values, capacity};
  select_any(sink, grad, type, residual, 0, n, threshold, scale);
  return {sink.stored, sink.stored + sink.overflow, sink.nonfinite};
}

}  // namespace
}  // namespace sc
