// Segments of a dense vector in 16 bits on the wire, and their sums in fp32. Unlike in value_codecs.h, NaN and infinity
// are kept, because a dense exchange without a residual passes them on as a plain allreduce does. Format and truth:
// kernels/reference/dense.py.
#pragma once

#include "scalar.h"
#include "scatter.h"
#include "value_codecs.h"

namespace sc {
namespace {

constexpr size_t kScaleBytes = 4;  // in front of the halves of a kValF16 segment

// Bits of the largest finite magnitude. An integer maximum, which vectorises.
inline uint32_t largest_finite(const float* v, size_t n) {
  int32_t top = 0;
  for (size_t i = 0; i < n; ++i) {
    const int32_t m = int32_t(magnitude(v[i]));
    const int32_t finite = m < int32_t(kInfBits) ? m : 0;
    top = finite > top ? finite : top;
  }
  return uint32_t(top);
}

inline bool is_finite(float v) { return magnitude(v) < kInfBits; }

inline void pack_f16(const float* v, size_t n, uint8_t* out, float* error) {
  const float scale = half_scale(largest_finite(v, n)), inverse = 1.0f / scale;
  store32(out, bits_of(scale));
  out += kScaleBytes;
  const bool at_top = scale == 0x1p113f;  // 32768 * 2**113 is infinite: saturate at the half below
  size_t i = 0;
#if SC_SIMD
  for (; !at_top && i + V::W <= n; i += V::W) {
    uint16_t halves[V::W];
    const typename V::F value = V::load(v + i);
    V::store_half(halves, V::mul(value, V::set1(inverse)));
    std::memcpy(out + 2 * i, halves, sizeof halves);
    if (error) {
      const typename V::F sent = V::mul(V::load_grad(reinterpret_cast<const Half*>(halves)), V::set1(scale));
      V::store(error + i, V::zero_where(V::ge(V::magnitude(value), V::set1(kInfBits)), V::sub(value, sent)));
    }
  }
#endif
  for (; i < n; ++i) {
    uint16_t half = half_from(v[i] * inverse);
    if (at_top && is_finite(v[i]) && (half & 0x7FFFu) > 0x77FFu) half = uint16_t((half & 0x8000u) | 0x77FFu);
    store16(out + 2 * i, half);
    if (error) error[i] = is_finite(v[i]) ? v[i] - float_from(Half{half}) * scale : 0.0f;
  }
}

inline void pack_bf16(const float* v, size_t n, uint8_t* out, float* error) {
  for (size_t i = 0; i < n; ++i) {
    const uint32_t x = bits_of(v[i]), m = x & kMagnitude;
    uint32_t rounded = (x + 0x7FFFu + ((x >> 16) & 1u)) >> 16;
    rounded -= m < kInfBits && (rounded & 0x7FFFu) == 0x7F80u;  // saturate, so that finite values stay finite
    rounded = m > kInfBits ? 0x7FC0u : rounded;
    const uint16_t half = uint16_t(rounded);
    std::memcpy(out + 2 * i, &half, 2);
    if (error) error[i] = m < kInfBits ? v[i] - float_of(rounded << 16) : 0.0f;
  }
}

// Writes values as a segment, and rounding errors to `error`, 0 for NaN and infinity.
inline void pack_dense(int codec, const float* v, size_t n, uint8_t* out, float* error) {
  if (n == 0) return;
  switch (codec) {
    case kValF16: return pack_f16(v, n, out, error);
    case kValBf16: return pack_bf16(v, n, out, error);
    default:
      std::memcpy(out, v, 4 * n);
      if (error) std::memset(error, 0, 4 * n);
  }
}

template <bool kAdd>
inline void read_f16(const uint8_t* data, size_t n, float* out) {
  const float scale = float_of(load32(data));
  data += kScaleBytes;
  size_t i = 0;
#if SC_SIMD
  for (; i + V::W <= n; i += V::W) {
    const typename V::F value = V::mul(V::load_grad(reinterpret_cast<const Half*>(data + 2 * i)), V::set1(scale));
    V::store(out + i, kAdd ? V::add(V::load(out + i), value) : value);
  }
#endif
  for (; i < n; ++i) {
    const float value = float_from(Half{uint16_t(data[2 * i] | data[2 * i + 1] << 8)}) * scale;
    out[i] = kAdd ? out[i] + value : value;
  }
}

template <bool kAdd>
inline void read_bf16(const uint8_t* data, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) {
    uint16_t half;
    std::memcpy(&half, data + 2 * i, 2);
    const float value = float_of(uint32_t(half) << 16);
    out[i] = kAdd ? out[i] + value : value;
  }
}

// Reads a segment into out, or adds it there.
inline void unpack_dense(int codec, const uint8_t* data, size_t n, float* out, bool add) {
  if (n == 0) return;
  switch (codec) {
    case kValF16: return add ? read_f16<true>(data, n, out) : read_f16<false>(data, n, out);
    case kValBf16: return add ? read_bf16<true>(data, n, out) : read_bf16<false>(data, n, out);
    default:
      if (add) return add_dense(out, data, n);
      std::memcpy(out, data, 4 * n);
  }
}

}  // namespace
}  // namespace sc
