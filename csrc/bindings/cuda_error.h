// An error of CUDA as an exception of Python.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace citi {

inline void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("citi_kernels._C could not launch on CUDA: ") +
                           cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

}  // namespace citi
