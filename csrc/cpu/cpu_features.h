// Which instructions this CPU has, and which variant of the kernels runs.
#pragma once

#include <string>
#include <vector>

namespace citi {

enum class Variant { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// Variants that this build has and this CPU can run, the widest first; the last is "portable".
std::vector<Variant> RunnableVariants();

const char* NameOf(Variant variant);

}  // namespace citi
