#include "parameter_scores_arguments.h"

namespace citi {
namespace {

// Sums over a tile's rows or columns are as many as the elements of a weight, at most.
constexpr int64_t kMaxWeight = kMaxElements / 16;

std::string InvalidSize(const char* name, int64_t size) {
  if (size >= 1 && size <= kMaxWeight) return "";
  return "shape: " + std::string(name) + " must be positive and at most 2^54, got " +
         std::to_string(size);
}

std::string InvalidSegments(const char* what, int64_t num_segments, int64_t size) {
  if (num_segments >= 1 && size % num_segments == 0) return "";
  return "scores_shape: must have a number of " + std::string(what) + " that divides the " +
         std::to_string(size) + " of weight, got " + std::to_string(num_segments);
}

std::string InvalidScores(const ParameterScores& problem) {
  const bool is_elements = problem.granularity() == Granularity::kElements;
  const DType dtype = problem.scores.dtype;
  const bool is_wide = dtype == DType::kFloat32 || dtype == DType::kFloat64;
  if (!is_wide && !(is_elements && dtype == DType::kBFloat16)) {
    return "scores: dtype must be fp32 or fp64, or bf16 for scores of elements";
  }
  return InvalidVector("scores", problem.scores,
                       problem.num_row_segments * problem.num_column_segments);
}

std::string InvalidParts(const ParameterScores& problem, int64_t num_parts) {
  const Vector& parts = problem.parts;
  if (num_parts == 0) {
    return parts.data == nullptr ? "" : "parts: must be left out for scores of elements";
  }
  if (parts.data == nullptr) return "parts: must be given, but for scores of elements";
  if (parts.dtype != DType::kFloat32) return "parts: dtype must be fp32";
  return InvalidVector("parts", parts, num_parts);
}

}  // namespace

std::string InvalidSizes(const ParameterScores& problem) {
  std::string wrong = InvalidSize("tokens", problem.num_tokens);
  if (wrong.empty()) wrong = InvalidSize("out-features", problem.num_out);
  if (wrong.empty()) wrong = InvalidSize("in-features", problem.num_in);
  if (wrong.empty() && problem.num_out > kMaxWeight / problem.num_in) {
    wrong = "shape: weight must have at most 2^54 elements";
  }
  if (wrong.empty()) wrong = InvalidSegments("rows", problem.num_row_segments, problem.num_out);
  if (wrong.empty()) {
    wrong = InvalidSegments("columns", problem.num_column_segments, problem.num_in);
  }
  const bool are_blocks = problem.num_row_segments > 1 && problem.num_column_segments > 1;
  if (wrong.empty() && are_blocks && problem.granularity() != Granularity::kElements) {
    wrong = "scores_shape: must be (1, 1), (P, 1), (1, Q) or that of weight, got (" +
            std::to_string(problem.num_row_segments) + ", " +
            std::to_string(problem.num_column_segments) + ")";
  }
  return wrong;
}

std::string Invalid(const ParameterScores& problem, int64_t num_parts) {
  std::string wrong = InvalidScores(problem);
  const struct {
    const char* name;
    const Matrix& matrix;
    int64_t num_rows, num_columns;
  } matrices[] = {{"weight", problem.weight, problem.num_out, problem.num_in},
                  {"x", problem.x, problem.num_tokens, problem.num_in},
                  {"g", problem.g, problem.num_tokens, problem.num_out}};
  for (const auto& [name, matrix, num_rows, num_columns] : matrices) {
    if (wrong.empty() && matrix.dtype == DType::kFloat64) {
      wrong = std::string(name) + ": dtype must be fp32, bf16 or fp16";
    }
    if (wrong.empty()) wrong = InvalidMatrix(name, matrix, num_rows, num_columns);
  }
  if (wrong.empty() && problem.valid.data != nullptr) {
    if (problem.valid.dtype != DType::kBool) return "valid: dtype must be bool";
    wrong = InvalidVector("valid", problem.valid, problem.num_tokens);
  }
  if (wrong.empty()) wrong = InvalidParts(problem, num_parts);
  if (!wrong.empty()) return wrong;
  return InvalidOverlap({{"parts", problem.parts},
                         {"scores", problem.scores},
                         {"weight", ExtentOf(problem.weight, problem.num_out, problem.num_in)},
                         {"x", ExtentOf(problem.x, problem.num_tokens, problem.num_in)},
                         {"g", ExtentOf(problem.g, problem.num_tokens, problem.num_out)},
                         {"valid", problem.valid}},
                        2);
}

}  // namespace citi
