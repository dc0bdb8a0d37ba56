#include "row_dots_arguments.h"

namespace citi {
namespace {

// Sums of two such numbers, times the size of an element, stay below 2^63.
constexpr int64_t kMaxElements = int64_t{1} << 58;

bool IsFloating(DType dtype) { return IsKnown(dtype) && dtype != DType::kBool; }

bool IsAligned(const void* data, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(SizeOf(dtype)) == 0;
}

bool Overlap(const Vector& one, const Vector& other) {
  const auto first = reinterpret_cast<uintptr_t>(one.data);
  const auto second = reinterpret_cast<uintptr_t>(other.data);
  const auto first_size = static_cast<uintptr_t>(one.size * SizeOf(one.dtype));
  const auto second_size = static_cast<uintptr_t>(other.size * SizeOf(other.dtype));
  return first < second + second_size && second < first + first_size;
}

// How far from the first to the last of n elements; -1: farther than any storage.
int64_t Reach(int64_t n, int64_t stride) {
  if (n == 1) return 0;
  return stride > kMaxElements / (n - 1) ? -1 : (n - 1) * stride;
}

std::string InvalidMatrix(const std::string& name, const Matrix& matrix, const RowDots& dots) {
  if (!IsFloating(matrix.dtype)) return name + ": dtype must be floating";
  if (matrix.data == nullptr) return name + ": data must not be null";
  if (!IsAligned(matrix.data, matrix.dtype)) return name + ": data must be aligned to its dtype";
  if (matrix.stride_t < 0 || matrix.stride_f < 0) return name + ": strides must not be negative";
  const int64_t tokens = Reach(dots.num_tokens, matrix.stride_t);
  const int64_t features = Reach(dots.num_features, matrix.stride_f);
  if (tokens < 0 || features < 0 ||
      (tokens + features + 1) * SizeOf(matrix.dtype) > matrix.num_bytes) {
    return name + ": shape and strides must stay within the " + std::to_string(matrix.num_bytes) +
           " bytes of its storage";
  }
  return "";
}

std::string InvalidVector(const std::string& name, const Vector& vector, int64_t size) {
  if (vector.data == nullptr) return name + ": data must not be null";
  if (!IsAligned(vector.data, vector.dtype)) return name + ": data must be aligned to its dtype";
  if (vector.size != size) {
    return name + ": must have " + std::to_string(size) + " entries, got " +
           std::to_string(vector.size);
  }
  if (size * SizeOf(vector.dtype) > vector.num_bytes) {
    return name + ": must stay within the " + std::to_string(vector.num_bytes) +
           " bytes of its storage";
  }
  return "";
}

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
  if (problem.empty()) problem = InvalidMatrix("a", dots.a, dots);
  if (problem.empty()) problem = InvalidMatrix("b", dots.b, dots);
  if (problem.empty()) problem = InvalidOptionals(dots);
  if (problem.empty()) problem = InvalidVector("parts", dots.parts, num_parts * num_segments);
  if (problem.empty() && Overlap(dots.scores, dots.parts)) {
    problem = "parts: must not overlap scores";
  }
  return problem;
}

}  // namespace citi
