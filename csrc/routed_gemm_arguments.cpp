#include "routed_gemm_arguments.h"
#include "whole_numbers.h"

#include <utility>

namespace citi {
namespace {

RoutedGemm Problem(const RankShape& shape, const ExtendedGemm& gemm) {
  RoutedGemm routed{};
  routed.shape = shape;
  routed.gemm = gemm;
  return routed;
}

std::string InvalidRankSpace(const std::string& name, const Vector& vector, DType dtype,
                             int64_t num_tokens, int64_t num_columns) {
  if (vector.data == nullptr) return name + ": data must not be null";
  if (vector.dtype != dtype) {
    return name + (dtype == DType::kFloat32 ? ": dtype must be fp32"
                                            : ": dtype must be that of the other operands");
  }
  if (reinterpret_cast<uintptr_t>(vector.data) % kTmaAlignment != 0) {
    return name + ": data must be aligned to 16 bytes";
  }
  return InvalidVector(name, vector, num_tokens * num_columns);
}

std::string InvalidNarrow(const std::string& name, const Matrix& matrix, DType dtype,
                          int64_t num_rows, int64_t num_columns) {
  if (matrix.dtype != dtype) return name + ": dtype must be that of the other operands";
  if (matrix.column_stride != 1) return name + ": columns must be contiguous";
  if (num_rows > 1 &&
      (matrix.row_stride < num_columns || matrix.row_stride > kMaxElements / num_rows ||
       matrix.row_stride * SizeOf(dtype) % kTmaAlignment != 0)) {
    return name + ": rows must not overlap and be a multiple of 16 bytes apart, got a stride of " +
           std::to_string(matrix.row_stride) + " elements";
  }
  if (reinterpret_cast<uintptr_t>(matrix.data) % kTmaAlignment != 0) {
    return name + ": data must be aligned to 16 bytes";
  }
  return InvalidMatrix(name, matrix, num_rows, num_columns);
}

std::string InvalidCounts(const Indices& counts, int64_t size) {
  if (counts.data == nullptr) return "counts: data must not be null";
  if (reinterpret_cast<uintptr_t>(counts.data) % sizeof(int32_t) != 0) {
    return "counts: data must be aligned to its dtype";
  }
  if (counts.size != size || size * int64_t{sizeof(int32_t)} > counts.num_bytes) {
    return "counts: must have " + std::to_string(size) + " entries within its storage, got " +
           std::to_string(counts.size);
  }
  return "";
}

// As many as the kernel writes: with those that pad it, which the GEMM does not read.
int64_t ColumnsOfMoreLeft(const RoutedGemm& routed) {
  return routed.gemm.is_input_gradient ? routed.shape.num_rows() : routed.shape.padded_ranks();
}

std::string InvalidMoreLeft(const RoutedGemm& routed) {
  const std::string name = NamesOf(routed.gemm).more_left;
  const int64_t num_columns = ColumnsOfMoreLeft(routed);
  if (routed.gemm.more_left.row_stride != num_columns) return name + ": must be contiguous";
  return InvalidMatrix(name, routed.gemm.more_left, routed.shape.num_tokens, num_columns);
}

// What the kernel writes overlaps nothing else. In an input gradient h and probs are read, but dx
// must not lie over them.
std::string Overlapping(const RoutedGemm& routed) {
  const ExtendedGemm& gemm = routed.gemm;
  const bool is_gradient = gemm.is_input_gradient;
  const Vector narrow = is_gradient ? ExtentOf(routed.narrow, gemm.depth, routed.shape.num_ranks())
                                    : ExtentOf(routed.narrow, routed.shape.num_rows(), gemm.depth);
  std::vector<Named> tensors = TensorsOf(gemm);
  const Vector more_left = ExtentOf(gemm.more_left, gemm.num_rows, ColumnsOfMoreLeft(routed));
  tensors.insert(tensors.begin(), {{NamesOf(gemm).more_left, more_left},
                                   {"counts", ExtentOf(routed.counts)},
                                   {"h", routed.h},
                                   {"probs", routed.probs}});
  tensors.push_back({is_gradient ? "b" : "stack", narrow});
  tensors.push_back({"dgate", routed.dgate});
  return InvalidOverlap(tensors, 5);
}

}  // namespace

RoutedGemm RoutedLinearProblem(const RankShape& shape, int64_t num_in, int64_t num_out) {
  return Problem(shape, LinearProblem(shape.num_tokens, num_in, num_out, shape.num_ranks()));
}

RoutedGemm RoutedInputGradientProblem(const RankShape& shape, int64_t num_in, int64_t num_out) {
  return Problem(shape, InputGradientProblem(shape.num_tokens, num_in, num_out, shape.num_rows()));
}

int64_t NumCounts(const RoutedGemm& routed) {
  return CeilDiv(routed.shape.num_tokens, kRowsOfCount);
}

std::string Invalid(const RoutedGemm& routed) {
  const RankShape& shape = routed.shape;
  std::string problem = Invalid(shape);
  if (!problem.empty()) return problem;
  if (shape.num_rows() > kMaxRoutedRows) {
    return "shape: ranks and gates, each rounded up to 8, must be at most " +
           std::to_string(kMaxRoutedRows) + " together, got " + std::to_string(shape.num_rows());
  }
  problem = Invalid(routed.gemm);
  if (!problem.empty()) return problem;
  const bool is_gradient = routed.gemm.is_input_gradient;
  const DType dtype = routed.gemm.left.dtype;
  const int64_t num_tokens = shape.num_tokens, depth = routed.gemm.depth;
  const auto check = [&](std::string found) {
    if (problem.empty()) problem = std::move(found);
  };
  check(InvalidMoreLeft(routed));
  check(is_gradient ? InvalidNarrow("b", routed.narrow, dtype, depth, shape.num_ranks())
                    : InvalidNarrow("stack", routed.narrow, dtype, shape.num_rows(), depth));
  check(InvalidRankSpace("h", routed.h, dtype, num_tokens, shape.num_ranks()));
  check(InvalidRankSpace("probs", routed.probs, DType::kFloat32, num_tokens, shape.num_gates()));
  if (routed.dgate.data != nullptr) {
    check(InvalidRankSpace("dgate", routed.dgate, DType::kFloat32, num_tokens, shape.num_gates()));
  }
  check(InvalidCounts(routed.counts, NumCounts(routed)));
  if (problem.empty()) check(Overlapping(routed));
  return problem;
}

}  // namespace citi
