// Row dots on a CUDA GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "row_dots_arguments.h"

namespace citi {

// Into how many parts the tokens are cut; the same on every GPU.
int64_t RowDotsCudaParts(int64_t num_tokens, int64_t num_features, int64_t num_segments);

// Writes which argument does not lie on this device to *problem, or leaves it.
cudaError_t CheckOnDevice(const RowDots& dots, int device, std::string* problem);

// Adds to the scores, on this stream; valid arguments (`Invalid`) on this device, no fp64 inputs.
cudaError_t AccumulateRowDotsCuda(const RowDots& dots, int device, cudaStream_t stream);

}  // namespace citi
