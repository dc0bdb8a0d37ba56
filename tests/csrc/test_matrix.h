// Random matrices in every layout, and what their elements are by the definition of the formats.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>

#include "tensors.h"

namespace citi {

enum class Layout { kDense, kRowsApart, kColumnsApart, kTransposed };
constexpr Layout kLayouts[] = {Layout::kDense, Layout::kRowsApart, Layout::kColumnsApart,
                               Layout::kTransposed};

// By the definition of the formats, without the code under test.
inline double Decode(DType dtype, const void* from) {
  if (dtype == DType::kFloat64) return *static_cast<const double*>(from);
  if (dtype == DType::kFloat32) return static_cast<double>(*static_cast<const float*>(from));
  const uint16_t bits = *static_cast<const uint16_t*>(from);
  const int fraction_bits = dtype == DType::kBFloat16 ? 7 : 10;
  const int bias = dtype == DType::kBFloat16 ? 127 : 15;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 2 * bias + 1) {
    return fraction ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign * std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

// Numbers of about 1, and in 16 bits subnormal ones too.
inline void Draw(DType dtype, std::mt19937* random, void* to) {
  std::normal_distribution<double> normal;
  const double value = normal(*random);
  if (dtype == DType::kFloat64) *static_cast<double*>(to) = value;
  if (dtype == DType::kFloat32) *static_cast<float*>(to) = static_cast<float>(value);
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) return;
  const uint32_t raw = (*random)();
  const uint32_t one = dtype == DType::kBFloat16 ? 0x3f80u : 0x3c00u;
  const uint32_t magnitude = raw % 16 == 0 ? raw >> 8 & 0xffu : one - 0x100u + (raw >> 8 & 0x1ffu);
  *static_cast<uint16_t*>(to) = static_cast<uint16_t>((raw & 0x8000u) | magnitude);
}

inline void PutNan(DType dtype, void* to) {
  if (dtype == DType::kFloat64) *static_cast<double*>(to) = std::nan("");
  if (dtype == DType::kFloat32) *static_cast<float*>(to) = std::nanf("");
  if (dtype == DType::kBFloat16 || dtype == DType::kFloat16) *static_cast<uint16_t*>(to) = 0x7fff;
}

// A matrix in memory of exactly its size, so that AddressSanitizer sees every byte too far; what
// lies between its elements is NaN.
class TestMatrix {
 public:
  TestMatrix(int64_t rows, int64_t columns, DType dtype, Layout layout, unsigned seed)
      : rows_(rows), columns_(columns), dtype_(dtype) {
    stride_t_ = layout == Layout::kRowsApart ? columns + 3 : columns;
    stride_f_ = 1;
    if (layout == Layout::kColumnsApart) stride_t_ = 2 * columns + 1, stride_f_ = 2;
    if (layout == Layout::kTransposed) stride_t_ = 1, stride_f_ = rows;
    num_bytes_ = ((rows - 1) * stride_t_ + (columns - 1) * stride_f_ + 1) * SizeOf(dtype);
    data_.reset(new (std::align_val_t{16}) char[static_cast<size_t>(num_bytes_)]);
    FillWithNan();
    std::mt19937 random(seed);
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t f = 0; f < columns; ++f) Draw(dtype, &random, At(t, f));
    }
  }
  void* At(int64_t t, int64_t f) {
    return data_.get() + (t * stride_t_ + f * stride_f_) * SizeOf(dtype_);
  }
  double Get(int64_t t, int64_t f) { return Decode(dtype_, At(t, f)); }
  void FillWithNan() {
    for (int64_t at = 0; at < num_bytes_; at += SizeOf(dtype_)) PutNan(dtype_, data_.get() + at);
  }
  // Of its elements and of what lies between them.
  int64_t NumNan() const {
    int64_t count = 0;
    for (int64_t at = 0; at < num_bytes_; at += SizeOf(dtype_)) {
      count += std::isnan(Decode(dtype_, data_.get() + at)) ? 1 : 0;
    }
    return count;
  }
  int64_t NumBetween() const { return num_bytes_ / SizeOf(dtype_) - rows_ * columns_; }
  Matrix AsMatrix() const { return {data_.get(), num_bytes_, dtype_, stride_t_, stride_f_}; }
  // Dense ones alone.
  Vector AsVector() { return {data_.get(), num_bytes_, dtype_, rows_ * columns_}; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  DType dtype() const { return dtype_; }

 private:
  struct Free {
    void operator()(char* data) const { ::operator delete[](data, std::align_val_t{16}); }
  };
  int64_t rows_, columns_, stride_t_, stride_f_, num_bytes_;
  DType dtype_;
  std::unique_ptr<char[], Free> data_;
};

}  // namespace citi
