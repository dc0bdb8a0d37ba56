// Sixteen numbers side by side in registers of 256 bits. See lanes.h.
#pragma once

#include <immintrin.h>

#include "dtype.h"

namespace citi {
namespace {

struct Floats {
  using Value = float;
  __m256 low, high;

  static Floats Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Floats Load(const float* from) {
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
  }
  static Floats Load(const BFloat16* from) { return {Half(from), Half(from + 8)}; }
  static Floats Load(const Float16* from) { return {Half(from), Half(from + 8)}; }
  void Store(float* to) const {
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
  }
  Floats Abs() const {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, low), _mm256_andnot_ps(sign, high)};
  }
  friend Floats operator+(const Floats& x, const Floats& y) {
    return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)};
  }
  friend Floats operator-(const Floats& x, const Floats& y) {
    return {_mm256_sub_ps(x.low, y.low), _mm256_sub_ps(x.high, y.high)};
  }
  friend Floats operator*(const Floats& x, const Floats& y) {
    return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)};
  }

 private:
  static __m128i Bits(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  static __m256 Half(const BFloat16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(Bits(from)), 16));
  }
  static __m256 Half(const Float16* from) { return _mm256_cvtph_ps(Bits(from)); }
};

struct Doubles {
  using Value = double;
  __m256d quarters[4];

  template <class Function>
  static Doubles Each(const Function& function) {
    return {{function(0), function(1), function(2), function(3)}};
  }
  static Doubles Zero() {
    return Each([](int) { return _mm256_setzero_pd(); });
  }
  static Doubles Load(const double* from) {
    return Each([=](int i) { return _mm256_loadu_pd(from + 4 * i); });
  }
  void Store(double* to) const {
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(to + 4 * i, quarters[i]);
  }
  Doubles Abs() const {
    return Each([this](int i) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), quarters[i]); });
  }
  friend Doubles operator+(const Doubles& x, const Doubles& y) {
    return Each([&](int i) { return _mm256_add_pd(x.quarters[i], y.quarters[i]); });
  }
  friend Doubles operator-(const Doubles& x, const Doubles& y) {
    return Each([&](int i) { return _mm256_sub_pd(x.quarters[i], y.quarters[i]); });
  }
  friend Doubles operator*(const Doubles& x, const Doubles& y) {
    return Each([&](int i) { return _mm256_mul_pd(x.quarters[i], y.quarters[i]); });
  }
};

inline Doubles Widen(const Floats& x) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.low)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(x.low, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(x.high)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(x.high, 1))}};
}

}  // namespace
}  // namespace citi
