#include "cuda/input_update_plan.h"
#include "cuda/launch.h"
#include "cuda/shared_limit.h"
#include "cuda/skinny.h"

namespace citi {

cudaError_t InputUpdateCuda(const InputUpdateArguments& s, int device, cudaStream_t stream,
                            std::string* problem) {
  const Placed tensors[] = {{"dx", s.dx.data}, {"dz", s.dz.data}, {"stack", s.stack.data}};
  return OnDevice(tensors, device, problem, [&](int64_t) {
    const InputPlan plan = PlanInputUpdate(s);
    return Launch(s.dx.dtype == DType::kBFloat16 ? UpdateInputGradient<BFloat16>
                                                 : UpdateInputGradient<Float16>,
                  plan.num_blocks, kInputThreads, plan.shared_bytes, stream, plan.launch);
  });
}

}  // namespace citi
