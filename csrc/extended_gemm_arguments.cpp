#include "extended_gemm_arguments.h"
#include "whole_numbers.h"

namespace citi {
namespace {

// TMA counts coordinates in 32 bits, tile edges included; and bytes of a stride in 40.
constexpr int64_t kMaxSize = INT32_MAX - 1024;
constexpr int64_t kMaxStride = int64_t{1} << 38;
// The kernel counts pieces of 128 x 128 of the output in 32 bits.
constexpr int64_t kPieceSide = 128;

int64_t Pieces(int64_t size) { return CeilDiv(size, kPieceSide); }

std::string InvalidSizes(const ExtendedGemm& gemm) {
  for (const int64_t size : {gemm.num_rows, gemm.num_columns, gemm.depth}) {
    if (size < 1 || size > kMaxSize) {
      return "shape: sizes must be in [1, " + std::to_string(kMaxSize) + "], got " +
             std::to_string(size);
    }
  }
  if (gemm.more < 0 || gemm.more > kMaxExtension) {
    return "shape: the extension must be in [0, " + std::to_string(kMaxExtension) + "] wide, got " +
           std::to_string(gemm.more);
  }
  if (Pieces(gemm.num_rows) * Pieces(gemm.num_columns) > INT32_MAX) {
    return "shape: the output has too many tiles";
  }
  return "";
}

std::string InvalidOperand(const std::string& name, const Matrix& matrix, DType dtype,
                           int64_t num_rows, int64_t num_columns) {
  if (matrix.dtype != dtype) return name + ": dtype must be that of the other operands";
  if (matrix.column_stride != 1) return name + ": columns must be contiguous";
  if (reinterpret_cast<uintptr_t>(matrix.data) % kTmaAlignment != 0) {
    return name + ": data must be aligned to 16 bytes";
  }
  if (num_rows > 1) {
    if (matrix.row_stride < num_columns) return name + ": rows must not overlap";
    if (matrix.row_stride > kMaxStride) return name + ": rows are too far apart";
    if (matrix.row_stride * SizeOf(dtype) % kTmaAlignment != 0) {
      return name + ": rows must be a multiple of 16 bytes apart, got a stride of " +
             std::to_string(matrix.row_stride) + " elements";
    }
  }
  return InvalidMatrix(name, matrix, num_rows, num_columns);
}

std::string InvalidBias(const ExtendedGemm& gemm) {
  if (gemm.bias.data == nullptr) return "";
  if (gemm.bias.dtype != gemm.out.dtype) return "bias: dtype must be that of the other operands";
  if (reinterpret_cast<uintptr_t>(gemm.bias.data) % 4 != 0) {
    return "bias: data must be aligned to 4 bytes";
  }
  return InvalidVector("bias", gemm.bias, gemm.num_columns);
}

Vector ExtentOfRight(const ExtendedGemm& gemm, const Matrix& right, int64_t depth) {
  return gemm.is_input_gradient ? ExtentOf(right, depth, gemm.num_columns)
                                : ExtentOf(right, gemm.num_columns, depth);
}

}  // namespace

ExtendedGemm LinearProblem(int64_t num_tokens, int64_t num_in, int64_t num_out, int64_t rank) {
  ExtendedGemm gemm{};
  gemm.num_rows = num_tokens;
  gemm.num_columns = num_out;
  gemm.depth = num_in;
  gemm.more = rank;
  return gemm;
}

ExtendedGemm InputGradientProblem(int64_t num_tokens, int64_t num_in, int64_t num_out,
                                  int64_t rank) {
  ExtendedGemm gemm = LinearProblem(num_tokens, num_out, num_in, rank);
  gemm.is_input_gradient = true;
  return gemm;
}

ExtendedGemmNames NamesOf(const ExtendedGemm& gemm) {
  if (gemm.is_input_gradient) return {"dy", "weight", "dz", "stack", "dx"};
  return {"x", "weight", "u", "b", "y"};
}

std::vector<Named> TensorsOf(const ExtendedGemm& gemm) {
  const ExtendedGemmNames names = NamesOf(gemm);
  std::vector<Named> tensors = {{names.out, ExtentOf(gemm.out, gemm.num_rows, gemm.num_columns)},
                                {names.left, ExtentOf(gemm.left, gemm.num_rows, gemm.depth)},
                                {names.right, ExtentOfRight(gemm, gemm.right, gemm.depth)},
                                {"bias", gemm.bias}};
  if (gemm.more > 0) {
    tensors.push_back({names.more_right, ExtentOfRight(gemm, gemm.more_right, gemm.more)});
  }
  return tensors;
}

std::string Invalid(const ExtendedGemm& gemm) {
  const ExtendedGemmNames names = NamesOf(gemm);
  const DType dtype = gemm.left.dtype;
  std::string problem = InvalidSizes(gemm);
  if (!problem.empty()) return problem;
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    return std::string(names.left) + ": dtype must be bf16 or fp16";
  }
  const auto check = [&](const char* name, const Matrix& matrix, int64_t rows, int64_t columns) {
    if (problem.empty()) problem = InvalidOperand(name, matrix, dtype, rows, columns);
  };
  const auto check_right = [&](const char* name, const Matrix& matrix, int64_t depth) {
    check(name, matrix, gemm.is_input_gradient ? depth : gemm.num_columns,
          gemm.is_input_gradient ? gemm.num_columns : depth);
  };
  check(names.left, gemm.left, gemm.num_rows, gemm.depth);
  check_right(names.right, gemm.right, gemm.depth);
  if (gemm.more > 0) {
    check(names.more_left, gemm.more_left, gemm.num_rows, gemm.more);
    check_right(names.more_right, gemm.more_right, gemm.more);
  }
  check(names.out, gemm.out, gemm.num_rows, gemm.num_columns);
  if (problem.empty()) problem = InvalidBias(gemm);
  if (problem.empty() && (gemm.order.group_rows < 0 || gemm.order.group_rows > kMaxGroupRows)) {
    problem = "order: groups must have 0 to " + std::to_string(kMaxGroupRows) + " rows, got " +
              std::to_string(gemm.order.group_rows);
  }
  if (!problem.empty()) return problem;
  std::vector<Named> tensors = TensorsOf(gemm);
  if (gemm.more > 0) {
    tensors.push_back({names.more_left, ExtentOf(gemm.more_left, gemm.num_rows, gemm.more)});
  }
  return InvalidOverlap(tensors, 1);
}

}  // namespace citi
