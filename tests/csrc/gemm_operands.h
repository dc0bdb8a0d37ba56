// Operands of the GEMMs on Hopper, random, and maps of them as the model takes them. Include behind
// the kernel.
#pragma once

#include <algorithm>
#include <memory>
#include <random>
#include <string>

#include "checks.h"
#include "test_matrix.h"

namespace citi {

// Rows 16 bytes apart, wider than the matrix; what lies beyond is NaN.
class Operand {
 public:
  Operand(int64_t rows, int64_t columns, DType dtype, unsigned seed, int64_t spare)
      : rows_(rows), columns_(columns), stride_((columns + 7) / 8 * 8 + spare), dtype_(dtype) {
    const int64_t size = (rows - 1) * stride_ + columns;
    data_.reset(new (std::align_val_t{16}) uint16_t[static_cast<size_t>(size)]);
    for (int64_t at = 0; at < size; ++at) PutNan(dtype, &data_[static_cast<size_t>(at)]);
    if (seed == 0) return;
    std::mt19937 random(seed);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) Draw(dtype, &random, At(r, c));
    }
  }
  uint16_t* At(int64_t row, int64_t column) {
    return &data_[static_cast<size_t>(row * stride_ + column)];
  }
  double Get(int64_t row, int64_t column) { return Decode(dtype_, At(row, column)); }
  Matrix AsMatrix() {
    return {data_.get(), ((rows_ - 1) * stride_ + columns_) * 2, dtype_, stride_, 1};
  }
  // Whether what lies between rows is still NaN.
  bool IsIntact() {
    for (int64_t r = 0; r + 1 < rows_; ++r) {
      for (int64_t c = columns_; c < stride_; ++c) {
        if (*At(r, c) != 0x7fff) return false;
      }
    }
    return true;
  }

 private:
  struct Free {
    void operator()(uint16_t* data) const { ::operator delete[](data, std::align_val_t{16}); }
  };
  int64_t rows_, columns_, stride_;
  DType dtype_;
  std::unique_ptr<uint16_t[], Free> data_;
};

inline hopper::TensorMap AsMap(const gemm::MapShape& shape) {
  return {static_cast<unsigned char*>(const_cast<void*>(shape.data)),
          shape.columns,
          shape.rows,
          shape.row_bytes,
          shape.box_columns,
          shape.box_rows};
}

inline gemm::Maps AsMaps(const gemm::MapShapes& shapes) {
  gemm::Maps maps{};
  for (int i = 0; i < 2; ++i) {
    maps.left[i] = AsMap(shapes.left[i]);
    maps.right[i] = AsMap(shapes.right[i]);
  }
  maps.out = AsMap(shapes.out);
  return maps;
}

}  // namespace citi
