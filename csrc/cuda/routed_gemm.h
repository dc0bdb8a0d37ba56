// The extended GEMM that makes its own extension, on a Hopper GPU (compute capability 9.0).
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "routed_gemm_arguments.h"

namespace citi {

// Overwrites `out` and what is rank-sized, on this stream; valid arguments (`Invalid`). Writes to
// *problem why this device cannot run it, or which argument is not in its memory.
cudaError_t RoutedGemmCuda(const RoutedGemm& routed, int device, cudaStream_t stream,
                           std::string* problem);

}  // namespace citi
