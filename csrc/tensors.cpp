#include "tensors.h"

namespace citi {
namespace {

bool IsAligned(const void* data, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(SizeOf(dtype)) == 0;
}

// How far from the first to the last of n elements; -1: farther than any storage.
int64_t Reach(int64_t n, int64_t stride) {
  if (n == 1) return 0;
  return stride > kMaxElements / (n - 1) ? -1 : (n - 1) * stride;
}

}  // namespace

bool IsFloating(DType dtype) { return IsKnown(dtype) && dtype != DType::kBool; }

Vector ExtentOf(const Matrix& matrix, int64_t num_rows, int64_t num_columns) {
  int64_t size = 0;
  if (num_rows > 0 && num_columns > 0) {
    size = (num_rows - 1) * matrix.row_stride + (num_columns - 1) * matrix.column_stride + 1;
  }
  return {const_cast<void*>(matrix.data), matrix.num_bytes, matrix.dtype, size};
}

Vector ExtentOf(const Indices& indices) {
  return {const_cast<int32_t*>(indices.data), indices.num_bytes, DType::kFloat32, indices.size};
}

bool Overlap(const Vector& one, const Vector& other) {
  if (one.size == 0 || other.size == 0) return false;
  const auto first = reinterpret_cast<uintptr_t>(one.data);
  const auto second = reinterpret_cast<uintptr_t>(other.data);
  const auto first_size = static_cast<uintptr_t>(one.size * SizeOf(one.dtype));
  const auto second_size = static_cast<uintptr_t>(other.size * SizeOf(other.dtype));
  return first < second + second_size && second < first + first_size;
}

std::string InvalidOverlap(const std::vector<Named>& tensors, size_t num_written) {
  for (size_t i = 0; i < num_written; ++i) {
    if (tensors[i].vector.data == nullptr) continue;
    for (size_t j = i + 1; j < tensors.size(); ++j) {
      if (tensors[j].vector.data == nullptr) continue;
      if (Overlap(tensors[i].vector, tensors[j].vector)) {
        return std::string(tensors[i].name) + ": must not overlap " + tensors[j].name;
      }
    }
  }
  return "";
}

std::string InvalidMatrix(const std::string& name, const Matrix& matrix, int64_t num_rows,
                          int64_t num_columns) {
  if (!IsFloating(matrix.dtype)) return name + ": dtype must be floating";
  if (num_rows == 0 || num_columns == 0) return "";
  if (matrix.data == nullptr) return name + ": data must not be null";
  if (!IsAligned(matrix.data, matrix.dtype)) return name + ": data must be aligned to its dtype";
  if (matrix.row_stride < 0 || matrix.column_stride < 0)
    return name + ": strides must not be negative";
  const int64_t rows = Reach(num_rows, matrix.row_stride);
  const int64_t columns = Reach(num_columns, matrix.column_stride);
  if (rows < 0 || columns < 0 || (rows + columns + 1) * SizeOf(matrix.dtype) > matrix.num_bytes) {
    return name + ": shape and strides must stay within the " + std::to_string(matrix.num_bytes) +
           " bytes of its storage";
  }
  return "";
}

std::string InvalidVector(const std::string& name, const Vector& vector, int64_t size) {
  if (size == 0 && vector.size == 0) return "";
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

}  // namespace citi
