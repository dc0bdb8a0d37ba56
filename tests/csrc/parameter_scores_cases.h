// Random parameter scores in every layout, and their truth by naive loops in fp64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "parameter_scores_arguments.h"
#include "row_dots_cases.h"

namespace citi {

struct ScoresOptions {
  int64_t num_tokens, num_out, num_in, num_row_segments, num_column_segments;
  DType g = DType::kBFloat16, x = DType::kBFloat16, weight = DType::kBFloat16;
  DType scores = DType::kFloat64;
  bool is_masked = false, is_per_token = false;
  Layout layout = Layout::kDense, weight_layout = Layout::kDense;

  std::string Name() const {
    std::string name;
    for (const int64_t each :
         {num_tokens, num_out, num_in, num_row_segments, num_column_segments}) {
      name += std::to_string(each) + " ";
    }
    name += "dtypes";
    for (const DType each : {g, x, weight, scores}) {
      name += " " + std::to_string(static_cast<int>(each));
    }
    return name + (is_masked ? " masked" : "") + (is_per_token ? " per token" : "");
  }
};

// A number of the first dtype in the second.
inline double InDtype(double value, DType from, DType to) {
  if (from == to || to == DType::kFloat32) return value;
  const float number = static_cast<float>(value);
  return to == DType::kBFloat16 ? static_cast<double>(ToFloat(Rounded<BFloat16>(number)))
                                : static_cast<double>(ToFloat(Rounded<Float16>(number)));
}

// Everything that a ParameterScores points to. Tokens that do not count are NaN.
class ScoresProblem {
 public:
  static constexpr float kScale = 0.25f;
  static constexpr double kBefore = 0.5;

  explicit ScoresProblem(const ScoresOptions& options)
      : options(options),
        g(options.num_tokens, options.num_out, options.g, options.layout, 1),
        x(options.num_tokens, options.num_in, options.x, options.layout, 2),
        weight(options.num_out, options.num_in, options.weight, options.weight_layout, 3),
        scores_(1, options.num_row_segments * options.num_column_segments, options.scores,
                Layout::kDense, 4),
        valid_(static_cast<size_t>(options.num_tokens), 1) {
    for (int64_t s = 0; s < scores_.columns(); ++s) PutScore(s, kBefore);
    for (int64_t t = 0; t < options.num_tokens && options.is_masked; t += 3) {
      valid_[static_cast<size_t>(t)] = 0;
      for (int64_t i = 0; i < options.num_out; ++i) PutNan(options.g, g.At(t, i));
      for (int64_t j = 0; j < options.num_in; ++j) PutNan(options.x, x.At(t, j));
    }
  }

  // NumParts: of the sizes, how many there are.
  template <class NumParts>
  ParameterScores Arguments(const NumParts& num_parts) {
    ParameterScores problem{};
    problem.num_tokens = options.num_tokens;
    problem.num_out = options.num_out, problem.num_in = options.num_in;
    problem.num_row_segments = options.num_row_segments;
    problem.num_column_segments = options.num_column_segments;
    const Matrix scores = scores_.AsMatrix();
    problem.scores = {const_cast<void*>(scores.data), scores.num_bytes, scores.dtype,
                      scores_.columns()};
    problem.weight = weight.AsMatrix(), problem.x = x.AsMatrix(), problem.g = g.AsMatrix();
    if (options.is_masked) {
      problem.valid = {valid_.data(), options.num_tokens, DType::kBool, options.num_tokens};
    }
    problem.is_per_token = options.is_per_token;
    problem.scale = kScale;
    problem.seed = 0x123456789abcdef0u;
    parts_.assign(static_cast<size_t>(num_parts(problem)), std::nanf(""));
    if (!parts_.empty()) {
      const auto size = static_cast<int64_t>(parts_.size());
      problem.parts = {parts_.data(), size * 4, DType::kFloat32, size};
    }
    return problem;
  }

  void PutScore(int64_t s, double value) {
    void* at = scores_.At(0, s);
    if (options.scores == DType::kFloat64) *static_cast<double*>(at) = value;
    if (options.scores == DType::kFloat32) *static_cast<float*>(at) = static_cast<float>(value);
    if (options.scores == DType::kBFloat16) {
      *static_cast<BFloat16*>(at) = Rounded<BFloat16>(static_cast<float>(value));
    }
  }
  std::vector<double> Scores() {
    std::vector<double> scores;
    for (int64_t s = 0; s < scores_.columns(); ++s) scores.push_back(scores_.Get(0, s));
    return scores;
  }

  // Whether the scores are the truth, up to the rounding of products in fp32 and of the scores.
  bool IsAccurate() {
    const std::vector<double> ours = Scores();
    std::vector<double> truth(ours.size(), kBefore), size(ours.size(), kBefore);
    const int64_t rows = options.num_out / options.num_row_segments;
    const int64_t columns = options.num_in / options.num_column_segments;
    for (int64_t i = 0; i < options.num_out; ++i) {
      for (int64_t j = 0; j < options.num_in; ++j) {
        double sum = 0.0, absolute = 0.0;
        for (int64_t t = 0; t < options.num_tokens; ++t) {
          if (!valid_[static_cast<size_t>(t)]) continue;
          const double product = g.Get(t, i) * InDtype(x.Get(t, j), options.x, options.g);
          sum += options.is_per_token ? std::fabs(product) : product;
          absolute += std::fabs(product);
        }
        const auto s = static_cast<size_t>(i / rows * options.num_column_segments + j / columns);
        truth[s] += std::fabs(weight.Get(i, j) * sum) * kScale;
        size[s] += std::fabs(weight.Get(i, j)) * absolute * kScale;
      }
    }
    const double eps = options.scores == DType::kBFloat16 ? std::ldexp(1.0, -7)
                                                          : std::numeric_limits<float>::epsilon();
    for (size_t s = 0; s < ours.size(); ++s) {
      const double allowed =
          options.scores == DType::kBFloat16 ? eps * truth[s] : 8 * eps * size[s];
      if (!(std::fabs(ours[s] - truth[s]) <= allowed + 1e-6 * size[s])) return false;
    }
    return true;
  }

  ScoresOptions options;
  TestMatrix g, x, weight;

 private:
  TestMatrix scores_;
  std::vector<uint8_t> valid_;
  std::vector<float> parts_;
};

}  // namespace citi
