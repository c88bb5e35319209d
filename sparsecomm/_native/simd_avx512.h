// Vectors of 16 floats: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace sc {
namespace {

struct V {
  static constexpr size_t W = 16;
  using F = __m512;
  using I = __m512i;
  using M = __mmask16;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_grad(const float* p) { return _mm512_loadu_ps(p); }
  static F load_grad(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_grad(const Bf16* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void store_half(uint16_t* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static F set1(float v) { return _mm512_set1_ps(v); }
  static I set1(uint32_t v) { return _mm512_set1_epi32(int(v)); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I magnitude(F v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static M ge(I a, I b) { return _mm512_cmpge_epi32_mask(a, b); }  // both below 2**31
  static unsigned bits(M m) { return m; }
  static F zero_where(M m, F v) { return _mm512_maskz_mov_ps(_knot_mask16(m), v); }
  static I iota(uint32_t first) {
    return _mm512_add_epi32(_mm512_set1_epi32(int(first)),
                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  // Stores the chosen lanes first, and garbage in the rest of a whole vector. Compressing to a register and storing
  // that is many times faster on Zen 4 than vpcompressd to memory.
  static void compress(uint32_t* out_i, float* out_v, I index, F value, M m) {
    _mm512_storeu_si512(out_i, _mm512_maskz_compress_epi32(m, index));
    _mm512_storeu_ps(out_v, _mm512_maskz_compress_ps(m, value));
  }
  static I load_index(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_index(uint32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static I load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul_lanes(uint32_t by) { return _mm512_mullo_epi32(iota(0), set1(by)); }  // 0, by, 2 * by, ...
  static I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_(I a, I b) { return _mm512_or_si512(a, b); }
  static I shift_right(I v, I by) { return _mm512_srlv_epi32(v, by); }
  static I shift_left(I v, I by) { return _mm512_sllv_epi32(v, by); }  // 32 and more gives 0
  static I permute(I v, I from) { return _mm512_permutexvar_epi32(from, v); }
  // 16 values of up to 17 bits: one permutation of 16-bit words brings all bits of value i to lane i.
  static constexpr unsigned kNarrow = 17;
  static I narrow_words(uint32_t width) {
    const I low = _mm512_srli_epi32(mul_lanes(width), 4);
    return or_(low, _mm512_slli_epi32(add(low, set1(1u)), 16));
  }
  static I narrow_shifts(uint32_t width) { return and_(mul_lanes(width), set1(15u)); }
  static I narrow_pick(I words, I from) { return _mm512_permutexvar_epi16(from, words); }
  static I broadcast_last(I v) { return _mm512_permutexvar_epi32(_mm512_set1_epi32(15), v); }
  static I prefix_sum(I v) {  // inclusive
    const I zero = _mm512_setzero_si512();
    v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 15));
    v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 14));
    v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 12));
    return _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 8));
  }
  // Writes base + position of each one of a word, lowest first, and up to a vector of garbage behind them.
  static size_t ones(uint64_t word, uint32_t base, uint32_t* out) {
    const uint32_t* const start = out;
    for (uint32_t at = 0; at < 64; at += 16, word >>= 16) {
      const M m = M(word);
      _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m, iota(base + at)));
      out += __builtin_popcount(m);
    }
    return size_t(out - start);
  }
};

}  // namespace
}  // namespace sc
