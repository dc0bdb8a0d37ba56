// MOLoRA besides the linear layer it sits on: the problem, as the CPU backend takes it.
//
//   forward    h = a x    gate = softmax(router x)    u = scaling h ⊙ repeat(gate[1:], r)
//              y += b u; of few tokens also y = weight x + bias + b u
//   backward   du = bᵀ dy    dgate_i = scaling <h_i, du_i> + dgate_sums_i
//              dz = [scaling du ⊙ repeat(gate[1:], r); gate ⊙ (dgate - <gate, dgate>)]
//              dx += [a; router]ᵀ dz    db = dyᵀ u    [da; drouter] = dzᵀ x
//
// With dropout a sees keep ⊙ x / (1 - p), and what it sends back to dx goes the same way. router
// sees x.
//
// With top_k the gates of the other experts are 0; top_k.h says how probs tell. Those of the experts
// that stay are as they were, or with `renormalizes` the softmax over them and the backbone. What is
// not finite in b, forward, or in a, backward, reaches tokens that dropped its expert as well: such
// parameters are not for here (cpu/molora.h, IsFinite).
//
// x, dy, y, dx, h, weight and bias share one dtype, fp32 or bf16; a, b, router and their gradients
// each have one of these. Sums, gates and softmax are fp32. u and dz are rounded to the dtype of x.
//
// Shapes: T tokens, K in-features, N out-features, E experts, R stacked rank (E·r), G = E + 1,
// Z = R + G.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "dropout.h"
#include "tensors.h"

namespace citi {

constexpr int64_t kMaxStackedRank = 128;
// Of z; an expert has a rank of at least 1.
constexpr int64_t kMaxMoloraRows = 2 * kMaxStackedRank + 1;
// Few tokens, without dropout, have kernels of their own in the forward: row by row of the
// parameters up to kFewTokens, in fp32 with a lane of a register for each up to kLaneTokens, which
// begins at kFewestInLanes or later, by the variant. Each sums in an order of its own: a token among
// so many and the same token among more are equal within rounding, not in bits.
constexpr int64_t kFewTokens = 8;
constexpr int64_t kLaneTokens = 16;
constexpr int64_t kFewestInLanes = 5;

// Static, as in dtype.h.
static constexpr int64_t MostFewTokens(DType dtype) {
  return dtype == DType::kFloat32 ? kLaneTokens : kFewTokens;
}

struct MoloraSizes {
  int64_t num_tokens;
  int64_t num_in;
  int64_t num_out;
  int64_t num_experts;
  int64_t stacked_rank;  // divisible by num_experts

  int64_t num_gates() const { return num_experts + 1; }
  int64_t num_rows() const { return stacked_rank + num_gates(); }
};

struct MoloraForward {
  MoloraSizes sizes;
  float scaling;
  int64_t top_k;  // experts that a token keeps; 0: all
  bool renormalizes;
  std::optional<Dropout> dropout;
  Matrix x;          // (T, K)
  Matrix a;          // (R, K)
  Matrix b;          // (N, R)
  Matrix router;     // (G, K)
  Matrix y;          // (T, N), changed in place
  bool has_base;     // whether y is added to; otherwise it is overwritten
  Matrix weight;     // (N, K), contiguous rows, or none; few tokens alone, without has_base
  Vector bias;       // (N), or none; needs weight
  Vector h;          // (T, R), overwritten, or none
  Vector probs;      // (T, G) fp32, overwritten, or none
  Vector workspace;  // fp32, MoloraForwardWorkspace entries; none where these are 0

  bool is_of_few() const { return sizes.num_tokens <= MostFewTokens(x.dtype) && !dropout; }
};

struct MoloraBackward {
  MoloraSizes sizes;
  float scaling;
  std::optional<Dropout> dropout;
  Matrix dy;         // (T, N); none where y took no part in the loss
  Matrix x;          // (T, K); none where neither da nor drouter is asked for
  Matrix a;          // (R, K)
  Matrix b;          // (N, R)
  Matrix router;     // (G, K)
  Vector h;          // (T, R)
  Vector probs;      // (T, G) fp32
  Vector dgate;      // (T, G) fp32, what the gate sums send back, or none
  Matrix dx;         // (T, K), changed in place, or none
  bool has_base;     // whether dx is added to; otherwise it is overwritten
  Vector da;         // (R, K), overwritten, or none
  Vector db;         // (N, R), overwritten, or none; needs dy
  Vector drouter;    // (G, K), overwritten, or none
  Vector workspace;  // fp32, MoloraBackwardWorkspace entries
};

// What is wrong with the arguments, naming the first one, or "". Sizes may be 0, but experts.
std::string Invalid(const MoloraSizes& sizes);
// Of those that are not null.
std::string InvalidFactors(const MoloraSizes& sizes, const Matrix* a, const Matrix* b);
std::string Invalid(const MoloraForward& forward, int64_t workspace_size);
std::string Invalid(const MoloraBackward& backward, int64_t workspace_size);

}  // namespace citi
