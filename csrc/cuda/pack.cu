#include "cuda/launch.h"
#include "cuda/pack_plan.h"
#include "cuda/shared_limit.h"
#include "cuda/skinny.h"

namespace citi {

cudaError_t PackRowsCuda(const PackArguments& s, int device, cudaStream_t stream,
                         std::string* problem) {
  const Placed tensors[] = {{"out", s.out.data},
                            {"sources", s.sources.front().matrix.data},
                            {"sources", s.sources.back().matrix.data},
                            {"zeros", s.zeros.data}};
  return OnDevice(tensors, device, problem, [&](int64_t) {
    const PackPlan plan = PlanPack(s);
    return Launch(s.out.dtype == DType::kBFloat16 ? PackRows<BFloat16> : PackRows<Float16>,
                  plan.num_blocks, kPackThreads, 0, stream, plan.launch);
  });
}

}  // namespace citi
