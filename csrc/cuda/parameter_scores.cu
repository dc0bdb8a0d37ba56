#include "cuda/launch.h"
#include "cuda/parameter_scores.h"
#include "cuda/parameter_scores_plan.h"

namespace citi {
namespace {

template <class Element, class Tile>
cudaError_t LaunchTiles(const ParameterScoresPlan& plan, cudaStream_t stream) {
  return Launch(plan.is_aligned ? ScoresOfTile<Element, Tile, AlignedRows<Element>>
                                : ScoresOfTile<Element, Tile, AnyRows<Element>>,
                plan.tiles.count(), Tile::kThreads, kSharedBytes<Element, Tile>, stream,
                plan.launch);
}

template <class Element>
cudaError_t LaunchTiles(const ParameterScoresPlan& plan, cudaStream_t stream) {
  return plan.tiles.is_large ? LaunchTiles<Element, LargeTile>(plan, stream)
                             : LaunchTiles<Element, SmallTile>(plan, stream);
}

cudaError_t LaunchTiles(const ParameterScoresPlan& plan, cudaStream_t stream) {
  switch (plan.launch.g.dtype) {
    case DType::kFloat32:
      return LaunchTiles<float>(plan, stream);
    case DType::kBFloat16:
      return LaunchTiles<BFloat16>(plan, stream);
    case DType::kFloat16:
      return LaunchTiles<Float16>(plan, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class Value>
cudaError_t LaunchSums(const ParameterScoresPlan& plan, cudaStream_t stream) {
  const int64_t num_blocks = (plan.num_scores - 1) / plan.scores_of_block + 1;
  return Launch<const float*, Value*, int64_t, int64_t, int64_t, int>(
      AddScoreSums<Value>, num_blocks, kSumThreads, 0, stream, plan.launch.parts,
      static_cast<Value*>(plan.launch.scores), plan.num_summands, plan.num_scores, plan.length,
      plan.scores_of_block);
}

}  // namespace

int64_t ParameterScoresCudaParts(const ParameterScores& problem) {
  return PlanTiles(problem).NumParts(problem);
}

cudaError_t CheckOnDevice(const ParameterScores& problem, int device, std::string* wrong) {
  const Placed tensors[] = {{"scores", problem.scores.data}, {"weight", problem.weight.data},
                            {"x", problem.x.data},           {"g", problem.g.data},
                            {"valid", problem.valid.data},   {"parts", problem.parts.data}};
  return CheckOnDevice(tensors, device, wrong);
}

cudaError_t AccumulateParameterScoresCuda(const ParameterScores& problem, int device,
                                          cudaStream_t stream) {
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  const ParameterScoresPlan plan = PlanParameterScores(problem, PlanTiles(problem));
  const cudaError_t error = LaunchTiles(plan, stream);
  if (error != cudaSuccess || problem.granularity() == Granularity::kElements) return error;
  return problem.scores.dtype == DType::kFloat64 ? LaunchSums<double>(plan, stream)
                                                 : LaunchSums<float>(plan, stream);
}

}  // namespace citi
