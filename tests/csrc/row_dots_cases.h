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
#include "test_matrix.h"

namespace citi {

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
