// Launches whose plan asks for as much shared memory as the GPU has.
#pragma once

#include "cuda/launch.h"

namespace citi {

// Calls launch(bytes that a block may have) with the device current, unless a tensor does not lie
// on it: then its name goes to *problem.
template <int kCount, class Launch>
cudaError_t OnDevice(const Placed (&tensors)[kCount], int device, std::string* problem,
                     const Launch& launch) {
  cudaError_t error = CheckOnDevice(tensors, device, problem);
  if (error != cudaSuccess || !problem->empty()) return error;
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  int shared_limit = 0;
  error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess ? launch(int64_t{shared_limit}) : error;
}

}  // namespace citi
