#include "row_dots_arguments.h"

#include <utility>

namespace citi {
namespace {

std::string InvalidOptionals(const RowDots& dots) {
  std::string problem;
  if (dots.valid.data != nullptr) {
    if (dots.valid.dtype != DType::kBool) return "valid: dtype must be bool";
    problem = InvalidVector("valid", dots.valid, dots.num_tokens);
  }
  if (problem.empty() && dots.offset.data != nullptr) {
    const DType wanted = dots.is_double() ? DType::kFloat64 : DType::kFloat32;
    if (dots.offset.dtype != wanted) return "offset: dtype must be that of the dots";
    problem = InvalidVector("offset", dots.offset, dots.num_features);
  }
  return problem;
}

}  // namespace

std::string Invalid(const RowDots& dots, int64_t num_parts) {
  if (dots.num_tokens < 1 || dots.num_tokens > kMaxElements) {
    return "num_tokens: must be positive, got " + std::to_string(dots.num_tokens);
  }
  if (dots.num_features < 1 || dots.num_features > kMaxElements) {
    return "num_features: must be positive, got " + std::to_string(dots.num_features);
  }
  const int64_t num_segments = dots.num_segments();
  if (num_segments < 1 || dots.num_features % num_segments != 0) {
    return "scores: must have a number of entries that divides the " +
           std::to_string(dots.num_features) + " features, got " + std::to_string(num_segments);
  }
  if (dots.scores.dtype != DType::kFloat32 && dots.scores.dtype != DType::kFloat64) {
    return "scores: dtype must be fp32 or fp64";
  }
  if (dots.parts.dtype != DType::kFloat64) return "parts: dtype must be fp64";
  if (num_segments > kMaxElements / num_parts) return "parts: too many";
  std::string problem = InvalidVector("scores", dots.scores, num_segments);
  for (const auto& [name, matrix] : {std::pair{"a", dots.a}, std::pair{"b", dots.b}}) {
    if (!problem.empty()) break;
    problem = InvalidMatrix(name, matrix, dots.num_tokens, dots.num_features);
  }
  if (problem.empty()) problem = InvalidOptionals(dots);
  if (problem.empty()) problem = InvalidVector("parts", dots.parts, num_parts * num_segments);
  if (!problem.empty()) return problem;
  return InvalidOverlap({{"parts", dots.parts},
                         {"scores", dots.scores},
                         {"a", ExtentOf(dots.a, dots.num_tokens, dots.num_features)},
                         {"b", ExtentOf(dots.b, dots.num_tokens, dots.num_features)},
                         {"valid", dots.valid},
                         {"offset", dots.offset}},
                        2);
}

}  // namespace citi
