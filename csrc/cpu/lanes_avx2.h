// Sixteen numbers side by side in registers of 256 bits. See lanes.h.
#pragma once

#include <immintrin.h>

#include "cpu/lanes_sse.h"
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
  static Floats Broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  void Store(float* to) const {
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
  }
  void Store(BFloat16* to) const {
    // Packing takes 128 bits of one and of the other in turn; the permutation puts them in order.
    const __m256i packed = _mm256_packus_epi32(Bits16(low), Bits16(high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  Floats Abs() const {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, low), _mm256_andnot_ps(sign, high)};
  }
  float Sum() const {
    const __m256 by_8 = _mm256_add_ps(low, high);
    return SumOfFour(_mm_add_ps(_mm256_castps256_ps128(by_8), _mm256_extractf128_ps(by_8, 1)));
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
  // As Rounded<BFloat16>, in the low half of each entry.
  static __m256i Bits16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i top = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(nearest, nan, is_nan);
  }
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

inline Floats MultiplyAdd(const Floats& x, const Floats& y, const Floats& sum) {
  return {_mm256_fmadd_ps(x.low, y.low, sum.low), _mm256_fmadd_ps(x.high, y.high, sum.high)};
}

inline Doubles Widen(const Floats& x) {
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x.low)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(x.low, 1)),
           _mm256_cvtps_pd(_mm256_castps256_ps128(x.high)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(x.high, 1))}};
}

}  // namespace
}  // namespace citi
