#include "bindings/numbers.h"
#include "parameter_scores_arguments.h"
#if defined(CITI_CUDA)
#include "bindings/cuda_error.h"
#include "cuda/parameter_scores.h"
#endif

namespace py = pybind11;

namespace citi {

#if defined(CITI_CUDA)
namespace {

using Sizes = std::tuple<int64_t, int64_t, int64_t>;  // T, N, K
using Segments = std::tuple<int64_t, int64_t>;        // P, Q

ParameterScores OfSizes(const Sizes& shape, const Segments& scores_shape) {
  ParameterScores problem{};
  std::tie(problem.num_tokens, problem.num_out, problem.num_in) = shape;
  std::tie(problem.num_row_segments, problem.num_column_segments) = scores_shape;
  const std::string wrong = InvalidSizes(problem);
  if (!wrong.empty()) Refuse(wrong);
  return problem;
}

int64_t CheckedParts(const Sizes& shape, const Segments& scores_shape) {
  return ParameterScoresCudaParts(OfSizes(shape, scores_shape));
}

void AccumulateOnCuda(const Sizes& shape, const Segments& scores_shape, const VectorNumbers& scores,
                      const MatrixNumbers& weight, const MatrixNumbers& x, const MatrixNumbers& g,
                      const std::optional<VectorNumbers>& valid, bool is_per_token, double scale,
                      uint64_t seed, const std::optional<VectorNumbers>& parts, int32_t device,
                      uintptr_t stream) {
  ParameterScores problem = OfSizes(shape, scores_shape);
  problem.scores = AsVector("scores", scores);
  problem.weight = AsMatrix("weight", weight);
  problem.x = AsMatrix("x", x);
  problem.g = AsMatrix("g", g);
  problem.valid = AsVector("valid", valid);
  problem.is_per_token = is_per_token;
  problem.scale = static_cast<float>(scale);
  problem.seed = seed;
  problem.parts = AsVector("parts", parts);
  std::string wrong = Invalid(problem, ParameterScoresCudaParts(problem));
  if (!wrong.empty()) Refuse(wrong);
  cudaError_t error;
  {
    const py::gil_scoped_release released;
    error = CheckOnDevice(problem, device, &wrong);
    if (error == cudaSuccess && wrong.empty()) {
      error =
          AccumulateParameterScoresCuda(problem, device, reinterpret_cast<cudaStream_t>(stream));
    }
  }
  Check(error);
  if (!wrong.empty()) Refuse(wrong);
}

}  // namespace
#endif

void BindParameterScores([[maybe_unused]] py::module_& module) {
#if defined(CITI_CUDA)
  module.def("parameter_scores_cuda_parts", CheckedParts, Strictly("shape"),
             Strictly("scores_shape"));
  module.def("accumulate_parameter_scores_cuda", AccumulateOnCuda, py::kw_only(), Strictly("shape"),
             Strictly("scores_shape"), Strictly("scores"), Strictly("weight"), Strictly("x"),
             Strictly("g"), Strictly("valid"), Strictly("is_per_token"), Strictly("scale"),
             Strictly("seed"), Strictly("parts"), Strictly("device"), Strictly("stream"));
#endif
}

}  // namespace citi
