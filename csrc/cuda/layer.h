// A MOLoRA layer in one call, on a Hopper GPU (compute capability 9.0). Not yet run on one.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "layer_arguments.h"

namespace citi {

// Bytes of the workspace, which begins at a multiple of 256; valid shapes (`Invalid`).
int64_t LayerWorkspaceBytes(const LayerForward& layer);
int64_t LayerWorkspaceBytes(const LayerBackward& layer);

// Writes to *problem what is wrong with an argument, or leaves it and launches on this stream. The
// backward also launches on `side`, which this stream waits for.
cudaError_t LayerCuda(const LayerForward& layer, const Vector& workspace, int device,
                      cudaStream_t stream, std::string* problem);
cudaError_t LayerCuda(const LayerBackward& layer, const Vector& workspace, int device,
                      cudaStream_t stream, cudaStream_t side, std::string* problem);

}  // namespace citi
