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
  // Stores the chosen lanes first, and garbage in what is left of a whole vector. Compressing to a register and
  // storing that is many times faster on Zen 4 than vpcompressd to memory.
  static void compress(uint32_t* out_i, float* out_v, I index, F value, M m) {
    _mm512_storeu_si512(out_i, _mm512_maskz_compress_epi32(m, index));
    _mm512_storeu_ps(out_v, _mm512_maskz_compress_ps(m, value));
  }
  static I load_index(const uint32_t* p) { return _mm512_loadu_si512(p); }
};

}  // namespace
}  // namespace sc
