// Detects the paths in this binary that the CPU and, for the wide registers, the operating system can run.
#include "kernels.h"

namespace sc {

const Kernels* avx512_table();
const Kernels* avx2_table();

#if defined(__x86_64__) || defined(__i386__)

namespace {
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("lzcnt");
}
}  // namespace

const Kernels* avx2_kernels() { return has_avx2() ? avx2_table() : nullptr; }
const Kernels* avx512_kernels() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? avx512_table()
             : nullptr;
}

#else

const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx512_kernels() { return nullptr; }

#endif

}  // namespace sc
