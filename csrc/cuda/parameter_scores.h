// Parameter scores on a CUDA GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "parameter_scores_arguments.h"

namespace citi {

// Of the workspace, for valid sizes (`InvalidSizes`); the same on every GPU.
int64_t ParameterScoresCudaParts(const ParameterScores& problem);

// Writes which argument does not lie on this device to *wrong, or leaves it.
cudaError_t CheckOnDevice(const ParameterScores& problem, int device, std::string* wrong);

// Adds to the scores, on this stream; valid arguments (`Invalid`) on this device.
cudaError_t AccumulateParameterScoresCuda(const ParameterScores& problem, int device,
                                          cudaStream_t stream);

}  // namespace citi
