#include "cuda/factor_gradients_plan.h"
#include "cuda/launch.h"
#include "cuda/shared_limit.h"
#include "cuda/skinny.h"

namespace citi {
namespace {

template <class Element, int kTiles>
cudaError_t LaunchFactor(const FactorPlan& plan, const FactorLaunch& launch, bool has_dropout,
                         cudaStream_t stream) {
  return Launch(has_dropout ? FactorGradients<Element, kTiles, false, true>
                            : FactorGradients<Element, kTiles, false, false>,
                plan.num_blocks, kFactorThreads, plan.shared_bytes, stream, launch);
}

template <class Element>
cudaError_t LaunchFactor(const FactorPlan& plan, const FactorArguments& s, cudaStream_t stream) {
  const FactorLaunch launch = AsFactorLaunch(s, plan);
  switch (plan.column_tiles) {
    case kUpTiles:
      if (s.num_ranks == 0) {
        return LaunchFactor<Element, kUpTiles>(plan, launch, s.dropout.has_value(), stream);
      }
      return Launch(FactorGradients<Element, kUpTiles, true, false>, plan.num_blocks,
                    kFactorThreads, plan.shared_bytes, stream, launch);
    case 6:
      return LaunchFactor<Element, 6>(plan, launch, s.dropout.has_value(), stream);
    case 12:
      return LaunchFactor<Element, 12>(plan, launch, s.dropout.has_value(), stream);
    case 24:
      return LaunchFactor<Element, 24>(plan, launch, s.dropout.has_value(), stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

FactorParts FactorCudaParts(int64_t num_tokens, int64_t num_columns, int64_t num_narrow,
                            bool gives_ranks) {
  const FactorCut cut =
      PlanFactor(num_tokens, num_columns, num_narrow, gives_ranks, kLeastSharedLimit).cut;
  return {cut.num_tiles, cut.num_shares};
}

cudaError_t FactorGradientsCuda(const FactorArguments& s, int device, cudaStream_t stream,
                                std::string* problem) {
  const Placed tensors[] = {
      {"wide", s.wide.data},   {"narrow", s.narrow.data}, {"b", s.b.data},      {"du", s.du.data},
      {"parts", s.parts.data}, {"counts", s.counts.data}, {"done", s.done.data}};
  return OnDevice(tensors, device, problem, [&](int64_t shared_limit) {
    const FactorPlan plan = PlanFactor(s.num_tokens, s.num_columns, s.num_narrow, s.num_ranks != 0,
                                       shared_limit, s.fits_narrow);
    return s.wide.dtype == DType::kBFloat16 ? LaunchFactor<BFloat16>(plan, s, stream)
                                            : LaunchFactor<Float16>(plan, s, stream);
  });
}

}  // namespace citi
