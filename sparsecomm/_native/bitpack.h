// Packing blocks of 128 values of up to 32 bits, least significant bit first.
#pragma once

#include "scalar.h"

namespace sc {
namespace {

inline size_t packed_bytes(size_t count, unsigned width) { return (count * width + 7) / 8; }

// All positions are compile-time constants, so the loop unrolls into shifts and stores.
template <unsigned kWidth>
void pack_block(const uint32_t* values, uint8_t* out) {
  for (size_t part = 0; part < kBlock / 32; ++part) {
    uint64_t word = 0;
    unsigned filled = 0;
#pragma GCC unroll 32
    for (unsigned i = 0; i < 32; ++i) {
      word |= uint64_t(values[part * 32 + i]) << filled;
      filled += kWidth;
      if (filled >= 32) {
        store32(out, uint32_t(word));
        out += 4;
        word >>= 32;
        filled -= 32;
      }
    }
  }
}

#if !SC_SIMD
// Reads up to 8 bytes behind the block.
template <unsigned kWidth>
void unpack_block(const uint8_t* data, uint32_t* values) {
  constexpr uint64_t kMask = (uint64_t(1) << kWidth) - 1;
  for (size_t part = 0; part < kBlock / 32; ++part) {
#pragma GCC unroll 32
    for (unsigned i = 0; i < 32; ++i)
      values[part * 32 + i] = uint32_t(load64(data + i * kWidth / 8) >> (i * kWidth % 8) & kMask);
    data += 4 * kWidth;
  }
}
template <>
inline void unpack_block<0>(const uint8_t*, uint32_t* values) {
  std::memset(values, 0, kBlock * sizeof *values);
}
#endif

template <>
inline void pack_block<0>(const uint32_t*, uint8_t*) {}

#define SC_WIDTHS(X)                                                                                            \
  X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) \
  X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31) X(32)

// Writes the low `width` bits of `count` values, packed_bytes(count, width) bytes. The other bits must be zero.
// `values` holds 128 values, zero from `count` on.
inline void pack(const uint32_t* values, size_t count, unsigned width, uint8_t* out) {
  uint8_t partial[kBlock * 4];
  uint8_t* const to = count == kBlock ? out : partial;
  switch (width) {
#define SC_CASE(w) \
  case w: pack_block<w>(values, to); break;
    SC_WIDTHS(SC_CASE)
#undef SC_CASE
  }
  if (count != kBlock) std::memcpy(out, partial, packed_bytes(count, width));
}

#if SC_SIMD

// Calls use(i, vector of values i .. i + W - 1) for a whole block. W values take W * width / 8 whole bytes, at most one
// vector; each lane picks the two words that may contain its bits. Reads up to one vector behind the block.
template <class Use>
void unpack_each(const uint8_t* data, unsigned width, Use use) {
  const size_t step = V::W * width / 8;
  const typename V::I mask = V::set1(uint32_t((uint64_t(1) << width) - 1));
  if (width <= V::kNarrow) {
    const typename V::I from = V::narrow_words(width), shift = V::narrow_shifts(width);
    for (size_t i = 0; i < kBlock; i += V::W, data += step)
      use(i, V::and_(mask, V::shift_right(V::narrow_pick(V::load_bytes(data), from), shift)));
    return;
  }
  const typename V::I at = V::mul_lanes(width), word = V::shift_right(at, V::set1(5u));
  const typename V::I next = V::add(word, V::set1(1u)), shift = V::and_(at, V::set1(31u));
  const typename V::I back = V::sub(V::set1(32u), shift);
  for (size_t i = 0; i < kBlock; i += V::W, data += step) {
    const typename V::I words = V::load_bytes(data);
    use(i, V::and_(mask, V::or_(V::shift_right(V::permute(words, word), shift),
                                V::shift_left(V::permute(words, next), back))));
  }
}
inline void unpack_vectors(const uint8_t* data, unsigned width, uint32_t* values) {
  unpack_each(data, width, [&](size_t i, typename V::I v) { V::store_index(values + i, v); });
}
constexpr size_t kOverread = 4 * V::W;

#else

inline void unpack_vectors(const uint8_t* data, unsigned width, uint32_t* values) {
  switch (width) {
#define SC_CASE(w) \
  case w: unpack_block<w>(data, values); break;
    SC_WIDTHS(SC_CASE)
#undef SC_CASE
  }
}
constexpr size_t kOverread = 8;

#endif

// Inverse of `pack`. Reads no byte at or behind `end`, and leaves garbage in values[count..127].
inline void unpack(const uint8_t* data, const uint8_t* end, size_t count, unsigned width, uint32_t* values) {
  uint8_t partial[kBlock * 4 + kOverread];
  if (size_t(end - data) < kBlock / 8 * width + kOverread) {
    std::memset(partial, 0, sizeof partial);
    const size_t bytes = packed_bytes(count, width);
    if (bytes) std::memcpy(partial, data, bytes);
    data = partial;
  }
  unpack_vectors(data, width, values);
}

}  // namespace
}  // namespace sc
