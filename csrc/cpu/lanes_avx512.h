// Sixteen numbers side by side in registers of 512 bits. See lanes.h.
#pragma once

#include <immintrin.h>

#include "cpu/lanes_sse.h"
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
  static Floats Broadcast(float value) { return {_mm512_set1_ps(value)}; }
  void Store(float* to) const { _mm512_storeu_ps(to, all); }
  void Store(BFloat16* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), Bits16(all));
  }
  Floats Abs() const { return {_mm512_abs_ps(all)}; }
  float Sum() const {
    const __m512 by_8 = _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, 0x4e));
    const __m512 by_4 = _mm512_add_ps(by_8, _mm512_shuffle_f32x4(by_8, by_8, 0xb1));
    return SumOfFour(_mm512_castps512_ps128(by_4));
  }
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
#if defined(CITI_AVX512_BF16)
  // Subnormal results become 0.
  static __m256i Bits16(__m512 x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    __m256i bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return bits;
  }
#else
  // As Rounded<BFloat16>.
  static __m256i Bits16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i top = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i nan = _mm512_or_si512(top, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, nearest, nan));
  }
#endif
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

inline Floats MultiplyAdd(const Floats& x, const Floats& y, const Floats& sum) {
  return {_mm512_fmadd_ps(x.all, y.all, sum.all)};
}

inline Doubles Widen(const Floats& x) {
  const __m512d as_doubles = _mm512_castps_pd(x.all);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(as_doubles, 1));
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(x.all)), _mm512_cvtps_pd(high)};
}

}  // namespace
}  // namespace citi
