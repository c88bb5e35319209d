// Compiled with AVX-512 flags: nothing here, static initialisers included, may run before the CPU check.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define SC_SIMD 1
#include "scratch.h"
#include "simd_avx512.h"

#include "path.h"

namespace sc {
const Kernels* avx512_table() {
  static constexpr Kernels kernels = table("avx512", crc32c_sse42);
  return &kernels;
}
}  // namespace sc
#else
namespace sc {
const Kernels* avx512_table() { return nullptr; }
}  // namespace sc
#endif
