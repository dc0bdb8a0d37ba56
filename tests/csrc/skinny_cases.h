// Tensors of the skinny passes for tests. Values are small multiples of a power of two, so that
// products and their sums are exact in fp32, whatever the order; logits tie now and then.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "checks.h"
#include "skinny_arguments.h"

namespace citi {

template <class Element>
constexpr DType DTypeOf() {
  if (sizeof(Element) == 4) return DType::kFloat32;
  return std::is_same_v<Element, BFloat16> ? DType::kBFloat16 : DType::kFloat16;
}

// Rows, maybe apart, in memory of exactly their size; begins as NaN.
template <class Element>
struct Table {
  int64_t rows, columns, stride;
  std::vector<Element> memory;

  Table(int64_t rows, int64_t columns, int64_t gap = 0)
      : rows(rows), columns(columns), stride(columns + gap) {
    Element nan;
    std::memset(&nan, 0xff, sizeof nan);
    memory.assign(static_cast<size_t>((rows - 1) * stride + columns), nan);
  }
  Element& operator()(int64_t row, int64_t column) {
    return memory[static_cast<size_t>(row * stride + column)];
  }
  double Get(int64_t row, int64_t column) {
    return static_cast<double>(ToFloat((*this)(row, column)));
  }
  // Multiples of `unit`, at most 3 of them.
  Table& Fill(unsigned seed, double unit) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const int number = static_cast<int>(random() >> 8) % 7 - 3;
        (*this)(i, j) = Rounded<Element>(static_cast<float>(number * unit));
      }
    }
    return *this;
  }
  int64_t num_bytes() const { return static_cast<int64_t>(memory.size() * sizeof(Element)); }
  Vector AsVector() {
    return {memory.data(), num_bytes(), DTypeOf<Element>(), static_cast<int64_t>(memory.size())};
  }
  Matrix AsMatrix() const { return {memory.data(), num_bytes(), DTypeOf<Element>(), stride, 1}; }
};

// What dropout does to x[t, k], by the definition in counter_hash.py.
inline bool IsKept(const std::optional<Dropout>& dropout, int64_t t, int64_t k) {
  if (!dropout) return true;
  const auto hash = [](uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
  };
  const uint32_t row =
      hash(hash(static_cast<uint32_t>(t) ^ dropout->seed_low) ^ dropout->seed_high);
  return hash(row + static_cast<uint32_t>(k) * 0x9e3779b9u) >= dropout->threshold;
}

inline float ScaleOf(const std::optional<Dropout>& dropout) {
  return dropout ? dropout->inverse_keep : 1.0f;
}

template <class Element>
bool SameBits(Element one, Element other) {
  return std::memcmp(&one, &other, sizeof one) == 0;
}

inline bool IsClose(double ours, double truth, double scale) {
  return std::fabs(ours - truth) <= scale * 4e-6;
}

}  // namespace citi
