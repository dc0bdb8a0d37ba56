// Importance scores that need no weight gradient: the problem, as every backend takes it.
//
//   scores[s] += Σ_{t valid} | Σ_{f in segment s} (a[t, f] - offset[f]) · b[t, f] |
//   is_signed:   the same without the absolute value
//
// Products and dots are formed in fp32, or in fp64 where a or b is fp64; sums over tokens in fp64.
// Two stages, no atomics: tokens are cut into parts by the shape alone, whatever the machine and
// the number of threads; parts are added in order.
#pragma once

#include <cstdint>
#include <string>

#include "tensors.h"

namespace citi {

struct RowDots {
  int64_t num_tokens;
  int64_t num_features;
  Vector scores;  // (S,) fp64 or fp32, changed in place; S divides num_features
  Matrix a;       // (T, F)
  Matrix b;       // (T, F)
  Vector valid;   // (T,) bool, or none
  Vector offset;  // (F,) in the dtype of the dots, or none
  bool is_signed;
  Vector parts;  // (num_parts * S,) fp64, overwritten

  int64_t num_segments() const { return scores.size; }
  bool is_double() const { return a.dtype == DType::kFloat64 || b.dtype == DType::kFloat64; }
};

// What is wrong with the arguments, naming the first one, or "". num_parts: of the backend.
std::string Invalid(const RowDots& dots, int64_t num_parts);

}  // namespace citi
