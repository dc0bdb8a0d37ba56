#if defined(CITI_CUDA)
// Grouped products of top-k routing: CUDA alone.
#include "cuda/grouped.h"

#include "bindings/cuda_error.h"
#include "bindings/numbers.h"
#include "grouped_arguments.h"

namespace py = pybind11;

namespace citi {
namespace {

// data, num_bytes, size
using IndexNumbers = std::tuple<uintptr_t, int64_t, int64_t>;
// num_tokens, num_experts, top_k
using RoutingShape = std::tuple<int64_t, int64_t, int64_t>;

Indices AsIndices(const IndexNumbers& numbers) {
  const auto& [data, num_bytes, size] = numbers;
  return {reinterpret_cast<const int32_t*>(data), num_bytes, size};
}

Routing AsRouting(const RoutingShape& shape, const IndexNumbers& order,
                  const IndexNumbers& offsets) {
  const auto& [num_tokens, num_experts, top_k] = shape;
  return {num_tokens, num_experts, top_k, AsIndices(order), AsIndices(offsets)};
}

Matrix AsOptional(const char* name, const std::optional<MatrixNumbers>& numbers) {
  if (!numbers) return {nullptr, 0, DType::kFloat32, 0, 0};
  const Matrix matrix = AsMatrix(name, *numbers);
  if (matrix.data == nullptr) Refuse(std::string(name) + ": data must not be null");
  return matrix;
}

int64_t CheckedColumnTiles(int64_t num_columns) {
  if (num_columns < 1 || num_columns > INT32_MAX) {
    Refuse("num_columns: must be in [1, 2^31), got " + std::to_string(num_columns));
  }
  return GroupedColumnTiles(num_columns);
}

// Checks where a valid problem lies, and runs it.
template <class Problem>
void RunOnDevice(const Problem& grouped, int32_t device, uintptr_t stream,
                 cudaError_t (*run)(const Problem&, int, cudaStream_t)) {
  std::string problem;
  cudaError_t error;
  {
    const py::gil_scoped_release released;
    error = CheckOnDevice(grouped, device, &problem);
    if (error == cudaSuccess && problem.empty()) {
      error = run(grouped, device, reinterpret_cast<cudaStream_t>(stream));
    }
  }
  Check(error);
  if (!problem.empty()) Refuse(problem);
}

void ProductOnCuda(const RoutingShape& routing, const std::tuple<int64_t, int64_t>& choices,
                   const std::tuple<int64_t, int64_t>& features, const IndexNumbers& order,
                   const IndexNumbers& offsets, const MatrixNumbers& rows, bool rows_are_slots,
                   const MatrixNumbers& weight, bool weight_is_out_in, bool experts_in_rows,
                   const MatrixNumbers& out, bool out_is_slots, bool adds,
                   const std::optional<MatrixNumbers>& gates, double scaling,
                   const std::optional<MatrixNumbers>& factors,
                   const std::optional<VectorNumbers>& dots, int32_t device, uintptr_t stream) {
  const auto& [first_choice, end_choice] = choices;
  const auto& [num_in, num_out] = features;
  const GroupedProduct product{AsRouting(routing, order, offsets),
                               first_choice,
                               end_choice,
                               num_in,
                               num_out,
                               {AsMatrix("rows", rows), rows_are_slots},
                               AsMatrix("weight", weight),
                               weight_is_out_in,
                               experts_in_rows,
                               {AsMatrix("out", out), out_is_slots},
                               adds,
                               AsOptional("gates", gates),
                               static_cast<float>(scaling),
                               AsOptional("factors", factors),
                               AsVector("dots", dots)};
  const std::string problem = Invalid(product, num_out < 1 ? 1 : CheckedColumnTiles(num_out));
  if (!problem.empty()) Refuse(problem);
  RunOnDevice(product, device, stream, RunGroupedProduct);
}

void GradientOnCuda(const RoutingShape& routing, const std::tuple<int64_t, int64_t>& features,
                    const IndexNumbers& order, const IndexNumbers& offsets,
                    const MatrixNumbers& left, bool left_is_slots, const MatrixNumbers& right,
                    bool right_is_slots, const MatrixNumbers& out, bool experts_in_rows,
                    int32_t device, uintptr_t stream) {
  const auto& [num_rows, num_columns] = features;
  const GroupedGradient gradient{AsRouting(routing, order, offsets),
                                 num_rows,
                                 num_columns,
                                 {AsMatrix("left", left), left_is_slots},
                                 {AsMatrix("right", right), right_is_slots},
                                 AsMatrix("out", out),
                                 experts_in_rows};
  const std::string problem = Invalid(gradient);
  if (!problem.empty()) Refuse(problem);
  RunOnDevice(gradient, device, stream, RunGroupedGradient);
}

}  // namespace

void BindGrouped(py::module_& module) {
  module.def("grouped_column_tiles", CheckedColumnTiles, Strictly("num_columns"));
  module.def("grouped_product_cuda", ProductOnCuda, py::kw_only(), Strictly("routing"),
             Strictly("choices"), Strictly("features"), Strictly("order"), Strictly("offsets"),
             Strictly("rows"), Strictly("rows_are_slots"), Strictly("weight"),
             Strictly("weight_is_out_in"), Strictly("experts_in_rows"), Strictly("out"),
             Strictly("out_is_slots"), Strictly("adds"), Strictly("gates"), Strictly("scaling"),
             Strictly("factors"), Strictly("dots"), Strictly("device"), Strictly("stream"));
  module.def("grouped_gradient_cuda", GradientOnCuda, py::kw_only(), Strictly("routing"),
             Strictly("features"), Strictly("order"), Strictly("offsets"), Strictly("left"),
             Strictly("left_is_slots"), Strictly("right"), Strictly("right_is_slots"),
             Strictly("out"), Strictly("experts_in_rows"), Strictly("device"), Strictly("stream"));
}

}  // namespace citi
#endif
