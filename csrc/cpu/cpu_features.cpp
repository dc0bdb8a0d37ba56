#include "cpu/cpu_features.h"

namespace citi {

std::vector<Variant> RunnableVariants() {
  std::vector<Variant> runnable;
#if defined(CITI_X86_VARIANTS)
  // These also ask whether the operating system keeps the registers.
  const bool has_avx512 = __builtin_cpu_supports("avx512f");
#if defined(CITI_AVX512_BF16_VARIANT)
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) {
    runnable.push_back(Variant::kAvx512Bf16);
  }
#endif
  if (has_avx512) runnable.push_back(Variant::kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
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
