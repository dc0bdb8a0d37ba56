// The base product with its K dimension longer by the rank: the problem as the kernels take it.
//
//   linear layer     y (T, N)  = x (T, K) weight (N, K)ᵀ + bias (N,) + u (T, R) b (N, R)ᵀ
//   input gradient   dx (T, K) = dy (T, N) weight (N, K) + dz (T, Z) stack (Z, K)
//
// bf16 or fp16, one dtype for all; sums in fp32, one rounding at the store. Without an extension
// (R or Z 0) a plain GEMM. Every matrix is contiguous in its columns, starts at a multiple of 16
// bytes and has rows a multiple of 16 bytes apart: a rank-sized matrix whose width is no multiple
// of 8 lies in wider rows, and what lies beyond its width is never read.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tensors.h"

namespace citi {

constexpr int64_t kMaxExtension = 256;
constexpr int64_t kTmaAlignment = 16;

// In which order tiles are made, and what L2 keeps; the result is the same.
struct GemmOrder {
  int64_t group_rows;  // tiles of rows that go through all columns together; 0: as measured best
  bool keeps_right;    // L2 keeps right rather than out
};
constexpr int64_t kMaxGroupRows = 1024;

// out (rows, columns) = left (rows, depth) · right + more_left (rows, more) · more_right + bias
struct ExtendedGemm {
  bool is_input_gradient;  // right is (depth, columns), more_right (more, columns); no bias
  int64_t num_rows;
  int64_t num_columns;
  int64_t depth;
  int64_t more;
  Matrix left;
  Matrix right;
  Vector bias;        // or none
  Matrix more_left;   // not looked at where more is 0
  Matrix more_right;  // not looked at where more is 0
  Matrix out;         // overwritten
  GemmOrder order;
};

// The problem of a linear layer, or of its input gradient.
ExtendedGemm LinearProblem(int64_t num_tokens, int64_t num_in, int64_t num_out, int64_t rank);
ExtendedGemm InputGradientProblem(int64_t num_tokens, int64_t num_in, int64_t num_out,
                                  int64_t rank);

// What is wrong with the arguments, naming the first one as Python does, or "".
std::string Invalid(const ExtendedGemm& gemm);

// As Python names an operand.
struct ExtendedGemmNames {
  const char* left;
  const char* right;
  const char* more_left;
  const char* more_right;
  const char* out;
};
ExtendedGemmNames NamesOf(const ExtendedGemm& gemm);

// The memory of the operands, out's first; without more_left, of which a kernel may write more.
std::vector<Named> TensorsOf(const ExtendedGemm& gemm);

}  // namespace citi
