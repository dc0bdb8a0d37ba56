#include "cuda/launch.h"
#include "cuda/row_dots.h"
#include "cuda/row_dots_plan.h"
#include "whole_numbers.h"

namespace citi {
namespace {

template <class Elements>
cudaError_t LaunchDots(const RowDotsPlan& plan, cudaStream_t stream) {
  return Launch(plan.is_columns ? ColumnDots<Elements> : SegmentDots<Elements>, plan.num_blocks,
                kThreads, 0, stream, plan.launch);
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
      SumParts<Score>, CeilDiv(num_segments, plan.scores_per_block), kThreads, 0, stream,
      plan.launch.parts, static_cast<Score*>(dots.scores.data), plan.num_parts, num_segments,
      plan.scores_per_block);
}

}  // namespace

int64_t RowDotsCudaParts(int64_t num_tokens, int64_t num_features, int64_t num_segments) {
  return PlanParts(num_tokens, num_features, num_segments);
}

cudaError_t CheckOnDevice(const RowDots& dots, int device, std::string* problem) {
  const Placed tensors[] = {{"scores", dots.scores.data}, {"a", dots.a.data},
                            {"b", dots.b.data},           {"valid", dots.valid.data},
                            {"offset", dots.offset.data}, {"parts", dots.parts.data}};
  return CheckOnDevice(tensors, device, problem);
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
