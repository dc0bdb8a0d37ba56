// Sixteen numbers side by side in registers of 512 bits. See lanes.h.
#pragma once

#include <immintrin.h>

#include "dtype.h"

namespace citi {
namespace {

struct Floats {
  using Value = float;
  __m512 all;

  static Floats Zero() { return {_mm512_setzero_ps()}; }
  static Floats Load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Floats Load(const BFloat16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(Bits(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Floats Load(const Float16* from) { return {_mm512_cvtph_ps(Bits(from))}; }
  void Store(float* to) const { _mm512_storeu_ps(to, all); }
  Floats Abs() const { return {_mm512_abs_ps(all)}; }
  friend Floats operator+(const Floats& x, const Floats& y) {
    return {_mm512_add_ps(x.all, y.all)};
  }
  friend Floats operator-(const Floats& x, const Floats& y) {
    return {_mm512_sub_ps(x.all, y.all)};
  }
  friend Floats operator*(const Floats& x, const Floats& y) {
    return {_mm512_mul_ps(x.all, y.all)};
  }

 private:
  static __m256i Bits(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
};

struct Doubles {
  using Value = double;
  __m512d low, high;

  static Doubles Zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static Doubles Load(const double* from) {
    return {_mm512_loadu_pd(from), _mm512_loadu_pd(from + 8)};
  }
  void Store(double* to) const {
    _mm512_storeu_pd(to, low);
    _mm512_storeu_pd(to + 8, high);
  }
  Doubles Abs() const { return {_mm512_abs_pd(low), _mm512_abs_pd(high)}; }
  friend Doubles operator+(const Doubles& x, const Doubles& y) {
    return {_mm512_add_pd(x.low, y.low), _mm512_add_pd(x.high, y.high)};
  }
  friend Doubles operator-(const Doubles& x, const Doubles& y) {
    return {_mm512_sub_pd(x.low, y.low), _mm512_sub_pd(x.high, y.high)};
  }
  friend Doubles operator*(const Doubles& x, const Doubles& y) {
    return {_mm512_mul_pd(x.low, y.low), _mm512_mul_pd(x.high, y.high)};
  }
};

inline Doubles Widen(const Floats& x) {
  const __m512d as_doubles = _mm512_castps_pd(x.all);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(as_doubles, 1));
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x.all)), _mm512_cvtps_pd(high)};
}

}  // namespace
}  // namespace citi
