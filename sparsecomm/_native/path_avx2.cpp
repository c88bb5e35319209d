// Compiled with AVX2 flags: nothing here, static initialisers included, may run before the CPU check.
#include "kernels.h"

#if defined(__AVX2__) && defined(__F16C__) && defined(__BMI2__)
#define SC_SIMD 1
#include "scratch.h"
#include "simd_avx2.h"

#include "path.h"

namespace sc {
const Kernels* avx2_table() {
  static constexpr Kernels kernels = table("avx2", crc32c_sse42);
  return &kernels;
}
}  // namespace sc
#else
namespace sc {
const Kernels* avx2_table() { return nullptr; }
}  // namespace sc
#endif
