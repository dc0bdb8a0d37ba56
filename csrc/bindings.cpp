// The module citi_kernels._C: Python numbers in, kernels of namespace citi behind.
//
// Tensors come as tuples of their address, the bytes from there to the end of their storage, their
// dtype as in DTYPES, and size or strides in elements. Whatever can be checked of them is, before
// an address is used: wrong numbers raise ValueError, wrong types TypeError.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/cpu_features.h"
#include "cpu/row_dots.h"
#include "row_dots_arguments.h"
#if defined(CITI_CUDA)
#include "cuda/row_dots.h"
#endif

namespace py = pybind11;

namespace citi {
namespace {

// data, num_bytes, dtype, stride_t, stride_f
using MatrixNumbers = std::tuple<uintptr_t, int64_t, int32_t, int64_t, int64_t>;
// data, num_bytes, dtype, size
using VectorNumbers = std::tuple<uintptr_t, int64_t, int32_t, int64_t>;

constexpr int64_t kMaxThreads = 4096;

std::atomic<Variant> variant_in_use{RunnableVariants().front()};

[[noreturn]] void Refuse(const std::string& problem) { throw py::value_error(problem); }

DType AsDType(const char* name, int32_t code) {
  const DType dtype = static_cast<DType>(code);
  if (!IsKnown(dtype)) {
    Refuse(std::string(name) + ": dtype must be one of DTYPES, got " + std::to_string(code));
  }
  return dtype;
}

Matrix AsMatrix(const char* name, const MatrixNumbers& numbers) {
  const auto& [data, num_bytes, dtype, stride_t, stride_f] = numbers;
  return {reinterpret_cast<const void*>(data), num_bytes, AsDType(name, dtype), stride_t, stride_f};
}

Vector AsVector(const char* name, const VectorNumbers& numbers) {
  const auto& [data, num_bytes, dtype, size] = numbers;
  return {reinterpret_cast<void*>(data), num_bytes, AsDType(name, dtype), size};
}

Vector AsVector(const char* name, const std::optional<VectorNumbers>& numbers) {
  if (!numbers) return {nullptr, 0, DType::kBool, 0};
  const Vector vector = AsVector(name, *numbers);
  if (vector.data == nullptr) Refuse(std::string(name) + ": data must not be null");
  return vector;
}

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
  if (num_threads < 1 || num_threads > kMaxThreads) {
    Refuse("num_threads: must be in [1, 4096], got " + std::to_string(num_threads));
  }
  const py::gil_scoped_release released;
  AccumulateRowDots(dots, variant_in_use.load(), num_threads);
}

py::tuple NamesOfRunnableVariants() {
  py::list names;
  for (const Variant variant : RunnableVariants()) names.append(NameOf(variant));
  return py::tuple(names);
}

std::string UseCpuVariant(const std::string& name) {
  std::string known;
  for (const Variant variant : RunnableVariants()) {
    if (name.empty() || name == NameOf(variant)) {
      variant_in_use = variant;
      return NameOf(variant);
    }
    known += known.empty() ? NameOf(variant) : std::string(", ") + NameOf(variant);
  }
  Refuse("want one of " + known + "; got '" + name + "'");
}

#if defined(CITI_CUDA)
void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("citi_kernels._C could not launch on CUDA: ") +
                           cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

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

py::dict BuiltWith() {
  py::dict built;
  built["compiler"] = CITI_COMPILER;
  built["flags"] = CITI_FLAGS;
  built["openmp"] = CITI_OPENMP_VERSION;
  built["cuda"] = CITI_CUDA_VERSION;
  built["cuda_archs"] = CITI_CUDA_ARCHS;
  return built;
}

}  // namespace
}  // namespace citi

PYBIND11_MODULE(_C, module) {
  using namespace pybind11::literals;  // NOLINT: names of arguments
  const auto strictly = [](const char* name) { return py::arg(name).noconvert(); };

  module.attr("version") = CITI_VERSION;
  module.attr("built_with") = citi::BuiltWith();
  module.attr("cpu_features") = citi::NamesOfRunnableVariants();
  module.attr("DTYPES") = py::dict("float32"_a = static_cast<int>(citi::DType::kFloat32),
                                   "bfloat16"_a = static_cast<int>(citi::DType::kBFloat16),
                                   "float16"_a = static_cast<int>(citi::DType::kFloat16),
                                   "float64"_a = static_cast<int>(citi::DType::kFloat64),
                                   "bool"_a = static_cast<int>(citi::DType::kBool));
  module.def("use_cpu_variant", citi::UseCpuVariant, strictly("name"));
  module.def("row_dots_parts", citi::CheckedRowDotsParts, strictly("num_tokens"),
             strictly("num_features"), strictly("num_segments"));
  module.def("accumulate_row_dots", citi::AccumulateRowDotsOnCpu, py::kw_only(), strictly("shape"),
             strictly("scores"), strictly("a"), strictly("b"), strictly("valid"),
             strictly("offset"), strictly("is_signed"), strictly("parts"), strictly("num_threads"));
#if defined(CITI_CUDA)
  module.def("row_dots_cuda_parts", citi::CheckedRowDotsCudaParts, strictly("num_tokens"),
             strictly("num_features"), strictly("num_segments"));
  module.def("accumulate_row_dots_cuda", citi::AccumulateRowDotsOnCuda, py::kw_only(),
             strictly("shape"), strictly("scores"), strictly("a"), strictly("b"), strictly("valid"),
             strictly("offset"), strictly("is_signed"), strictly("parts"), strictly("device"),
             strictly("stream"));
#endif
}
