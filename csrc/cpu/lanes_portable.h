// Sixteen numbers side by side, for any CPU. See lanes.h.
#pragma once

#include <cmath>

#include "dtype.h"

namespace citi {
namespace {

template <class Number>
struct PortableLanes {
  using Value = Number;
  Number values[16];

  template <class Function>
  static PortableLanes Each(const Function& function) {
    PortableLanes result;
    for (int i = 0; i < 16; ++i) result.values[i] = function(i);
    return result;
  }
  static PortableLanes Zero() {
    return Each([](int) { return Number{0}; });
  }
  static PortableLanes Load(const Number* from) {
    return Each([=](int i) { return from[i]; });
  }
  static PortableLanes Load(const BFloat16* from) {
    return Each([=](int i) { return ToFloat(from[i]); });
  }
  static PortableLanes Load(const Float16* from) {
    return Each([=](int i) { return ToFloat(from[i]); });
  }
  static PortableLanes Broadcast(Number value) {
    return Each([=](int) { return value; });
  }
  void Store(Number* to) const {
    for (int i = 0; i < 16; ++i) to[i] = values[i];
  }
  void Store(BFloat16* to) const {
    for (int i = 0; i < 16; ++i) to[i] = Rounded<BFloat16>(values[i]);
  }
  PortableLanes Abs() const {
    return Each([this](int i) { return std::fabs(values[i]); });
  }
  // The upper half of the lanes onto the lower one, until one is left.
  Number Sum() const {
    PortableLanes sums = *this;
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums.values[i] += sums.values[i + half];
    }
    return sums.values[0];
  }
  friend PortableLanes operator+(const PortableLanes& x, const PortableLanes& y) {
    return Each([&](int i) { return x.values[i] + y.values[i]; });
  }
  friend PortableLanes operator-(const PortableLanes& x, const PortableLanes& y) {
    return Each([&](int i) { return x.values[i] - y.values[i]; });
  }
  friend PortableLanes operator*(const PortableLanes& x, const PortableLanes& y) {
    return Each([&](int i) { return x.values[i] * y.values[i]; });
  }
};

using Floats = PortableLanes<float>;
using Doubles = PortableLanes<double>;

inline Floats MultiplyAdd(const Floats& x, const Floats& y, const Floats& sum) {
  return x * y + sum;
}

inline Doubles Widen(const Floats& x) {
  return Doubles::Each([&](int i) { return static_cast<double>(x.values[i]); });
}

}  // namespace
}  // namespace citi
