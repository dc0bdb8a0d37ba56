// Importance of a linear component's parameters: the problem, as a backend takes it.
//
//   scores[p, q] += scale · Σ_{i in p, j in q} | W[i, j] · Σ_{t valid} g[t, i] · x[t, j] |
//   is_per_token:   of |g| and |x|
//
// x is rounded to the dtype of g; products are summed in fp32. Two stages, no atomics: the weight
// is cut into tiles by its shape alone, their sums are added in order, in fp64.
#pragma once

#include <cstdint>
#include <string>

#include "tensors.h"

namespace citi {

// What is summed: all, over the columns of each segment of rows, the other way round, nothing.
enum class Granularity : int32_t { kComponent, kRows, kColumns, kElements };

struct ParameterScores {
  int64_t num_tokens;
  int64_t num_out;
  int64_t num_in;
  int64_t num_row_segments;     // P
  int64_t num_column_segments;  // Q
  Vector scores;                // (P * Q,) fp64 or fp32, of elements also bf16; changed in place
  Matrix weight;                // (N, K)
  Matrix x;                     // (T, K)
  Matrix g;                     // (T, N)
  Vector valid;                 // (T,) bool, or none
  bool is_per_token;
  float scale;
  uint64_t seed;  // of the stochastic rounding to bf16
  Vector parts;   // (num_parts,) fp32, overwritten; none for elements

  Granularity granularity() const {
    if (num_row_segments == num_out && num_column_segments == num_in) return Granularity::kElements;
    if (num_row_segments == 1 && num_column_segments == 1) return Granularity::kComponent;
    return num_column_segments == 1 ? Granularity::kRows : Granularity::kColumns;
  }
};

// What is wrong with the sizes, or ""; the number of parts is computed from valid ones.
std::string InvalidSizes(const ParameterScores& problem);

// What is wrong with the arguments, naming the first one, or "". num_parts: of the backend.
std::string Invalid(const ParameterScores& problem, int64_t num_parts);

}  // namespace citi
