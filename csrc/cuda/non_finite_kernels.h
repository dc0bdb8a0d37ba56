// Device code that corrects what a library product adds to y or dx:
//
//   out[t, n] += Σ_r left[t, r] · right[r, n] over the NaN and inf of right that belong to experts
//   that the token keeps
//
// A library product reaches every token, and 0 · NaN is NaN: with top_k it gets right with its NaN
// and inf replaced by 0, and AddNonFinite brings them to the tokens that they belong to. Without
// any it reads right and nothing else.
// Also compiled as plain C++ by a test. T tokens, N columns, R stacked rank, G gate entries.
#pragma once

#include "cuda/route_kernels.h"
#include "dropout.h"

namespace citi {

constexpr int kNonFiniteThreads = 128;

struct NonFiniteLaunch {
  void* out;           // (T, N)
  const void* left;    // (T, R), rows left_stride apart
  const void* right;   // (R, N), any strides
  const float* probs;  // (T, G), marked
  int64_t num_tokens, num_columns, left_stride, right_row_stride, right_column_stride;
  int64_t num_tiles, tokens_per_share;
  int num_ranks, num_gates, expert_rank;
  bool has_dropout;
  Dropout dropout;
};

// An exponent of ones; x - x is 0 for every other.
__device__ inline bool IsNonFinite(float value) { return value - value != 0.0f; }

// What NaN and inf of a column of right add to one token; false: none of them is kept.
template <class Element>
__device__ inline bool SumNonFinite(const NonFiniteLaunch& s, int64_t t, const Element* right,
                                    float* sum) {
  const Element* left = static_cast<const Element*>(s.left) + t * s.left_stride;
  bool is_any = false;
  *sum = 0.0f;
  for (int r = 0; r < s.num_ranks; ++r) {
    const float value = ToFloat(right[r * s.right_row_stride]);
    if (!IsNonFinite(value)) continue;
    if (IsMarked(s.probs[t * s.num_gates + 1 + r / s.expert_rank])) continue;
    is_any = true;
    *sum += ToFloat(left[r]) * value;
  }
  return is_any;
}

// Grid: tiles of columns * shares of the tokens; a thread owns a column.
template <class Element>
__global__ void __launch_bounds__(kNonFiniteThreads) AddNonFinite(const NonFiniteLaunch s) {
  const int64_t n = blockIdx.x % s.num_tiles * kNonFiniteThreads + threadIdx.x;
  if (n >= s.num_columns) return;
  const Element* right = static_cast<const Element*>(s.right) + n * s.right_column_stride;
  bool is_finite = true;
  for (int r = 0; r < s.num_ranks; ++r) {
    is_finite = is_finite && !IsNonFinite(ToFloat(right[r * s.right_row_stride]));
  }
  if (is_finite) return;
  const int64_t first = blockIdx.x / s.num_tiles * s.tokens_per_share;
  for (int64_t t = first; t < first + s.tokens_per_share && t < s.num_tokens; ++t) {
    float sum;
    if (!SumNonFinite(s, t, right, &sum)) continue;
    if (s.has_dropout) {
      if (!Keeps(s.dropout, HashOfToken(s.dropout, t), n)) continue;
      sum *= s.dropout.inverse_keep;
    }
    Element* out = static_cast<Element*>(s.out) + t * s.num_columns + n;
    *out = Rounded<Element>(ToFloat(*out) + sum);
  }
}

}  // namespace citi
