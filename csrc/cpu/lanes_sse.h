// What the lanes of AVX2 and of AVX512 end in. See lanes.h.
#pragma once

#include <immintrin.h>

namespace citi {
namespace {

// As the halves of the lanes are added: x0 + x2 + (x1 + x3).
inline float SumOfFour(__m128 x) {
  const __m128 by_2 = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(by_2, _mm_shuffle_ps(by_2, by_2, 0x1)));
}

}  // namespace
}  // namespace citi
