// The value codecs. Formats: docs/wire-format.md; truth: kernels/reference/values.py.
#pragma once

#include "scalar.h"

namespace sc {
namespace {

// Bits of the largest magnitude. An integer maximum, which vectorises without -ffast-math.
inline uint32_t largest_magnitude(const float* v, size_t n) {
  int32_t top = 0;
  for (size_t i = 0; i < n; ++i) {
    const int32_t m = int32_t(magnitude(v[i]));
    top = m > top ? m : top;
  }
  return uint32_t(top);
}

// The power of two s with largest / s in [16384, 32768), at least 2**-126; 1 for zero.
inline float half_scale(uint32_t largest) {
  if (largest == 0) return 1.0f;
  const int exponent = int(largest >> 23) - 127;  // for denormals a number below -126, which the next line clamps
  const int scale = exponent - 14 < -126 ? -126 : exponent - 14;
  return float_of(uint32_t(scale + 127) << 23);
}

inline void store16(uint8_t* p, uint16_t v) {
  p[0] = uint8_t(v);
  p[1] = uint8_t(v >> 8);
}

inline void encode_f16(const float* v, size_t n, float scale, uint8_t* out, float* error) {
  const float inverse = 1.0f / scale;  // exact: a power of two
  // 32768 * 2**113 is infinite: saturate at the half below.
  const uint16_t limit = scale == 0x1p113f ? 0x77FFu : 0x7BFFu;
  size_t i = 0;
#if SC_SIMD
  for (; i + V::W <= n; i += V::W) {
    uint16_t halves[V::W];
    float chunk[V::W];
    const typename V::F value = V::load(v + i);
    V::store_half(halves, V::mul(value, V::set1(inverse)));
    if (limit != 0x7BFFu)
      for (size_t j = 0; j < V::W; ++j)
        if ((halves[j] & 0x7FFFu) > limit) halves[j] = uint16_t((halves[j] & 0x8000u) | limit);
    std::memcpy(out + 2 * i, halves, sizeof halves);
    if (error) {
      V::store(chunk, V::mul(V::load_grad(reinterpret_cast<const Half*>(halves)), V::set1(scale)));
      V::store(error + i, V::sub(value, V::load(chunk)));
    }
  }
#endif
  for (; i < n; ++i) {
    const float value = v[i];
    uint16_t half = half_from(value * inverse);
    if ((half & 0x7FFFu) > limit) half = uint16_t((half & 0x8000u) | limit);
    store16(out + 2 * i, half);
    if (error) error[i] = value - float_from(Half{half}) * scale;
  }
}

inline void encode_bf16(const float* v, size_t n, uint8_t* out, float* error) {
  for (size_t i = 0; i < n; ++i) {
    const float value = v[i];
    const uint32_t x = bits_of(value);
    uint32_t rounded = (x + 0x7FFFu + ((x >> 16) & 1u)) >> 16;
    rounded -= (rounded & 0x7FFFu) == 0x7F80u;  // saturate: the largest finite is one below infinity
    const uint16_t half = uint16_t(rounded);
    std::memcpy(out + 2 * i, &half, 2);
    if (error) error[i] = value - float_of(rounded << 16);
  }
}

inline void encode_int8(const float* v, size_t n, uint8_t* out, float* error) {
  const size_t blocks = (n + kBlock - 1) / kBlock;
  int8_t* const q = reinterpret_cast<int8_t*>(out + 4 * blocks);
  for (size_t b = 0; b < blocks; ++b) {
    const size_t begin = b * kBlock, end = min_of(n, begin + kBlock);
    float scale = float_of(largest_magnitude(v + begin, end - begin)) / 127.0f;
    // The quotient may round up so far that 127 * scale overflows.
    if (magnitude(scale * 127.0f) >= kInfBits) scale = float_of(bits_of(scale) - 1);
    store32(out + 4 * b, bits_of(scale));
    const float divisor = scale == 0.0f ? float_of(kInfBits) : scale;
    for (size_t i = begin; i < end; ++i) {
      const float value = v[i];
      float x = value / divisor;
      x = x > 127.0f ? 127.0f : x;
      x = x < -127.0f ? -127.0f : x;
      x = (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2**23: the adder rounds to nearest even
      q[i] = int8_t(int32_t(x));
      if (error) error[i] = value - float(int32_t(x)) * scale;
    }
  }
}

inline size_t encode_values(int codec, const float* v, size_t n, uint8_t* out, float* error, float* scale) {
  *scale = 1.0f;
  switch (codec) {
    case kValF16:
      *scale = half_scale(largest_magnitude(v, n));
      encode_f16(v, n, *scale, out, error);
      return 2 * n;
    case kValBf16: encode_bf16(v, n, out, error); return 2 * n;
    case kValInt8: encode_int8(v, n, out, error); return 4 * ((n + kBlock - 1) / kBlock) + n;
    default:
      if (n) std::memcpy(out, v, 4 * n);
      if (error && n) std::memset(error, 0, 4 * n);
      return 4 * n;
  }
}

inline void decode_f16(const uint8_t* data, size_t n, float scale, float* out) {
  size_t i = 0;
#if SC_SIMD
  for (; i + V::W <= n; i += V::W)
    V::store(out + i, V::mul(V::load_grad(reinterpret_cast<const Half*>(data + 2 * i)), V::set1(scale)));
#endif
  for (; i < n; ++i) out[i] = float_from(Half{uint16_t(data[2 * i] | data[2 * i + 1] << 8)}) * scale;
}

inline DecodeOut decode_int8(const uint8_t* data, size_t n, float* out) {
  const size_t blocks = (n + kBlock - 1) / kBlock;
  const int8_t* const q = reinterpret_cast<const int8_t*>(data + 4 * blocks);
  for (size_t b = 0; b < blocks; ++b) {
    const uint32_t scale = load32(data + 4 * b);
    if (scale >= kInfBits && scale != 0x80000000u) return {kBlockScale, double(float_of(scale)), 0};
  }
  int lowest = 0;
  for (size_t i = 0; i < n; ++i) lowest = q[i] < lowest ? q[i] : lowest;
  if (lowest == -128) return {kInt8Min, -128.0, 0};
  for (size_t b = 0; b < blocks; ++b) {
    const float scale = float_of(load32(data + 4 * b));
    const size_t begin = b * kBlock, end = min_of(n, begin + kBlock);
    for (size_t i = begin; i < end; ++i) out[i] = float(q[i]) * scale;
  }
  return {kOk, 0.0, 0};
}

inline DecodeOut decode_values(int codec, const uint8_t* data, size_t nbytes, size_t n, float scale, float* out) {
  const size_t blocks = (n + kBlock - 1) / kBlock;
  const size_t want = codec == kValF32 ? 4 * n : codec == kValInt8 ? 4 * blocks + n : 2 * n;
  if (nbytes != want) return {kValueBytes, double(nbytes), want};
  if (codec == kValF16) {
    if (!(scale > 0.0f && bits_of(scale) < kInfBits)) return {kValueScale, double(scale), 0};
    decode_f16(data, n, scale, out);
  } else if (codec == kValBf16) {
    for (size_t i = 0; i < n; ++i) {
      uint16_t half;
      std::memcpy(&half, data + 2 * i, 2);
      out[i] = float_of(uint32_t(half) << 16);
    }
  } else if (codec == kValInt8) {
    const DecodeOut status = decode_int8(data, n, out);
    if (status.status) return status;
  } else {
    int32_t top = 0;  // copied and checked in one pass
    for (size_t i = 0; i < n; ++i) {
      const uint32_t x = load32(data + 4 * i);
      const int32_t m = int32_t(x & kMagnitude);
      top = m > top ? m : top;
      out[i] = float_of(x);
    }
    if (uint32_t(top) < kInfBits) return {kOk, 0.0, 0};
  }
  if (n && largest_magnitude(out, n) >= kInfBits) {
    size_t i = 0;
    while (magnitude(out[i]) < kInfBits) ++i;
    return {kNotFinite, double(out[i]), 0};
  }
  return {kOk, 0.0, 0};
}

}  // namespace
}  // namespace sc
