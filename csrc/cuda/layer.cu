#include "cuda/layer.h"

#include "cuda/extended_gemm.h"
#include "cuda/launch.h"
#include "cuda/layer_plan.h"
#include "cuda/routed_gemm.h"
#include "cuda/skinny.h"

namespace citi {
namespace {

// Marks a place in a stream.
class Event {
 public:
  Event() { error_ = cudaEventCreateWithFlags(&event_, cudaEventDisableTiming); }
  ~Event() {
    // What waits for it goes on waiting.
    if (error_ == cudaSuccess) cudaEventDestroy(event_);
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  cudaError_t Record(cudaStream_t stream) const {
    return error_ == cudaSuccess ? cudaEventRecord(event_, stream) : error_;
  }
  cudaError_t Hold(cudaStream_t stream) const { return cudaStreamWaitEvent(stream, event_, 0); }

 private:
  cudaEvent_t event_;
  cudaError_t error_;
};

struct LaunchPass {
  int device;
  cudaStream_t stream;
  std::string* problem;

  cudaError_t operator()(const PackArguments& pass) const { return Go(PackRowsCuda, pass); }
  cudaError_t operator()(const ShrinkArguments& pass) const { return Go(ShrinkCuda, pass); }
  cudaError_t operator()(const RowProductArguments& pass) const { return Go(RowProductCuda, pass); }
  cudaError_t operator()(const ScaleArguments& pass) const { return Go(ScaleRanksCuda, pass); }
  cudaError_t operator()(const FactorArguments& pass) const {
    return Go(FactorGradientsCuda, pass);
  }
  cudaError_t operator()(const RankArguments& pass) const { return Go(RankGradientsCuda, pass); }
  cudaError_t operator()(const SumArguments& pass) const { return Go(SumSharesCuda, pass); }
  cudaError_t operator()(const RoutedGemm& pass) const { return Go(RoutedGemmCuda, pass); }
  cudaError_t operator()(const ExtendedGemm& pass) const {
    const cudaError_t error = CheckOnDevice(pass, device, problem);
    if (error != cudaSuccess || !problem->empty()) return error;
    return ExtendedGemmCuda(pass, device, stream);
  }

 private:
  template <class Arguments>
  cudaError_t Go(cudaError_t (*pass)(const Arguments&, int, cudaStream_t, std::string*),
                 const Arguments& arguments) const {
    return pass(arguments, device, stream, problem);
  }
};

// Up to the first that fails.
cudaError_t LaunchAll(const std::vector<Pass>& passes, const LaunchPass& launch) {
  for (const Pass& pass : passes) {
    const cudaError_t error = std::visit(launch, pass);
    if (error != cudaSuccess || !launch.problem->empty()) return error;
  }
  return cudaSuccess;
}

// The product, and the passes beside it.
cudaError_t LaunchBeside(const LayerPlan& plan, const LaunchPass& launch, cudaStream_t side) {
  const CurrentDevice current(launch.device);
  if (current.error() != cudaSuccess) return current.error();
  const Event fork, join;
  cudaError_t error = fork.Record(launch.stream);
  if (error == cudaSuccess) error = std::visit(launch, plan.product);
  if (error != cudaSuccess || !launch.problem->empty()) return error;
  error = fork.Hold(side);
  if (error != cudaSuccess) return error;
  error = LaunchAll(plan.beside, {launch.device, side, launch.problem});
  // What was launched must end before its memory is given back.
  cudaError_t joined = join.Record(side);
  if (joined == cudaSuccess) joined = join.Hold(launch.stream);
  return error != cudaSuccess ? error : joined;
}

template <class Layer>
cudaError_t Go(const Layer& layer, const Vector& workspace, cudaStream_t side,
               const LaunchPass& launch) {
  *launch.problem = Invalid(layer);
  if (!launch.problem->empty()) return cudaSuccess;
  *launch.problem = InvalidWorkspace(workspace, LayerWorkspaceBytes(layer));
  if (!launch.problem->empty()) return cudaSuccess;
  const LayerPlan plan = PlanLayer(layer, workspace.data);
  *launch.problem = Invalid(plan);
  if (!launch.problem->empty()) return cudaSuccess;
  *launch.problem = InvalidOverlap(
      layer, {workspace.data, workspace.num_bytes, workspace.dtype, plan.workspace_bytes});
  if (!launch.problem->empty()) return cudaSuccess;
  cudaError_t error = LaunchAll(plan.first, launch);
  if (error != cudaSuccess || !launch.problem->empty()) return error;
  error = plan.beside.empty() ? std::visit(launch, plan.product) : LaunchBeside(plan, launch, side);
  if (error != cudaSuccess || !launch.problem->empty()) return error;
  return LaunchAll(plan.last, launch);
}

}  // namespace

int64_t LayerWorkspaceBytes(const LayerForward& layer) {
  return PlanLayer(layer, nullptr).workspace_bytes;
}

int64_t LayerWorkspaceBytes(const LayerBackward& layer) {
  return PlanLayer(layer, nullptr).workspace_bytes;
}

cudaError_t LayerCuda(const LayerForward& layer, const Vector& workspace, int device,
                      cudaStream_t stream, std::string* problem) {
  return Go(layer, workspace, nullptr, {device, stream, problem});
}

cudaError_t LayerCuda(const LayerBackward& layer, const Vector& workspace, int device,
                      cudaStream_t stream, cudaStream_t side, std::string* problem) {
  return Go(layer, workspace, side, {device, stream, problem});
}

}  // namespace citi
