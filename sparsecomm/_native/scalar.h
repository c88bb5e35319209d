// Scalar building blocks of all paths: bit casts, half and bfloat16 conversions. Included once by each path's
// translation unit, inside an unnamed namespace, so that the linker never merges a function compiled for one
// instruction set with the same function compiled for another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace sc {
namespace {

struct NoGrad {};
struct Half {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

inline size_t min_of(size_t a, size_t b) { return a < b ? a : b; }
inline size_t max_of(size_t a, size_t b) { return a > b ? a : b; }

inline uint32_t bits_of(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return b;
}
inline float float_of(uint32_t b) {
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}
inline uint32_t magnitude(float v) { return bits_of(v) & kMagnitude; }

inline uint64_t load64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  v = __builtin_bswap64(v);
#endif
  return v;
}
inline uint32_t load32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  v = __builtin_bswap32(v);
#endif
  return v;
}
inline void store64(uint8_t* p, uint64_t v) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  v = __builtin_bswap64(v);
#endif
  std::memcpy(p, &v, 8);
}
inline void store32(uint8_t* p, uint32_t v) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  v = __builtin_bswap32(v);
#endif
  std::memcpy(p, &v, 4);
}

// Nearest half, ties to even.
inline uint16_t half_from(float v) {
  const uint32_t x = bits_of(v), sign = (x >> 16) & 0x8000u, a = x & kMagnitude;
  if (a >= kInfBits) return uint16_t(sign | 0x7C00u | (a > kInfBits ? 0x200u | ((a >> 13) & 0x3FFu) : 0u));
  if (a >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // from 65520 on everything rounds to infinity
  if (a >= 0x38800000u) {
    const uint32_t m = a - 0x38000000u;
    return uint16_t(sign | ((m + 0xFFFu + ((m >> 13) & 1u)) >> 13));
  }
  // Below the smallest normal half: adding 0.5, whose unit in the last place is 2**-24, makes the adder round.
  return uint16_t(sign | (bits_of(float_of(a) + 0.5f) - bits_of(0.5f)));
}

inline float float_from(Half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, e = h.bits & 0x7C00u, m = h.bits & 0x3FFu;
  if (e == 0x7C00u) return float_of(sign | kInfBits | (m << 13) | (m ? 0x400000u : 0u));
  if (e == 0) return float_of(sign | bits_of(float(m) * 0x1p-24f));
  return float_of(sign | ((uint32_t(h.bits & 0x7FFFu) << 13) + 0x38000000u));
}

// Nearest bfloat16, ties to even; NaN becomes 0x7FC0.
inline uint16_t bf16_from(float v) {
  const uint32_t x = bits_of(v);
  const uint32_t rounded = (x + 0x7FFFu + ((x >> 16) & 1u)) >> 16;
  return uint16_t((x & kMagnitude) > kInfBits ? 0x7FC0u : rounded);
}

inline float float_from(Bf16 h) { return float_of(uint32_t(h.bits) << 16); }
inline float float_from(float v) { return v; }

// residual[i] + grad[i] * scale, the product rounded before the sum (built with -ffp-contract=off).
template <class T, bool kScaled>
inline float acc_at(const T* grad, const float* residual, size_t i, float scale) {
  if constexpr (sizeof(T) == 1) {  // NoGrad
    (void)grad, (void)scale;
    return residual[i];
  } else {
    const float g = float_from(grad[i]);
    return residual[i] + (kScaled ? g * scale : g);
  }
}

}  // namespace
}  // namespace sc
