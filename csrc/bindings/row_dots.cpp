#include "cpu/row_dots.h"

#include "bindings/numbers.h"
#include "row_dots_arguments.h"
#if defined(CITI_CUDA)
#include "bindings/cuda_error.h"
#include "cuda/row_dots.h"
#endif

namespace py = pybind11;

namespace citi {
namespace {

RowDots AsRowDots(const std::tuple<int64_t, int64_t>& shape, const VectorNumbers& scores,
                  const MatrixNumbers& a, const MatrixNumbers& b,
                  const std::optional<VectorNumbers>& valid,
                  const std::optional<VectorNumbers>& offset, bool is_signed,
                  const VectorNumbers& parts) {
  const auto& [num_tokens, num_features] = shape;
  return {num_tokens,
          num_features,
          AsVector("scores", scores),
          AsMatrix("a", a),
          AsMatrix("b", b),
          AsVector("valid", valid),
          AsVector("offset", offset),
          is_signed,
          AsVector("parts", parts)};
}

// RowDotsParts divides by these.
void CheckSizes(int64_t num_tokens, int64_t num_features, int64_t num_segments) {
  if (num_tokens < 1 || num_features < 1 || num_segments < 1 || num_segments > num_features ||
      num_features > INT64_MAX / 64) {
    Refuse("shape: sizes must be positive and segments no more than features, got " +
           std::to_string(num_tokens) + ", " + std::to_string(num_features) + ", " +
           std::to_string(num_segments));
  }
}

int64_t CheckedRowDotsParts(int64_t num_tokens, int64_t num_features, int64_t num_segments) {
  CheckSizes(num_tokens, num_features, num_segments);
  return RowDotsParts(num_tokens, num_features, num_segments);
}

void AccumulateRowDotsOnCpu(const std::tuple<int64_t, int64_t>& shape, const VectorNumbers& scores,
                            const MatrixNumbers& a, const MatrixNumbers& b,
                            const std::optional<VectorNumbers>& valid,
                            const std::optional<VectorNumbers>& offset, bool is_signed,
                            const VectorNumbers& parts, int64_t num_threads) {
  const RowDots dots = AsRowDots(shape, scores, a, b, valid, offset, is_signed, parts);
  const std::string problem =
      Invalid(dots, CheckedRowDotsParts(dots.num_tokens, dots.num_features, dots.num_segments()));
  if (!problem.empty()) Refuse(problem);
  CheckThreads(num_threads);
  const py::gil_scoped_release released;
  AccumulateRowDots(dots, VariantInUse(), num_threads);
}

#if defined(CITI_CUDA)
int64_t CheckedRowDotsCudaParts(int64_t num_tokens, int64_t num_features, int64_t num_segments) {
  CheckSizes(num_tokens, num_features, num_segments);
  return RowDotsCudaParts(num_tokens, num_features, num_segments);
}

void AccumulateRowDotsOnCuda(const std::tuple<int64_t, int64_t>& shape, const VectorNumbers& scores,
                             const MatrixNumbers& a, const MatrixNumbers& b,
                             const std::optional<VectorNumbers>& valid,
                             const std::optional<VectorNumbers>& offset, bool is_signed,
                             const VectorNumbers& parts, int32_t device, uintptr_t stream) {
  const RowDots dots = AsRowDots(shape, scores, a, b, valid, offset, is_signed, parts);
  std::string problem = Invalid(
      dots, CheckedRowDotsCudaParts(dots.num_tokens, dots.num_features, dots.num_segments()));
  if (problem.empty() && dots.is_double()) problem = "a: dtype must be fp32, bf16 or fp16";
  if (!problem.empty()) Refuse(problem);
  cudaError_t error;
  {
    const py::gil_scoped_release released;
    error = CheckOnDevice(dots, device, &problem);
    if (error == cudaSuccess && problem.empty()) {
      error = AccumulateRowDotsCuda(dots, device, reinterpret_cast<cudaStream_t>(stream));
    }
  }
  Check(error);
  if (!problem.empty()) Refuse(problem);
}
#endif

}  // namespace

void BindRowDots(py::module_& module) {
  module.def("row_dots_parts", CheckedRowDotsParts, Strictly("num_tokens"),
             Strictly("num_features"), Strictly("num_segments"));
  module.def("accumulate_row_dots", AccumulateRowDotsOnCpu, py::kw_only(), Strictly("shape"),
             Strictly("scores"), Strictly("a"), Strictly("b"), Strictly("valid"),
             Strictly("offset"), Strictly("is_signed"), Strictly("parts"), Strictly("num_threads"));
#if defined(CITI_CUDA)
  module.def("row_dots_cuda_parts", CheckedRowDotsCudaParts, Strictly("num_tokens"),
             Strictly("num_features"), Strictly("num_segments"));
  module.def("accumulate_row_dots_cuda", AccumulateRowDotsOnCuda, py::kw_only(), Strictly("shape"),
             Strictly("scores"), Strictly("a"), Strictly("b"), Strictly("valid"),
             Strictly("offset"), Strictly("is_signed"), Strictly("parts"), Strictly("device"),
             Strictly("stream"));
#endif
}

}  // namespace citi
