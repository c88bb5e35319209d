// accumulate_norms: residual + grad and the L1 norm of every chunk of the sum, in one pass over memory.
#pragma once

#include "select.h"

namespace sc {
namespace {

constexpr size_t kLanes = 32;
constexpr size_t kPiece = 8192;  // a multiple of kLanes, short enough to be read again from the cache

// lane[j] += |x[j]| + |x[j + 32]| + ... The sums are independent, so the compiler vectorises them.
inline void add_magnitudes(float* lanes, const float* x, size_t n) {
  float sum[kLanes];
  std::memcpy(sum, lanes, sizeof sum);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (size_t j = 0; j < kLanes; ++j) sum[j] += __builtin_fabsf(x[i + j]);
  for (size_t j = 0; i + j < n; ++j) sum[j] += __builtin_fabsf(x[i + j]);
  std::memcpy(lanes, sum, sizeof sum);
}

inline uint64_t accumulate_norms(const void* grad, int type, float* residual, size_t n, float scale, size_t chunk,
                                 float* norms) {
  Sink sink{nullptr, nullptr, 0};
  for (size_t begin = 0; begin < n; begin += chunk) {
    const size_t end = begin + min_of(chunk, n - begin);
    float lanes[kLanes] = {};
    for (size_t at = begin; at < end; at += kPiece) {
      const size_t past = min_of(at + kPiece, end);
      select_any(sink, grad, type, residual, at, past, kInfBits, scale);
      add_magnitudes(lanes, residual + at, past - at);
    }
    for (size_t width = kLanes / 2; width; width /= 2)
      for (size_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    *norms++ = lanes[0];
  }
  return sink.nonfinite;
}

}  // namespace
}  // namespace sc
