// Compiled for the baseline of the target, so it runs on every CPU.
#include "kernels.h"

#define SC_SIMD 0
#include "scratch.h"

#include "path.h"

namespace sc {
const Kernels* portable_kernels() {
  static constexpr Kernels kernels = table("portable", crc32c_portable);
  return &kernels;
}
}  // namespace sc
