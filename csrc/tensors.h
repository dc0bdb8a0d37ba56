// Tensors as kernels take them: an address, how far memory goes, dtype, size or strides in
// elements; and what can be known to be wrong with one of them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dtype.h"

namespace citi {

// Sums of two such numbers, times the size of an element, stay below 2^63.
constexpr int64_t kMaxElements = int64_t{1} << 58;

// num_bytes: from `data` to the end of its storage; nothing beyond is touched.
struct Matrix {
  const void* data;
  int64_t num_bytes;
  DType dtype;
  int64_t row_stride;
  int64_t column_stride;
};

// Contiguous. data is null for an argument that is left out.
struct Vector {
  void* data;
  int64_t num_bytes;
  DType dtype;
  int64_t size;
};

// int32, read by a device alone: a wrong entry is no error, its slot is left out.
struct Indices {
  const int32_t* data;
  int64_t num_bytes;
  int64_t size;
};

// What is wrong, beginning with the name, or "". Sizes are at most kMaxElements; without an element
// there is no address to check.
std::string InvalidMatrix(const std::string& name, const Matrix& matrix, int64_t num_rows,
                          int64_t num_columns);
std::string InvalidVector(const std::string& name, const Vector& vector, int64_t size);

bool IsFloating(DType dtype);

// From the first to the last element. Indices: as fp32, which has as many bytes.
Vector ExtentOf(const Matrix& matrix, int64_t num_rows, int64_t num_columns);
Vector ExtentOf(const Indices& indices);

bool Overlap(const Vector& one, const Vector& other);

// A tensor by its name; null: left out.
struct Named {
  const char* name;
  Vector vector;
};

// The first `num_written` of the tensors overlap none of the others; or what does, or "".
std::string InvalidOverlap(const std::vector<Named>& tensors, size_t num_written);

}  // namespace citi
