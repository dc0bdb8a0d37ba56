#include "cuda/launch.h"
#include "cuda/shared_limit.h"
#include "cuda/shrink_plan.h"
#include "cuda/skinny.h"

namespace citi {
namespace {

template <class Element, int kTiles>
cudaError_t LaunchShrink(const ShrinkPlan& plan, const ShrinkLaunch& launch, bool has_dropout,
                         cudaStream_t stream) {
  return Launch(has_dropout ? Shrink<Element, kTiles, true> : Shrink<Element, kTiles, false>,
                plan.num_blocks, kShrinkThreads, plan.shared_bytes, stream, launch);
}

template <class Element>
cudaError_t LaunchShrink(const ShrinkPlan& plan, const ShrinkLaunch& launch, bool has_dropout,
                         cudaStream_t stream) {
  switch (plan.row_tiles) {
    case 6:
      return LaunchShrink<Element, 6>(plan, launch, has_dropout, stream);
    case 12:
      return LaunchShrink<Element, 12>(plan, launch, has_dropout, stream);
    case 24:
      return LaunchShrink<Element, 24>(plan, launch, has_dropout, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class Element>
cudaError_t ShrinkAndRoute(const ShrinkArguments& s, const ShrinkPlan& plan, cudaStream_t stream) {
  const ShrinkLaunch launch = AsShrinkLaunch(s, plan);
  const cudaError_t error = LaunchShrink<Element>(plan, launch, s.dropout.has_value(), stream);
  if (error != cudaSuccess || plan.num_splits == 1) return error;
  return Launch(SumAndRoute<Element>, plan.num_route_blocks, kShrinkThreads,
                plan.route_shared_bytes, stream, launch);
}

}  // namespace

int64_t ShrinkCudaSplits(int64_t num_tokens, int64_t num_inputs) {
  return ShrinkSplits(num_tokens, num_inputs);
}

cudaError_t ShrinkCuda(const ShrinkArguments& s, int device, cudaStream_t stream,
                       std::string* problem) {
  const Placed tensors[] = {{"x", s.x.data}, {"stack", s.stack.data}, {"h", s.h.data},
                            {"u", s.u.data}, {"probs", s.probs.data}, {"parts", s.parts.data}};
  return OnDevice(tensors, device, problem, [&](int64_t shared_limit) {
    const ShrinkPlan plan =
        PlanShrink(s.shape.num_tokens, s.num_inputs, s.shape.num_rows(), shared_limit);
    return s.x.dtype == DType::kBFloat16 ? ShrinkAndRoute<BFloat16>(s, plan, stream)
                                         : ShrinkAndRoute<Float16>(s, plan, stream);
  });
}

cudaError_t RowProductCuda(const RowProductArguments& s, int device, cudaStream_t stream,
                           std::string* problem) {
  const Placed tensors[] = {{"wide", s.wide.data}, {"rows", s.rows.data}, {"parts", s.parts.data}};
  return OnDevice(tensors, device, problem, [&](int64_t shared_limit) {
    const ShrinkPlan plan = PlanShrink(s.num_tokens, s.num_columns, s.num_rows, shared_limit);
    const ShrinkLaunch launch = AsShrinkLaunch(s, plan);
    return s.wide.dtype == DType::kBFloat16 ? LaunchShrink<BFloat16>(plan, launch, false, stream)
                                            : LaunchShrink<Float16>(plan, launch, false, stream);
  });
}

}  // namespace citi
