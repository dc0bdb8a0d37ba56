#include "cuda/launch.h"
#include "cuda/non_finite_plan.h"
#include "cuda/rank_gradients_plan.h"
#include "cuda/shared_limit.h"
#include "cuda/skinny.h"

namespace citi {

cudaError_t ScaleRanksCuda(const ScaleArguments& s, int device, cudaStream_t stream,
                           std::string* problem) {
  const Placed tensors[] = {{"h", s.h.data}, {"probs", s.probs.data}, {"u", s.u.data}};
  return OnDevice(tensors, device, problem, [&](int64_t) {
    const BlockPlan plan = PlanScaleRanks(s.shape.num_tokens, s.shape.padded_ranks());
    return Launch(s.h.dtype == DType::kBFloat16 ? ScaleRanks<BFloat16> : ScaleRanks<Float16>,
                  plan.num_blocks, kSumThreads, plan.shared_bytes, stream, AsRankLaunch(s));
  });
}

cudaError_t RankGradientsCuda(const RankArguments& s, int device, cudaStream_t stream,
                              std::string* problem) {
  const Placed tensors[] = {{"du", s.du.data},
                            {"h", s.h.data},
                            {"probs", s.probs.data},
                            {"dgate", s.dgate.data},
                            {"dz", s.dz.data}};
  return OnDevice(tensors, device, problem, [&](int64_t) {
    const BlockPlan plan =
        PlanRankGradients(s.shape.num_tokens, s.shape.padded_ranks(), s.shape.num_gates());
    return Launch(s.h.dtype == DType::kBFloat16 ? RankGradients<BFloat16> : RankGradients<Float16>,
                  plan.num_blocks, kRankThreads, plan.shared_bytes, stream, AsRankLaunch(s));
  });
}

cudaError_t SumSharesCuda(const SumArguments& s, int device, cudaStream_t stream,
                          std::string* problem) {
  const Placed tensors[] = {{"parts", s.parts.data},
                            {"outputs", s.outputs.front().out.data},
                            {"outputs", s.outputs.back().out.data}};
  return OnDevice(tensors, device, problem, [&](int64_t) {
    const BlockPlan plan = PlanSumShares(s.num_rows, s.num_columns);
    return Launch(SumShares, plan.num_blocks, kSumThreads, plan.shared_bytes, stream,
                  AsSumLaunch(s));
  });
}

cudaError_t AddNonFiniteCuda(const NonFiniteArguments& s, int device, cudaStream_t stream,
                             std::string* problem) {
  const Placed tensors[] = {
      {"out", s.out.data}, {"left", s.left.data}, {"right", s.right.data}, {"probs", s.probs.data}};
  return OnDevice(tensors, device, problem, [&](int64_t) {
    const NonFinitePlan plan = PlanNonFinite(s);
    return Launch(s.out.dtype == DType::kBFloat16 ? AddNonFinite<BFloat16> : AddNonFinite<Float16>,
                  plan.num_blocks, kNonFiniteThreads, 0, stream, plan.launch);
  });
}

}  // namespace citi
