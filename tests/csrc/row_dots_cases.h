// Random row dots in every layout, their truth by a naive loop, and a CHECK.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "checks.h"
#include "row_dots_arguments.h"

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
    for (int64_t at = 0; at < num_bytes_; at += SizeOf(dtype)) PutNan(dtype, data_.get() + at);
    std::mt19937 random(seed);
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t f = 0; f < columns; ++f) Draw(dtype, &random, At(t, f));
    }
  }
  void* At(int64_t t, int64_t f) {
    return data_.get() + (t * stride_t_ + f * stride_f_) * SizeOf(dtype_);
  }
  double Get(int64_t t, int64_t f) { return Decode(dtype_, At(t, f)); }
  Matrix AsMatrix() const { return {data_.get(), num_bytes_, dtype_, stride_t_, stride_f_}; }
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

struct Options {
  int64_t num_tokens, num_features, num_segments;
  DType a, b;
  bool is_masked, has_offset, is_signed;

  std::string Name() const {
    return std::to_string(num_tokens) + "x" + std::to_string(num_features) + " in " +
           std::to_string(num_segments) + ", dtypes " + std::to_string(static_cast<int>(a)) + " " +
           std::to_string(static_cast<int>(b)) + (is_masked ? " masked" : "") +
           (has_offset ? " offset" : "") + (is_signed ? " signed" : "");
  }
};

// Everything that a RowDots points to. Tokens that do not count are NaN.
class Problem {
 public:
  Problem(const Options& options, Layout layout, DType scores_dtype = DType::kFloat64)
      : options_(options),
        a(options.num_tokens, options.num_features, options.a, layout, 1),
        b(options.num_tokens, options.num_features, options.b, layout, 2),
        offset(1, options.num_features, IsDouble() ? DType::kFloat64 : DType::kFloat32,
               Layout::kDense, 3),
        valid_(static_cast<size_t>(options.num_tokens), 1),
        scores_(static_cast<size_t>(options.num_segments), 0.5),
        float_scores_(static_cast<size_t>(options.num_segments), 0.5f),
        scores_dtype_(scores_dtype) {
    if (!options.is_masked) return;
    for (int64_t t = 0; t < options.num_tokens; t += 3) {
      valid_[static_cast<size_t>(t)] = 0;
      for (int64_t f = 0; f < options.num_features; ++f) {
        PutNan(options.a, a.At(t, f));
        PutNan(options.b, b.At(t, f));
      }
    }
  }

  RowDots Arguments(int64_t num_parts) {
    const auto num_segments = static_cast<size_t>(options_.num_segments);
    parts_.assign(static_cast<size_t>(num_parts) * num_segments, std::nan(""));
    void* scores = scores_dtype_ == DType::kFloat64 ? static_cast<void*>(scores_.data())
                                                    : static_cast<void*>(float_scores_.data());
    RowDots dots{options_.num_tokens,
                 options_.num_features,
                 {scores, options_.num_segments * SizeOf(scores_dtype_), scores_dtype_,
                  options_.num_segments},
                 a.AsMatrix(),
                 b.AsMatrix(),
                 {},
                 {},
                 options_.is_signed,
                 {parts_.data(), static_cast<int64_t>(parts_.size() * sizeof(double)),
                  DType::kFloat64, static_cast<int64_t>(parts_.size())}};
    if (options_.is_masked) {
      dots.valid = {valid_.data(), options_.num_tokens, DType::kBool, options_.num_tokens};
    }
    if (options_.has_offset) {
      const Matrix row = offset.AsMatrix();
      dots.offset = {const_cast<void*>(row.data), row.num_bytes, row.dtype, options_.num_features};
    }
    return dots;
  }

  std::vector<double> Scores() const {
    if (scores_dtype_ == DType::kFloat64) return scores_;
    return {float_scores_.begin(), float_scores_.end()};
  }

  // The scores by a naive loop in fp64, and the sums of absolute products that errors scale with.
  void Truth(std::vector<double>* truth, std::vector<double>* scale) {
    const int64_t length = options_.num_features / options_.num_segments;
    truth->assign(static_cast<size_t>(options_.num_segments), 0.5);
    scale->assign(static_cast<size_t>(options_.num_segments), 0.5);
    for (int64_t t = 0; t < options_.num_tokens; ++t) {
      if (!valid_[static_cast<size_t>(t)]) continue;
      for (int64_t s = 0; s < options_.num_segments; ++s) {
        double dot = 0.0, absolute = 0.0;
        for (int64_t f = s * length; f < (s + 1) * length; ++f) {
          const double shift = options_.has_offset ? offset.Get(0, f) : 0.0;
          dot += (a.Get(t, f) - shift) * b.Get(t, f);
          absolute += (std::fabs(a.Get(t, f)) + std::fabs(shift)) * std::fabs(b.Get(t, f));
        }
        (*truth)[static_cast<size_t>(s)] += options_.is_signed ? dot : std::fabs(dot);
        (*scale)[static_cast<size_t>(s)] += absolute;
      }
    }
  }

  // Whether the scores are the truth, up to the rounding of the dots and of the scores.
  bool IsAccurate() {
    std::vector<double> truth, scale;
    Truth(&truth, &scale);
    const bool in_double = IsDouble() && scores_dtype_ == DType::kFloat64;
    const double eps =
        in_double ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
    const std::vector<double> ours = Scores();
    for (size_t s = 0; s < ours.size(); ++s) {
      if (!(std::fabs(ours[s] - truth[s]) <= 8 * eps * scale[s])) return false;
    }
    return true;
  }

  bool IsDouble() const { return options_.a == DType::kFloat64 || options_.b == DType::kFloat64; }

 private:
  Options options_;

 public:
  TestMatrix a, b, offset;

 private:
  std::vector<uint8_t> valid_;
  std::vector<double> scores_;
  std::vector<float> float_scores_;
  std::vector<double> parts_;
  DType scores_dtype_;
};

}  // namespace citi
