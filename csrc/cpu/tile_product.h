// Products of small tiles in registers, in terms of sixteen lanes; compiled once for each variant.
//
// Operands are words of 32 bits: an fp32 number, or two bf16 numbers that lie side by side along
// the dimension that is summed over. The left operand is broadcast, the right one lies in lanes.
#pragma once

#include "cpu/lanes.h"
#include "dtype.h"

// A tile of its own function has all registers; what it calls would send the sums through memory.
#if defined(__GNUC__)
#define CITI_NEVER_INLINE __attribute__((noinline))
#define CITI_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define CITI_NEVER_INLINE
#define CITI_ALWAYS_INLINE inline
#endif

namespace citi {
namespace {

// A tile of kTileRows x kTileVectors sums, with what they are made from, fills the registers.
#if defined(CITI_AVX512)
constexpr int kTileRows = 8;
constexpr int kTileVectors = 3;
#elif defined(CITI_AVX2)
constexpr int kTileRows = 5;
constexpr int kTileVectors = 1;
#else
constexpr int kTileRows = 2;
constexpr int kTileVectors = 1;
#endif
constexpr int64_t kTileLanes = kTileVectors * kLanes;

// One number of X, computed with in fp32.
template <class X>
struct Singles {
  using Element = X;
  using Number = float;
  using Vector = Floats;
  static constexpr int64_t kNumbers = 1;

  static Number Of(float value) { return ToFloat(Rounded<X>(value)); }
  static Number Of(BFloat16 value) { return Of(ToFloat(value)); }
  static Vector Load(const Number* from) { return Floats::Load(from); }
  static Vector Broadcast(const Number* from) { return Floats::Broadcast(*from); }
  static Floats MultiplyAdd(const Vector& x, const Vector& y, const Floats& sum) {
    return citi::MultiplyAdd(x, y, sum);
  }
};

#if defined(CITI_AVX512_BF16)
// Two numbers of bf16 in a word.
struct Pairs {
  using Element = BFloat16;
  using Number = BFloat16;
  using Vector = __m512i;
  static constexpr int64_t kNumbers = 2;

  static Number Of(float value) { return Rounded<BFloat16>(value); }
  static Number Of(BFloat16 value) { return value; }
  static Vector Load(const Number* from) { return _mm512_loadu_si512(from); }
  static Vector Broadcast(const Number* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Floats MultiplyAdd(const Vector& x, const Vector& y, const Floats& sum) {
    return {
        _mm512_dpbf16_ps(sum.all, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y))};
  }
};
#endif

// Operands of a tile, in words; row m of the left one, at depth d, is left[m * kRowStride + d *
// left_stride].
template <class Words>
struct TileOperands {
  const typename Words::Number* left;
  int64_t left_stride;
  const typename Words::Number* right;
  int64_t right_stride;
  int64_t depth;
};

// sink.Take(sums): sums[m][v] is the sum of left[m, d] * right[d, 16 v .. 16 v + 15] over d.
template <class Words, int64_t kRowStride, int kRows, int kVectors, class Sink>
CITI_NEVER_INLINE void MultiplyTile(const TileOperands<Words>& operands, const Sink& sink) {
  constexpr int64_t n = Words::kNumbers;
  const typename Words::Number* left = operands.left;
  const typename Words::Number* right = operands.right;
  const int64_t left_step = operands.left_stride * n;
  const int64_t right_step = operands.right_stride * n;
  Floats sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[m][v] = Floats::Zero();
  }
  for (int64_t d = operands.depth; d > 0; --d) {
    typename Words::Vector lanes[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) lanes[v] = Words::Load(right + v * kLanes * n);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const typename Words::Vector row = Words::Broadcast(left + m * kRowStride * n);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[m][v] = Words::MultiplyAdd(row, lanes[v], sums[m][v]);
      }
    }
    left += left_step;
    right += right_step;
  }
  sink.Take(sums);
}

// The same for up to kTileRows rows and kTileVectors vectors that are known at run time.
template <class Words, int64_t kRowStride, int kRows = kTileRows, int kVectors = kTileVectors,
          class Sink>
inline void MultiplyTile(int64_t num_rows, int64_t num_vectors, const TileOperands<Words>& operands,
                         const Sink& sink) {
  if (num_rows == kRows && num_vectors == kVectors) {
    return MultiplyTile<Words, kRowStride, kRows, kVectors>(operands, sink);
  }
  if constexpr (kVectors > 1) {
    if (num_vectors < kVectors) {
      return MultiplyTile<Words, kRowStride, kRows, kVectors - 1>(num_rows, num_vectors, operands,
                                                                  sink);
    }
  }
  if constexpr (kRows > 1) {
    MultiplyTile<Words, kRowStride, kRows - 1, kVectors>(num_rows, num_vectors, operands, sink);
  }
}

// Adds the sums to fp32 numbers in memory.
struct AddToSums {
  float* sums;
  int64_t row_stride;

  template <int kRows, int kVectors>
  CITI_ALWAYS_INLINE void Take(const Floats (&tile)[kRows][kVectors]) const {
    float* to = sums;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m, to += row_stride) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        (Floats::Load(to + v * kLanes) + tile[m][v]).Store(to + v * kLanes);
      }
    }
  }
};

// Adds the sums to a matrix, or overwrites it, with one rounding; columns end within the tile.
template <class Element>
struct AddToMatrix {
  Element* matrix;
  int64_t row_stride;
  int64_t num_columns;
  bool is_added;

  template <int kRows, int kVectors>
  CITI_ALWAYS_INLINE void Take(const Floats (&tile)[kRows][kVectors]) const {
    if (num_columns < kVectors * kLanes) return TakePart(tile);
    Element* to = matrix;
    if (is_added) {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m, to += row_stride) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          (Floats::Load(to + v * kLanes) + tile[m][v]).Store(to + v * kLanes);
        }
      }
    } else {
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m, to += row_stride) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) tile[m][v].Store(to + v * kLanes);
      }
    }
  }

 private:
  template <int kRows, int kVectors>
  CITI_ALWAYS_INLINE void TakePart(const Floats (&tile)[kRows][kVectors]) const {
    float sums[kRows][kVectors * kLanes];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) tile[m][v].Store(sums[m] + v * kLanes);
    }
    for (int m = 0; m < kRows; ++m) {
      Element* to = matrix + m * row_stride;
      for (int64_t i = 0; i < num_columns; ++i) {
        const float sum = is_added ? ToFloat(to[i]) + sums[m][i] : sums[m][i];
        to[i] = Rounded<Element>(sum);
      }
    }
  }
};

}  // namespace
}  // namespace citi
