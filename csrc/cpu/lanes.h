// Sixteen numbers side by side: `Floats` and `Doubles`, as the including file was compiled.
//
// The order of every sum is that of these lanes, and no multiplication is contracted with an
// addition, so that all variants give the same bits; but for `MultiplyAdd`, which rounds once where
// the CPU can. Everything has internal linkage: a function
// that the linker took from the AVX512 variant would be the end of the others on an older CPU.
#pragma once

#if defined(CITI_AVX512)
#include "cpu/lanes_avx512.h"
#elif defined(CITI_AVX2)
#include "cpu/lanes_avx2.h"
#else
#include "cpu/lanes_portable.h"
#endif

namespace citi {
namespace {

constexpr int64_t kLanes = 16;

// Fewer than 16 elements; the other lanes are 0.
template <class L, class Element>
inline L LoadTail(const Element* from, int64_t n) {
  Element padded[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = from[i];
  return L::Load(padded);
}

}  // namespace
}  // namespace citi
