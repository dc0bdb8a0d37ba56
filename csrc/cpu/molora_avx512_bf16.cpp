#include "cpu/molora.h"
#include "cpu/molora_kernels.h"

namespace citi {

MoloraKernels MoloraKernelsAvx512Bf16(DType dtype) { return MoloraKernelsHere(dtype); }

}  // namespace citi
