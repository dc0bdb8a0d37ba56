#if defined(CITI_CUDA)
#include "cuda/routed_gemm.h"

#include "bindings/cuda_error.h"
#include "bindings/numbers.h"

namespace py = pybind11;

namespace citi {
namespace {

// num_tokens, num_experts, expert_rank, num_in, num_out
using RoutedShape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
// group_rows, keeps_right
using OrderNumbers = std::tuple<int64_t, bool>;

// Before sizes are multiplied.
RankShape AsRankShape(int64_t num_tokens, int64_t num_experts, int64_t expert_rank) {
  const RankShape shape{num_tokens, num_experts, expert_rank};
  const std::string problem = Invalid(shape);
  if (!problem.empty()) Refuse(problem);
  return shape;
}

GemmOrder AsOrder(const OrderNumbers& numbers) {
  const auto& [group_rows, keeps_right] = numbers;
  return {group_rows, keeps_right};
}

// A contiguous matrix that TMA reads.
Matrix AsRows(const Vector& vector, int64_t num_rows, int64_t num_columns) {
  return {vector.data, vector.size == num_rows * num_columns ? vector.num_bytes : 0, vector.dtype,
          num_columns, 1};
}

void Run(const RoutedGemm& routed, int32_t device, uintptr_t stream) {
  std::string problem = Invalid(routed);
  if (!problem.empty()) Refuse(problem);
  cudaError_t error;
  {
    const py::gil_scoped_release released;
    error = RoutedGemmCuda(routed, device, reinterpret_cast<cudaStream_t>(stream), &problem);
  }
  Check(error);
  if (!problem.empty()) Refuse(problem);
}

void RoutedLinear(const RoutedShape& shape, const MatrixNumbers& x, const MatrixNumbers& weight,
                  const std::optional<VectorNumbers>& bias, const MatrixNumbers& stack,
                  const MatrixNumbers& b, const MatrixNumbers& y, const VectorNumbers& h,
                  const VectorNumbers& u, const VectorNumbers& probs, const IndexNumbers& counts,
                  float scaling, const OrderNumbers& order, int32_t device, uintptr_t stream) {
  const auto& [num_tokens, num_experts, expert_rank, num_in, num_out] = shape;
  const RankShape ranks = AsRankShape(num_tokens, num_experts, expert_rank);
  RoutedGemm routed = RoutedLinearProblem(ranks, num_in, num_out);
  routed.gemm.left = AsMatrix("x", x);
  routed.gemm.right = AsMatrix("weight", weight);
  routed.gemm.bias = AsVector("bias", bias);
  routed.gemm.more_left = AsRows(AsVector("u", u), num_tokens, ranks.padded_ranks());
  routed.gemm.more_right = AsMatrix("b", b);
  routed.gemm.out = AsMatrix("y", y);
  routed.narrow = AsMatrix("stack", stack);
  routed.h = AsVector("h", h);
  routed.probs = AsVector("probs", probs);
  routed.counts = AsIndices(counts);
  routed.scaling = scaling;
  routed.gemm.order = AsOrder(order);
  Run(routed, device, stream);
}

void RoutedInputGradient(const RoutedShape& shape, const MatrixNumbers& dy,
                         const MatrixNumbers& weight, const MatrixNumbers& b,
                         const VectorNumbers& h, const VectorNumbers& probs,
                         const std::optional<VectorNumbers>& dgate, const MatrixNumbers& stack,
                         const MatrixNumbers& dx, const VectorNumbers& dz,
                         const IndexNumbers& counts, float scaling, const OrderNumbers& order,
                         bool fits_narrow, int32_t device, uintptr_t stream) {
  const auto& [num_tokens, num_experts, expert_rank, num_in, num_out] = shape;
  const RankShape ranks = AsRankShape(num_tokens, num_experts, expert_rank);
  RoutedGemm routed = RoutedInputGradientProblem(ranks, num_in, num_out);
  routed.gemm.left = AsMatrix("dy", dy);
  routed.gemm.right = AsMatrix("weight", weight);
  routed.gemm.more_left = AsRows(AsVector("dz", dz), num_tokens, ranks.num_rows());
  routed.gemm.more_right = AsMatrix("stack", stack);
  routed.gemm.out = AsMatrix("dx", dx);
  routed.narrow = AsMatrix("b", b);
  routed.h = AsVector("h", h);
  routed.probs = AsVector("probs", probs);
  routed.dgate = AsVector("dgate", dgate);
  routed.counts = AsIndices(counts);
  routed.scaling = scaling;
  routed.gemm.order = AsOrder(order);
  routed.fits_narrow = fits_narrow;
  Run(routed, device, stream);
}

}  // namespace

void BindRoutedGemm(py::module_& module) {
  module.def("routed_linear_cuda", RoutedLinear, py::kw_only(), Strictly("shape"), Strictly("x"),
             Strictly("weight"), Strictly("bias"), Strictly("stack"), Strictly("b"), Strictly("y"),
             Strictly("h"), Strictly("u"), Strictly("probs"), Strictly("counts"),
             Strictly("scaling"), Strictly("order"), Strictly("device"), Strictly("stream"));
  module.def("routed_input_gradient_cuda", RoutedInputGradient, py::kw_only(), Strictly("shape"),
             Strictly("dy"), Strictly("weight"), Strictly("b"), Strictly("h"), Strictly("probs"),
             Strictly("dgate"), Strictly("stack"), Strictly("dx"), Strictly("dz"),
             Strictly("counts"), Strictly("scaling"), Strictly("order"), Strictly("fits_narrow"),
             Strictly("device"), Strictly("stream"));
}

}  // namespace citi
#endif
