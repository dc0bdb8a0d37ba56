#include <cuda_runtime.h>

#include "cuda/row_dots.h"
#include "cuda/row_dots_plan.h"

namespace citi {
namespace {

constexpr int64_t kMaxGrid = 0x7fffffff;

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
cudaError_t Launch(void (*kernel)(Arguments...), int64_t num_blocks, cudaStream_t stream,
                   Arguments... arguments) {
  if (num_blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(num_blocks)), dim3(kThreads), pointers, 0,
                          stream);
}

template <class Elements>
cudaError_t LaunchDots(const RowDotsPlan& plan, cudaStream_t stream) {
  return Launch(plan.is_columns ? ColumnDots<Elements> : SegmentDots<Elements>, plan.num_blocks,
                stream, plan.launch);
}

cudaError_t LaunchDots(const RowDotsPlan& plan, cudaStream_t stream) {
  if (!plan.is_aligned) return LaunchDots<AnyElements>(plan, stream);
  switch (plan.launch.a_dtype) {
    case DType::kFloat32:
      return LaunchDots<AlignedElements<float>>(plan, stream);
    case DType::kBFloat16:
      return LaunchDots<AlignedElements<BFloat16>>(plan, stream);
    case DType::kFloat16:
      return LaunchDots<AlignedElements<Float16>>(plan, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class Score>
cudaError_t LaunchSum(const RowDots& dots, const RowDotsPlan& plan, cudaStream_t stream) {
  const int64_t num_segments = dots.num_segments();
  return Launch<const double*, Score*, int64_t, int64_t, int>(
      SumParts<Score>, CeilDiv(num_segments, plan.scores_per_block), stream, plan.launch.parts,
      static_cast<Score*>(dots.scores.data), plan.num_parts, num_segments, plan.scores_per_block);
}

}  // namespace

int64_t RowDotsCudaParts(int64_t num_tokens, int64_t num_features, int64_t num_segments) {
  return PlanParts(num_tokens, num_features, num_segments);
}

cudaError_t CheckOnDevice(const RowDots& dots, int device, std::string* problem) {
  const struct {
    const char* name;
    const void* data;
  } tensors[] = {{"scores", dots.scores.data}, {"a", dots.a.data},
                 {"b", dots.b.data},           {"valid", dots.valid.data},
                 {"offset", dots.offset.data}, {"parts", dots.parts.data}};
  for (const auto& tensor : tensors) {
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

cudaError_t AccumulateRowDotsCuda(const RowDots& dots, int device, cudaStream_t stream) {
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  const RowDotsPlan plan = PlanRowDots(dots);
  const cudaError_t error = LaunchDots(plan, stream);
  if (error != cudaSuccess) return error;
  return dots.scores.dtype == DType::kFloat64 ? LaunchSum<double>(dots, plan, stream)
                                              : LaunchSum<float>(dots, plan, stream);
}

}  // namespace citi
