#include "cpu/molora.h"
#include "cpu/molora_kernels.h"

namespace citi {

MoloraKernels MoloraKernelsAvx2(DType dtype) { return MoloraKernelsHere(dtype); }

}  // namespace citi
