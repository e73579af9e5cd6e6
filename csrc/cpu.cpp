#include "cpu.hpp"

namespace pyseq {

static int best_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd");
  if (v3) return v4 ? 4 : 3;
#endif
  return 2;
}

int cpu_level(int wanted) {
  static const int best = best_level();
  return wanted >= 2 && wanted < best ? wanted : best;
}

}  // namespace pyseq
