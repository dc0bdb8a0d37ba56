#include "cpu/molora.h"
#include "cpu/molora_kernels.h"

namespace citi {

MoloraKernels MoloraKernelsPortable(DType dtype) { return MoloraKernelsHere(dtype); }

}  // namespace citi
