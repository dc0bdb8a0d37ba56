// Launches on a device and a stream, with errors as values.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace citi {

// Makes a device current, and the one before again.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess) error_ = cudaSetDevice(device);
  }
  ~CurrentDevice() {
    if (error_ == cudaSuccess) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
};

// Unlike <<<>>> it returns the error of this very launch.
template <class... Arguments>
cudaError_t Launch(void (*kernel)(Arguments...), int64_t num_blocks, int num_threads,
                   int64_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
  constexpr int64_t kMaxGrid = 0x7fffffff;
  // What every kernel may have; more is asked for.
  constexpr int64_t kSharedBytesOfAll = 48 * 1024;
  if (num_blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kSharedBytesOfAll) {
    const cudaError_t error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(function, dim3(static_cast<unsigned>(num_blocks)),
                          dim3(static_cast<unsigned>(num_threads)), pointers,
                          static_cast<size_t>(shared_bytes), stream);
}

// One tensor of a launch, by the name of its argument. data may be null: left out.
struct Placed {
  const char* name;
  const void* data;
};

// Writes to *problem, or leaves it, which of them does not lie on this device.
template <int kCount>
cudaError_t CheckOnDevice(const Placed (&tensors)[kCount], int device, std::string* problem) {
  for (const Placed& tensor : tensors) {
    if (tensor.data == nullptr) continue;
    cudaPointerAttributes attributes;
    const cudaError_t error = cudaPointerGetAttributes(&attributes, tensor.data);
    if (error != cudaSuccess) return error;
    const bool is_on_gpu =
        attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
    if (is_on_gpu && attributes.device == device) continue;
    *problem = std::string(tensor.name) + ": must be in the memory of CUDA device " +
               std::to_string(device);
    return cudaSuccess;
  }
  return cudaSuccess;
}

}  // namespace citi
