#include "cpu/cpu_features.h"

namespace citi {

std::vector<Variant> RunnableVariants() {
  std::vector<Variant> runnable;
#if defined(CITI_X86_VARIANTS)
  // These also ask whether the operating system keeps the registers.
  if (__builtin_cpu_supports("avx512f")) runnable.push_back(Variant::kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    runnable.push_back(Variant::kAvx2);
  }
#endif
  runnable.push_back(Variant::kPortable);
  return runnable;
}

const char* NameOf(Variant variant) {
  switch (variant) {
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
