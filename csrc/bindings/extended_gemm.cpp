#if defined(CITI_CUDA)
#include "cuda/extended_gemm.h"

#include "bindings/cuda_error.h"
#include "bindings/numbers.h"

namespace py = pybind11;

namespace citi {
namespace {

// num_tokens, num_in, num_out, and how wide the extension is
using GemmShape = std::tuple<int64_t, int64_t, int64_t, int64_t>;

Matrix AsExtension(const char* name, const std::optional<MatrixNumbers>& numbers, int64_t width) {
  if (numbers.has_value() != (width != 0)) {
    Refuse(std::string(name) + (width != 0 ? ": must be given with an extension of " +
                                                 std::to_string(width) + " columns"
                                           : ": must be None without an extension"));
  }
  return numbers ? AsMatrix(name, *numbers) : Matrix{};
}

void Run(const ExtendedGemm& gemm, int32_t device, uintptr_t stream) {
  std::string problem = Invalid(gemm);
  if (!problem.empty()) Refuse(problem);
  cudaError_t error;
  {
    const py::gil_scoped_release released;
    error = CheckOnDevice(gemm, device, &problem);
    if (error == cudaSuccess && problem.empty()) {
      error = ExtendedGemmCuda(gemm, device, reinterpret_cast<cudaStream_t>(stream));
    }
  }
  Check(error);
  if (!problem.empty()) Refuse(problem);
}

void ExtendedLinear(const GemmShape& shape, const MatrixNumbers& x, const MatrixNumbers& weight,
                    const std::optional<VectorNumbers>& bias, const std::optional<MatrixNumbers>& u,
                    const std::optional<MatrixNumbers>& b, const MatrixNumbers& y, int32_t device,
                    uintptr_t stream) {
  const auto& [num_tokens, num_in, num_out, rank] = shape;
  ExtendedGemm gemm = LinearProblem(num_tokens, num_in, num_out, rank);
  gemm.left = AsMatrix("x", x);
  gemm.right = AsMatrix("weight", weight);
  gemm.bias = AsVector("bias", bias);
  gemm.more_left = AsExtension("u", u, rank);
  gemm.more_right = AsExtension("b", b, rank);
  gemm.out = AsMatrix("y", y);
  Run(gemm, device, stream);
}

void ExtendedInputGradient(const GemmShape& shape, const MatrixNumbers& dy,
                           const MatrixNumbers& weight, const std::optional<MatrixNumbers>& dz,
                           const std::optional<MatrixNumbers>& stack, const MatrixNumbers& dx,
                           int32_t device, uintptr_t stream) {
  const auto& [num_tokens, num_in, num_out, width] = shape;
  ExtendedGemm gemm = InputGradientProblem(num_tokens, num_in, num_out, width);
  gemm.left = AsMatrix("dy", dy);
  gemm.right = AsMatrix("weight", weight);
  gemm.more_left = AsExtension("dz", dz, width);
  gemm.more_right = AsExtension("stack", stack, width);
  gemm.out = AsMatrix("dx", dx);
  Run(gemm, device, stream);
}

}  // namespace

void BindExtendedGemm(py::module_& module) {
  module.def("extended_linear_cuda", ExtendedLinear, py::kw_only(), Strictly("shape"),
             Strictly("x"), Strictly("weight"), Strictly("bias"), Strictly("u"), Strictly("b"),
             Strictly("y"), Strictly("device"), Strictly("stream"));
  module.def("extended_input_gradient_cuda", ExtendedInputGradient, py::kw_only(),
             Strictly("shape"), Strictly("dy"), Strictly("weight"), Strictly("dz"),
             Strictly("stack"), Strictly("dx"), Strictly("device"), Strictly("stream"));
}

}  // namespace citi
#endif
