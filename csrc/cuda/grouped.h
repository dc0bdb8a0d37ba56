// Grouped products of top-k routing on a CUDA GPU. Not yet run on one.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "grouped_arguments.h"

namespace citi {

// How many parts the dots of so many columns come in; the same on every GPU.
int64_t GroupedColumnTiles(int64_t num_columns);

// Writes which argument does not lie on this device to *problem, or leaves it.
cudaError_t CheckOnDevice(const GroupedProduct& product, int device, std::string* problem);
cudaError_t CheckOnDevice(const GroupedGradient& gradient, int device, std::string* problem);

// On this stream; valid arguments (`Invalid`) on this device.
cudaError_t RunGroupedProduct(const GroupedProduct& product, int device, cudaStream_t stream);
cudaError_t RunGroupedGradient(const GroupedGradient& gradient, int device, cudaStream_t stream);

}  // namespace citi
