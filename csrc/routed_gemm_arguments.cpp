#include "routed_gemm_arguments.h"
#include "whole_numbers.h"

#include <utility>
#include <vector>

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

Vector BytesOf(const Matrix& matrix, int64_t num_rows, int64_t num_columns) {
  const int64_t size = (num_rows - 1) * matrix.row_stride + num_columns;
  return {const_cast<void*>(matrix.data), 0, matrix.dtype, size};
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

// What the kernel writes overlaps nothing else. `out` and the operands of the GEMM are known not
// to overlap.
std::string InvalidOverlap(const RoutedGemm& routed) {
  const ExtendedGemm& gemm = routed.gemm;
  const ExtendedGemmNames names = NamesOf(gemm);
  const bool is_gradient = gemm.is_input_gradient;
  const auto right = [&](const Matrix& matrix, int64_t depth) {
    return is_gradient ? BytesOf(matrix, depth, gemm.num_columns)
                       : BytesOf(matrix, gemm.num_columns, depth);
  };
  const int64_t num_ranks = routed.shape.num_ranks();
  const Vector narrow = is_gradient ? BytesOf(routed.narrow, gemm.depth, num_ranks)
                                    : BytesOf(routed.narrow, routed.shape.num_rows(), gemm.depth);
  // counts are of 4 bytes, as fp32 is
  const Vector counts{const_cast<int32_t*>(routed.counts.data), routed.counts.num_bytes,
                      DType::kFloat32, routed.counts.size};
  std::vector<std::pair<const char*, Vector>> tensors = {
      {names.more_left, BytesOf(gemm.more_left, gemm.num_rows, ColumnsOfMoreLeft(routed))},
      {"counts", counts},
      {"h", routed.h},
      {"probs", routed.probs},
      {names.out, BytesOf(gemm.out, gemm.num_rows, gemm.num_columns)},
      {names.left, BytesOf(gemm.left, gemm.num_rows, gemm.depth)},
      {names.right, right(gemm.right, gemm.depth)},
      {names.more_right, right(gemm.more_right, gemm.more)},
      {is_gradient ? "b" : "stack", narrow},
      {"bias", gemm.bias},
      {"dgate", routed.dgate}};
  // In an input gradient h and probs are read, but dx must not lie over them.
  constexpr size_t kNumWritten = 5;
  for (size_t i = 0; i < kNumWritten; ++i) {
    for (size_t j = i + 1; j < tensors.size(); ++j) {
      if (tensors[j].second.data == nullptr) continue;
      if (Overlap(tensors[i].second, tensors[j].second)) {
        return std::string(tensors[i].first) + ": must not overlap " + tensors[j].first;
      }
    }
  }
  return "";
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
  if (problem.empty()) check(InvalidOverlap(routed));
  return problem;
}

}  // namespace citi
