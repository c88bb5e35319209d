// CRC32C: slicing by eight tables on every CPU, three interleaved streams of the SSE4.2 instruction on CPUs that have
// it, and for long data folding by carry-less products (Gopal et al. 2009) on CPUs that compute 512 bits at once.
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace sc {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u;  // 0x1EDC6F41 reflected
constexpr size_t kLong = 4096, kShort = 256;   // bytes of each of the three streams

struct Tables {
  uint32_t slice[8][256];      // slice[j][v]: the effect of byte v followed by j zero bytes
  uint32_t skip_long[4][256];  // the effect of kLong zero bytes on byte j of the state
  uint32_t skip_short[4][256];

  Tables() {
    for (uint32_t v = 0; v < 256; ++v) {
      uint32_t crc = v;
      for (int i = 0; i < 8; ++i) crc = crc >> 1 ^ (crc & 1 ? kPolynomial : 0);
      slice[0][v] = crc;
    }
    for (int j = 1; j < 8; ++j)
      for (int v = 0; v < 256; ++v) slice[j][v] = slice[j - 1][v] >> 8 ^ slice[0][slice[j - 1][v] & 0xFF];
    fill_skip(skip_long, kLong);
    fill_skip(skip_short, kShort);
  }

  uint32_t zero8(uint32_t crc) const {  // eight zero bytes
    return slice[7][crc & 0xFF] ^ slice[6][crc >> 8 & 0xFF] ^ slice[5][crc >> 16 & 0xFF] ^ slice[4][crc >> 24];
  }

  void fill_skip(uint32_t (*skip)[256], size_t bytes) {
    for (int j = 0; j < 4; ++j) {
      skip[j][0] = 0;
      for (int bit = 0; bit < 8; ++bit) {
        uint32_t crc = uint32_t(1) << (8 * j + bit);
        for (size_t i = 0; i < bytes; i += 8) crc = zero8(crc);
        for (int v = 0; v < 1 << bit; ++v) skip[j][v | 1 << bit] = skip[j][v] ^ crc;  // linear in the bits
      }
    }
  }
};

const Tables& tables() {
  static const Tables t;
  return t;
}

uint64_t word(const uint8_t* p) {
  uint64_t v = 0;
  for (int i = 7; i >= 0; --i) v = v << 8 | p[i];  // compiles to one load on little-endian machines
  return v;
}

}  // namespace

uint32_t crc32c_portable(const uint8_t* data, size_t nbytes, uint32_t seed) {
  const Tables& t = tables();
  uint32_t crc = ~seed;
  for (; nbytes >= 8; nbytes -= 8, data += 8) {
    const uint64_t v = word(data) ^ crc;
    crc = t.slice[7][v & 0xFF] ^ t.slice[6][v >> 8 & 0xFF] ^ t.slice[5][v >> 16 & 0xFF] ^ t.slice[4][v >> 24 & 0xFF] ^
          t.slice[3][v >> 32 & 0xFF] ^ t.slice[2][v >> 40 & 0xFF] ^ t.slice[1][v >> 48 & 0xFF] ^ t.slice[0][v >> 56];
  }
  for (; nbytes; --nbytes) crc = crc >> 8 ^ t.slice[0][(crc ^ *data++) & 0xFF];
  return ~crc;
}

#if defined(__x86_64__)

namespace {

uint32_t skip(const uint32_t (*table)[256], uint32_t crc) {
  return table[0][crc & 0xFF] ^ table[1][crc >> 8 & 0xFF] ^ table[2][crc >> 16 & 0xFF] ^ table[3][crc >> 24];
}

// The instruction has a latency of three cycles and a throughput of one: three streams keep it busy.
__attribute__((target("sse4.2"))) inline uint32_t three_streams(const uint8_t* data, size_t stream, uint32_t crc,
                                                                const uint32_t (*table)[256]) {
  uint64_t a = crc, b = 0, c = 0;
  for (size_t i = 0; i < stream; i += 8) {
    a = __builtin_ia32_crc32di(a, word(data + i));
    b = __builtin_ia32_crc32di(b, word(data + stream + i));
    c = __builtin_ia32_crc32di(c, word(data + 2 * stream + i));
  }
  return skip(table, skip(table, uint32_t(a)) ^ uint32_t(b)) ^ uint32_t(c);
}

constexpr size_t kFolded = 256;  // bytes in the four registers

// x**n modulo the polynomial, reflected: bit 31 is the coefficient of x**0.
uint32_t power_of_x(unsigned n) {
  uint32_t v = 0x80000000u;
  for (; n; --n) v = v >> 1 ^ (v & 1 ? kPolynomial : 0);
  return v;
}

// Factors of the two halves of 128 bits that move them kFolded bytes ahead. A product of reflected numbers is one bit
// short, so the exponents are odd.
struct Folding {
  uint64_t low = uint64_t(power_of_x(8 * kFolded + 63)) << 32, high = uint64_t(power_of_x(8 * kFolded - 1)) << 32;
};

#define SC_FOLDING __attribute__((target("sse4.2,avx512f,vpclmulqdq")))

SC_FOLDING inline __m512i fold(__m512i x, __m512i by, const uint8_t* next) {
  const __m512i moved = _mm512_xor_si512(_mm512_clmulepi64_epi128(x, by, 0x00), _mm512_clmulepi64_epi128(x, by, 0x11));
  return _mm512_xor_si512(moved, _mm512_loadu_si512(next));
}

// Writes kFolded bytes to `left` whose CRC from state 0 is the CRC of the first `nbytes` from state `crc`. nbytes is a
// multiple of kFolded.
SC_FOLDING void fold_all(const uint8_t* data, size_t nbytes, uint32_t crc, uint8_t* left) {
  static const Folding folding;
  const __m512i by = _mm512_broadcast_i32x4(_mm_set_epi64x(int64_t(folding.high), int64_t(folding.low)));
  __m512i a = _mm512_loadu_si512(data), b = _mm512_loadu_si512(data + 64), c = _mm512_loadu_si512(data + 128),
          d = _mm512_loadu_si512(data + 192);
  a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128(int(crc))));
  for (size_t at = kFolded; at < nbytes; at += kFolded) {
    a = fold(a, by, data + at);
    b = fold(b, by, data + at + 64);
    c = fold(c, by, data + at + 128);
    d = fold(d, by, data + at + 192);
  }
  _mm512_storeu_si512(left, a);
  _mm512_storeu_si512(left + 64, b);
  _mm512_storeu_si512(left + 128, c);
  _mm512_storeu_si512(left + 192, d);
}

bool can_fold() {
  static const bool can = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
  return can;
}

}  // namespace

__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const uint8_t* data, size_t nbytes, uint32_t seed) {
  uint32_t crc = ~seed;
  if (nbytes >= 4 * kFolded && can_fold()) {
    uint8_t left[kFolded];
    const size_t folded = nbytes / kFolded * kFolded;
    fold_all(data, folded, crc, left);
    uint64_t state = 0;
    for (size_t i = 0; i < kFolded; i += 8) state = __builtin_ia32_crc32di(state, word(left + i));
    crc = uint32_t(state);
    data += folded;
    nbytes -= folded;
  }
  if (nbytes >= 3 * kShort) {
    const Tables& t = tables();
    for (; nbytes >= 3 * kLong; nbytes -= 3 * kLong, data += 3 * kLong) crc = three_streams(data, kLong, crc, t.skip_long);
    for (; nbytes >= 3 * kShort; nbytes -= 3 * kShort, data += 3 * kShort)
      crc = three_streams(data, kShort, crc, t.skip_short);
  }
  uint64_t wide = crc;
  for (; nbytes >= 8; nbytes -= 8, data += 8) wide = __builtin_ia32_crc32di(wide, word(data));
  crc = uint32_t(wide);
  for (; nbytes; --nbytes) crc = __builtin_ia32_crc32qi(crc, *data++);
  return ~crc;
}

#else

uint32_t crc32c_sse42(const uint8_t* data, size_t nbytes, uint32_t seed) { return crc32c_portable(data, nbytes, seed); }

#endif

}  // namespace sc
