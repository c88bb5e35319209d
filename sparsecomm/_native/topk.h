// exact_topk and cut_topk: the k largest magnitudes, exactly, ties to the lowest index.
//
// A sample gives a threshold that is safely too low. One fused pass accumulates, takes out the few candidates that
// reach it and zeroes them. A radix select among the candidates finds the exact cut, and the surplus is put back. If
// the sample misled, or k is a large part of n, a radix select over the whole vector takes a few more passes: slower,
// equally exact, and bounded for any input.
#pragma once

#include "select.h"

namespace sc {
namespace {

// A cut through magnitudes: all elements above `bits` are in, and the first `ties_in` of `ties` elements equal to it.
struct Cut {
  uint32_t bits;
  size_t ties_in, ties;
};

// Histogram of the magnitudes whose high bits (above kShift + kBits) equal `prefix`. All others go to an extra bin,
// which avoids an unpredictable branch. Long vectors use four interleaved copies, because gradients repeat values and
// increments of one counter would wait for each other; for short vectors, clearing four copies costs more.
template <int kShift, int kBits, bool kAll, size_t kCopies, class Skip>
void histogram_copies(const float* v, size_t n, uint32_t prefix, size_t* counts, Skip skip) {
  constexpr uint32_t kBins = 1u << kBits;
  static_assert(kShift + kBits <= 31, "magnitudes have 31 bits");
  for (size_t b = 0; b < kBins; ++b) counts[b] = 0;
  uint32_t part[kCopies][kBins + 16];
  for (size_t begin = 0; begin < n; begin += size_t(1) << 31) {  // 32-bit counters
    const size_t end = min_of(n, begin + (size_t(1) << 31));
    std::memset(part, 0, sizeof part);
    const auto count = [&](size_t i, uint32_t* to) {
      const uint32_t m = magnitude(v[i]), bin = (m >> kShift) & (kBins - 1);
      const bool in = (kAll || (m >> (kShift + kBits)) == prefix) && !skip(i);
      ++to[in ? bin : kBins];
    };
    size_t i = begin;
    for (; i + kCopies <= end; i += kCopies)
      for (size_t j = 0; j < kCopies; ++j) count(i + j, part[j]);
    for (; i < end; ++i) count(i, part[0]);
    for (size_t b = 0; b < kBins; ++b)
      for (size_t j = 0; j < kCopies; ++j) counts[b] += part[j][b];
  }
}

template <int kShift, int kBits, bool kAll, class Skip>
void histogram(const float* v, size_t n, uint32_t prefix, size_t* counts, Skip skip) {
  if (n < 8192)
    histogram_copies<kShift, kBits, kAll, 1>(v, n, prefix, counts, skip);
  else
    histogram_copies<kShift, kBits, kAll, 4>(v, n, prefix, counts, skip);
}

// Returns the bin that contains the k-th largest, searching from the top bin down; k becomes its rank within that bin.
inline uint32_t find_bin(const size_t* counts, uint32_t top, size_t& k) {
  uint32_t bin = top;
  while (bin > 0 && counts[bin] < k) k -= counts[bin--];
  return bin;
}

constexpr uint32_t kInfBin = kInfBits >> 20;

// Returns the cut that lets in the k largest finite magnitudes of v; 1 <= k <= number of finite elements not skipped.
// `zeros` elements equal to zero are left out of the count; the caller passes 0 to include zeros.
template <class Skip>
Cut find_cut(const float* v, size_t n, size_t k, size_t zeros, const size_t* top_counts, Skip skip) {
  size_t counts[2048];
  const uint32_t high = find_bin(top_counts, kInfBin - 1, k);
  histogram<9, 11, false>(v, n, high, counts, skip);
  if (high == 0) counts[0] -= zeros;
  const uint32_t mid = find_bin(counts, 2047, k);
  histogram<0, 9, false>(v, n, high << 11 | mid, counts, skip);
  if ((high | mid) == 0) counts[0] -= zeros;
  const uint32_t low = find_bin(counts, 511, k);
  return {high << 20 | mid << 9 | low, k, counts[low]};
}

struct NoSkip {
  bool operator()(size_t) const { return false; }
};

inline Cut find_cut(const float* v, size_t n, size_t k) {
  size_t counts[2048];
  histogram<20, 11, true>(v, n, 0, counts, NoSkip{});
  return find_cut(v, n, k, 0, counts, NoSkip{});
}

// Returns one past the last tie that is let in; beyond it the cut is simply bits + 1.
template <class Skip>
size_t ties_end(const float* v, size_t n, const Cut& cut, Skip skip) {
  if (cut.ties_in == cut.ties) return n;
  size_t left = cut.ties_in;
  for (size_t i = 0; i < n; ++i)
    if (magnitude(v[i]) == cut.bits && !skip(i) && --left == 0) return i + 1;
  return n;
}

// Copies pairs [begin, end) that reach `threshold` to the sink, in order; puts the others back into the residual.
// The sink may use the same arrays, because it never writes ahead of the reads.
inline void keep_range(Sink& sink, const uint32_t* indices, const float* values, size_t begin, size_t end,
                       uint32_t threshold, float* residual) {
  size_t i = begin, stored = sink.stored;
#if SC_SIMD
  constexpr size_t W = V::W;
  constexpr unsigned kFull = (1u << W) - 1;
  const typename V::I want = V::set1(threshold);
  for (; i + W <= end && stored + W <= sink.capacity; i += W) {
    const typename V::F value = V::load(values + i);
    const typename V::I index = V::load_index(indices + i);
    const typename V::M hit = V::ge(V::magnitude(value), want);
    for (unsigned out = ~V::bits(hit) & kFull; out; out &= out - 1) {
      const size_t at = i + size_t(__builtin_ctz(out));
      residual[indices[at]] = values[at];
    }
    V::compress(sink.indices + stored, sink.values + stored, index, value, hit);
    stored += size_t(__builtin_popcount(V::bits(hit)));
  }
#endif
  for (; i < end; ++i) {
    const float value = values[i];
    const uint32_t index = indices[i];
    if (magnitude(value) >= threshold) {
      sink.indices[stored] = index;
      sink.values[stored++] = value;
    } else {
      residual[index] = value;
    }
  }
  sink.stored = stored;
}

inline void keep_cut(Sink& sink, const uint32_t* indices, const float* values, size_t count, const Cut& cut,
                     float* residual) {
  const size_t split = ties_end(values, count, cut, NoSkip{});
  keep_range(sink, indices, values, 0, split, cut.bits, residual);
  keep_range(sink, indices, values, split, count, cut.bits + 1, residual);
}

inline size_t cut_topk(uint32_t* indices, float* values, size_t count, size_t k, float* residual) {
  if (k >= count) return count;
  if (k == 0) {
    for (size_t i = 0; i < count; ++i) residual[indices[i]] = values[i];
    return 0;
  }
  Sink sink{indices, values, count};
  keep_cut(sink, indices, values, count, find_cut(values, count, k), residual);
  return sink.stored;
}

// Returns the bits, at least 1, of a threshold that about `rank` of `m` sampled elements reach. The sample takes one
// element at a random place in each of m equal strata, so patterns in the layout of the parameters do not bias it.
inline uint32_t sample_threshold(const void* grad, int type, const float* residual, size_t n, size_t m, size_t rank,
                                 float scale) {
  float* sample = static_cast<float*>(scratch(kSample, m * sizeof(float)));
  const size_t stride = n / m;
  uint32_t random = 2463534242u;
  for (size_t s = 0; s < m; ++s) {
    random = random * 1664525u + 1013904223u;
    const size_t i = s * stride + size_t(uint64_t(random) * stride >> 32);
    float v;
    switch (type) {
      case kF32: v = acc_at<float, true>(static_cast<const float*>(grad), residual, i, scale); break;
      case kF16: v = acc_at<Half, true>(static_cast<const Half*>(grad), residual, i, scale); break;
      case kBf16: v = acc_at<Bf16, true>(static_cast<const Bf16*>(grad), residual, i, scale); break;
      default: v = residual[i];
    }
    sample[s] = magnitude(v) < kInfBits ? v : 0.0f;
  }
  const uint32_t bits = find_cut(sample, m, rank).bits;
  return bits ? bits : 1;
}

inline float lowest_magnitude(const float* v, size_t n) {
  uint32_t low = kInfBits;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t m = magnitude(v[i]);
    low = m < low ? m : low;
  }
  return n ? float_of(low) : 0.0f;
}

struct SkipBad {
  const BadMap* bad;
  bool operator()(size_t i) const { return bad->has(i); }
};

// Selects from a vector that is already accumulated, by radix select over all of it.
template <class Skip>
TopKOut topk_whole(float* residual, size_t n, size_t k, Sink& sink, Skip skip) {
  constexpr bool kSkips = sizeof(Skip) != sizeof(NoSkip);
  size_t counts[2048];
  histogram<20, 11, true>(residual, n, 0, counts, skip);
  size_t eligible = 0, zeros = 0;
  for (uint32_t b = 0; b < kInfBin; ++b) eligible += counts[b];
  if (counts[0])  // zeros and denormals share a bin
    for (size_t i = 0; i < n; ++i) zeros += magnitude(residual[i]) == 0 && !skip(i);
  eligible -= zeros;
  counts[0] -= zeros;
  k = min_of(k, eligible);
  if (k == 0) return {0, 0.0f, 0};
  const Cut cut = k == eligible ? Cut{1, 1, 1} : find_cut(residual, n, k, zeros, counts, skip);
  const size_t split = ties_end(residual, n, cut, skip);
  if constexpr (kSkips) {
    for (size_t i = 0; i < n; ++i) {
      const uint32_t m = magnitude(residual[i]);
      if (m < cut.bits + (i >= split) || m >= kInfBits || skip(i)) continue;
      sink.indices[sink.stored] = uint32_t(i);
      sink.values[sink.stored++] = residual[i];
      residual[i] = 0.0f;
    }
  } else {
    select_range<NoGrad, false>(sink, nullptr, residual, 0, split, cut.bits, 1.0f);
    select_range<NoGrad, false>(sink, nullptr, residual, split, n, cut.bits + 1, 1.0f);
  }
  const float threshold = k == eligible ? lowest_magnitude(sink.values, sink.stored) : float_of(cut.bits);
  return {sink.stored, threshold, 0};
}

// Accumulates and selects in one pass with a sampled threshold. Returns false if the threshold was wrong; then
// everything is accumulated, nothing is taken, and `bad` holds the elements to leave out.
inline bool topk_sampled(const void* grad, int type, float* residual, size_t n, size_t k, Sink& sink, float scale,
                         BadMap& bad, TopKOut& result) {
  const size_t m = min_of(32768, n / 8);
  const double expected = double(m) * double(k) / double(n);
  const double rank = expected + 4 * __builtin_sqrt(expected) + 4;  // four deviations, so that at least k reach it
  const double most = (rank + 6 * __builtin_sqrt(rank) + 8) * double(n) / double(m);
  const size_t room = min_of(n, size_t(most)) + 64;  // whole groups of vectors
  const uint32_t low = sample_threshold(grad, type, residual, n, m, min_of(size_t(rank), m), scale);
  uint32_t* indices = static_cast<uint32_t*>(scratch(kCandidates, room * 8));
  float* values = reinterpret_cast<float*>(indices + room);
  Sink found{indices, values, room};
  if (type != kNoGrad) found.bad = &bad;
  select_any(found, grad, type, residual, 0, n, low, scale);
  result.nonfinite = found.nonfinite;
  if (found.overflow || (found.stored < k && low > 1)) {
    for (size_t i = 0; i < found.stored; ++i) residual[indices[i]] = values[i];
    return false;
  }
  if (found.stored <= k) {  // all nonzero elements, or exactly k
    if (found.stored) {
      std::memcpy(sink.indices, indices, found.stored * sizeof *indices);
      std::memcpy(sink.values, values, found.stored * sizeof *values);
    }
    sink.stored = found.stored;
    result.threshold = lowest_magnitude(values, found.stored);
  } else {
    const Cut cut = find_cut(values, found.stored, k);
    keep_cut(sink, indices, values, found.stored, cut, residual);
    result.threshold = float_of(cut.bits);
  }
  result.stored = sink.stored;
  return true;
}

inline TopKOut exact_topk(const void* grad, int type, float* residual, size_t n, size_t k, uint32_t* out_indices,
                          float* out_values, size_t capacity, float scale) {
  Sink sink{out_indices, out_values, capacity};
  BadMap bad;
  bad.n = n;
  TopKOut result{0, 0.0f, 0};
  const bool sampled = k > 0 && n >= 16384 && k <= n / 4;
  if (sampled) {
    if (topk_sampled(grad, type, residual, n, k, sink, scale, bad, result)) return result;
  } else {
    Sink none{nullptr, nullptr, 0};
    if (type != kNoGrad) none.bad = &bad;
    // Without a gradient this only counts elements that are not finite.
    select_any(none, grad, type, residual, 0, n, kInfBits, scale);
    result.nonfinite = none.nonfinite;
    if (k == 0) return result;
  }
  const TopKOut whole = bad.words ? topk_whole(residual, n, k, sink, SkipBad{&bad})
                                  : topk_whole(residual, n, k, sink, NoSkip{});
  return {whole.stored, whole.threshold, result.nonfinite};
}

}  // namespace
}  // namespace sc
