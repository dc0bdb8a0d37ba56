#include "cpu/cpu_features.h"

#if defined(CITI_AVX2_VARIANT) || defined(CITI_AVX512_BF16_VARIANT)
#include <cpuid.h>
#endif

namespace citi {
namespace {

// By CPUID: compilers know these names late, GCC from 11 ("f16c") and Clang from 18 on. Their
// registers are those of AVX2 and AVX-512, which are asked for as well.
#if defined(CITI_AVX2_VARIANT)
bool HasF16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}
#endif

#if defined(CITI_AVX512_BF16_VARIANT)
bool HasAvx512Bf16() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1) != 0;
}
#endif

}  // namespace

std::vector<Variant> RunnableVariants() {
  std::vector<Variant> runnable;
  // __builtin_cpu_supports also asks whether the operating system keeps the registers.
#if defined(CITI_AVX512_BF16_VARIANT)
  if (__builtin_cpu_supports("avx512f") && HasAvx512Bf16()) {
    runnable.push_back(Variant::kAvx512Bf16);
  }
#endif
#if defined(CITI_AVX512_VARIANT)
  if (__builtin_cpu_supports("avx512f")) runnable.push_back(Variant::kAvx512);
#endif
#if defined(CITI_AVX2_VARIANT)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c()) {
    runnable.push_back(Variant::kAvx2);
  }
#endif
  runnable.push_back(Variant::kPortable);
  return runnable;
}

const char* NameOf(Variant variant) {
  switch (variant) {
    case Variant::kAvx512Bf16:
      return "avx512_bf16";
    case Variant::kAvx512:
      return "avx512";
    case Variant::kAvx2:
      return "avx2";
    case Variant::kPortable:
      return "portable";
  }
  return "";
}

}  // namespace citi
