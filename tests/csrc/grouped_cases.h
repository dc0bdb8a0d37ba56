// Routings and matrices of grouped products, their truth by a naive loop, and a CHECK.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "grouped_arguments.h"
#include "row_dots_cases.h"

namespace citi {

enum class Spread { kRandom, kAllOnOne, kSomeEmpty };

// Which experts every token keeps, and what follows from it.
class TestRouting {
 public:
  TestRouting(int64_t num_tokens, int64_t num_experts, int64_t top_k, Spread spread)
      : num_tokens_(num_tokens), num_experts_(num_experts), top_k_(top_k) {
    std::mt19937 random(5);
    std::vector<int64_t> experts;
    // kSomeEmpty: nobody keeps expert 0 and the last one.
    const int64_t spare = spread == Spread::kSomeEmpty ? 1 : 0;
    for (int64_t e = spare; e < num_experts - spare; ++e) experts.push_back(e);
    pairs_.resize(static_cast<size_t>(num_tokens * top_k));
    for (int64_t t = 0; t < num_tokens; ++t) {
      if (spread != Spread::kAllOnOne) std::shuffle(experts.begin(), experts.end(), random);
      for (int64_t c = 0; c < top_k; ++c) {
        pairs_[static_cast<size_t>(c * num_tokens + t)] =
            experts[static_cast<size_t>(c)] * top_k + c;
      }
    }
    offsets.push_back(0);
    for (int64_t pair = 0; pair < num_experts * top_k; ++pair) {
      for (size_t flat = 0; flat < pairs_.size(); ++flat) {
        if (pairs_[flat] == pair) order.push_back(static_cast<int32_t>(flat));
      }
      offsets.push_back(static_cast<int32_t>(order.size()));
    }
  }
  Routing AsRouting() const {
    const auto indices = [](const std::vector<int32_t>& of) {
      const auto size = static_cast<int64_t>(of.size());
      return Indices{of.data(), size * 4, size};
    };
    return {num_tokens_, num_experts_, top_k_, indices(order), indices(offsets)};
  }
  int64_t num_slots() const { return num_tokens_ * top_k_; }
  int64_t Token(int64_t slot) const { return order[static_cast<size_t>(slot)] % num_tokens_; }
  int64_t Choice(int64_t slot) const { return order[static_cast<size_t>(slot)] / num_tokens_; }
  int64_t Expert(int64_t slot) const {
    return pairs_[static_cast<size_t>(order[static_cast<size_t>(slot)])] / top_k_;
  }

  std::vector<int32_t> order, offsets;

 private:
  int64_t num_tokens_, num_experts_, top_k_;
  std::vector<int64_t> pairs_;
};

// A matrix that a kernel may write, all NaN, and how it was before.
class TestOutput {
 public:
  TestOutput(int64_t rows, int64_t columns, DType dtype, Layout layout, bool is_drawn)
      : matrix(rows, columns, dtype, layout, 77) {
    for (int64_t row = 0; !is_drawn && row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) PutNan(dtype, matrix.At(row, column));
    }
    before_ = Bytes();
  }
  double Before(int64_t row, int64_t column) const {
    const auto* at =
        static_cast<const char*>(const_cast<TestOutput*>(this)->matrix.At(row, column));
    return Decode(matrix.dtype(),
                  before_.data() + (at - static_cast<const char*>(matrix.AsMatrix().data)));
  }
  // Whether nothing between its rows was written.
  bool IsIntactBetweenRows() {
    std::vector<char> now = Bytes();
    for (int64_t row = 0; row < matrix.rows(); ++row) {
      const auto* at = static_cast<const char*>(matrix.At(row, 0));
      const auto from = at - static_cast<const char*>(matrix.AsMatrix().data);
      const auto size = matrix.columns() * SizeOf(matrix.dtype());
      std::memcpy(now.data() + from, before_.data() + from, static_cast<size_t>(size));
    }
    return now == before_;
  }
  std::vector<char> Bytes() const {
    const Matrix all = matrix.AsMatrix();
    const auto* from = static_cast<const char*>(all.data);
    return {from, from + all.num_bytes};
  }

  TestMatrix matrix;

 private:
  std::vector<char> before_;
};

// Whether a number is the truth, up to a sum in fp32 of terms whose magnitudes add up to `scale`,
// and to the rounding of numbers whose magnitudes add up to `rounded`.
inline bool IsClose(double ours, double truth, double scale, double rounded, DType dtype) {
  const double unit = dtype == DType::kBFloat16  ? std::ldexp(1.0, -8)
                      : dtype == DType::kFloat16 ? std::ldexp(1.0, -11)
                                                 : 0.0;
  return std::fabs(ours - truth) <=
         unit * rounded + 16 * std::numeric_limits<float>::epsilon() * scale;
}

}  // namespace citi
