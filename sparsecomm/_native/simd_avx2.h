// Vectors of 8 floats: AVX2, F16C, BMI.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace sc {
namespace {

// kCompress.lane[m] lists the set bits of m, lowest first: the permutation that moves chosen lanes to the front.
struct CompressTable {
  alignas(64) uint8_t lane[256][8];
  constexpr CompressTable() : lane() {
    for (int m = 0; m < 256; ++m) {
      int at = 0;
      for (int bit = 0; bit < 8; ++bit)
        if (m >> bit & 1) lane[m][at++] = uint8_t(bit);
    }
  }
};
constexpr CompressTable kCompress;

struct V {
  static constexpr size_t W = 8;
  using F = __m256;
  using I = __m256i;
  using M = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load_grad(const float* p) { return _mm256_loadu_ps(p); }
  static F load_grad(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load_grad(const Bf16* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void store_half(uint16_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static F set1(float v) { return _mm256_set1_ps(v); }
  static I set1(uint32_t v) { return _mm256_set1_epi32(int(v)); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I magnitude(F v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF)); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  // a >= b is a > b - 1, because both are at most 2**31 - 1; with b = 0 every lane is chosen.
  static M ge(I a, I b) { return _mm256_cmpgt_epi32(a, _mm256_sub_epi32(b, _mm256_set1_epi32(1))); }
  static unsigned bits(M m) { return unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(m))); }
  static F zero_where(M m, F v) { return _mm256_andnot_ps(_mm256_castsi256_ps(m), v); }
  static I iota(uint32_t first) {
    return _mm256_add_epi32(_mm256_set1_epi32(int(first)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  // Stores the chosen lanes first, and garbage in the rest of a whole vector.
  static void compress(uint32_t* out_i, float* out_v, I index, F value, M m) {
    uint64_t lanes;
    std::memcpy(&lanes, kCompress.lane[bits(m)], 8);
    const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(lanes)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out_i), _mm256_permutevar8x32_epi32(index, order));
    _mm256_storeu_ps(out_v, _mm256_permutevar8x32_ps(value, order));
  }
  static I load_index(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_index(uint32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static I load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I mul_lanes(uint32_t by) { return _mm256_mullo_epi32(iota(0), set1(by)); }  // 0, by, 2 * by, ...
  static I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_(I a, I b) { return _mm256_or_si256(a, b); }
  static I shift_right(I v, I by) { return _mm256_srlv_epi32(v, by); }
  static I shift_left(I v, I by) { return _mm256_sllv_epi32(v, by); }  // 32 and more gives 0
  static I permute(I v, I from) { return _mm256_permutevar8x32_epi32(v, from); }
  // AVX2 has no permutation of 16-bit words across the register.
  static constexpr unsigned kNarrow = 0;
  static I narrow_words(uint32_t) { return set1(0u); }
  static I narrow_shifts(uint32_t) { return set1(0u); }
  static I narrow_pick(I words, I) { return words; }
  static I broadcast_last(I v) { return _mm256_permutevar8x32_epi32(v, _mm256_set1_epi32(7)); }
  static I prefix_sum(I v) {  // inclusive
    v = _mm256_add_epi32(v, _mm256_slli_si256(v, 4));
    v = _mm256_add_epi32(v, _mm256_slli_si256(v, 8));
    const I low = _mm256_permutevar8x32_epi32(v, _mm256_set1_epi32(3));
    return _mm256_add_epi32(v, _mm256_blend_epi32(_mm256_setzero_si256(), low, 0xF0));
  }
  // Writes base + position of each one of a word, lowest first, and up to a vector of garbage behind them.
  static size_t ones(uint64_t word, uint32_t base, uint32_t* out) {
    const uint32_t* const start = out;
    for (uint32_t at = 0; at < 64; at += 8, word >>= 8) {
      uint64_t lanes;
      std::memcpy(&lanes, kCompress.lane[word & 0xFF], 8);
      store_index(out, _mm256_add_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(lanes))), set1(base + at)));
      out += __builtin_popcount(unsigned(word & 0xFF));
    }
    return size_t(out - start);
  }
};

}  // namespace
}  // namespace sc
