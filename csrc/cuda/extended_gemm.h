// The extended GEMM on a Hopper GPU (compute capability 9.0).
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "extended_gemm_arguments.h"

namespace citi {

// Writes to *problem why this device cannot run it, or which argument is not in its memory.
cudaError_t CheckOnDevice(const ExtendedGemm& gemm, int device, std::string* problem);

// Overwrites `out`, on this stream; valid arguments (`Invalid`) on this device.
cudaError_t ExtendedGemmCuda(const ExtendedGemm& gemm, int device, cudaStream_t stream);

}  // namespace citi
