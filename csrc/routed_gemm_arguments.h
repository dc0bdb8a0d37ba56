// The extended GEMM that makes its own extension: the problem as the kernel takes it.
//
//   linear layer     z = x stackᵀ;  probs = softmax(z[P:]), h = z[:R] rounded,
//                    u = scaling · h ⊙ repeat(probs[1:], r);  y = x weightᵀ + bias + u bᵀ
//   input gradient   du = dy b;  dz = [dh | dlogits], from du, h, probs and dgate;
//                    dx = dy weight + dz stack
//
// Every expert is kept, and there is no dropout. Elements as in extended_gemm_arguments.h; probs
// and dgate are fp32. T tokens, E experts, r rank, R = E·r, G = E + 1; P and Z as in
// skinny_arguments.h, Z at most 64.
#pragma once

#include <cstdint>
#include <string>

#include "extended_gemm_arguments.h"
#include "grouped_arguments.h"
#include "skinny_arguments.h"

namespace citi {

constexpr int64_t kMaxRoutedRows = 64;
// Rows of the output that one counter stands for.
constexpr int64_t kRowsOfCount = 128;

struct RoutedGemm {
  ExtendedGemm gemm;  // more_left (u or dz) is written by the kernel
  RankShape shape;
  Matrix narrow;   // stack (Z, K), or b (N, R)
  Vector h;        // (T, R); written in a linear layer, else read
  Vector probs;    // (T, G); the same
  Vector dgate;    // (T, G) of an input gradient, or none: zero
  Indices counts;  // a counter for each kRowsOfCount rows, 0 when the kernel begins
  float scaling;
  bool fits_narrow;  // products with b are no wider than needed
};

// The problem of a linear layer, or of its input gradient, without its tensors.
RoutedGemm RoutedLinearProblem(const RankShape& shape, int64_t num_in, int64_t num_out);
RoutedGemm RoutedInputGradientProblem(const RankShape& shape, int64_t num_in, int64_t num_out);

int64_t NumCounts(const RoutedGemm& routed);

// What is wrong with the arguments, naming the first one as Python does, or "".
std::string Invalid(const RoutedGemm& routed);

}  // namespace citi
