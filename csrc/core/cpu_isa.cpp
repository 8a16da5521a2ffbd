#include "core/cpu_isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pybackdoor {

#if defined(__x86_64__)
namespace {

// __builtin_cpu_supports knows "f16c" from GCC 11 and clang 18 only.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

}  // namespace

bool has_avx2() { return __builtin_cpu_supports("avx2") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  if (has_avx512()) names.push_back("avx512");
  if (has_avx2()) names.push_back("avx2");
  names.push_back("portable");
  return names;
}

}  // namespace pybackdoor
