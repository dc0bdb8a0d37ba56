// The skinny passes of a MOLoRA layer: their arguments, and what can be known to be wrong.
//
// Elements of x, dy and what is rank-sized are bf16 or fp16, one dtype in a call; probabilities,
// parts and gradients of gates are fp32. Outputs and workspaces overlap nothing.
// T tokens, K in-features, N out-features, E experts, r rank, R = E·r, G = E + 1; R_pad and G_pad
// are multiples of 8, Z = R_pad + G_pad.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "dropout.h"
#include "tensors.h"

namespace citi {

// Beyond these the stack [a; router] is a matrix of ordinary size, and libraries are good at it;
// the passes here would be bound by its copies in L2, not by x.
constexpr int64_t kMaxSkinnyRanks = 128;
constexpr int64_t kMaxSkinnyGates = 64;

inline int64_t Padded(int64_t size) { return (size + 7) / 8 * 8; }

// T, E, r.
struct RankShape {
  int64_t num_tokens, num_experts, expert_rank;

  int64_t num_ranks() const { return num_experts * expert_rank; }
  int64_t padded_ranks() const { return Padded(num_ranks()); }
  int64_t num_gates() const { return num_experts + 1; }
  int64_t padded_gates() const { return Padded(num_gates()); }
  int64_t num_rows() const { return padded_ranks() + padded_gates(); }
};

// A matrix that becomes rows of a larger one.
struct PackedMatrix {
  Matrix matrix;  // (rows, columns), any strides; fp32, bf16 or fp16
  int64_t first_row, num_rows, num_columns;
};

// out = the sources, each from its first row and column 0 on, rounded to out's dtype; zeros
// elsewhere.
struct PackArguments {
  int64_t num_rows, num_columns;  // columns a multiple of 8
  std::vector<PackedMatrix> sources;
  Vector out;          // (rows, columns)
  Indices zeros = {};  // become 0, or none
};

// gate = softmax(router x), h = a x, u = scaling · h ⊙ repeat(gate[1:], r).
struct ShrinkArguments {
  RankShape shape;
  int64_t num_inputs;
  Matrix x;       // (T, K), rows aligned to 16 bytes
  Vector stack;   // (Z, K): a, zeros up to R_pad, router, zeros
  Vector h;       // (T, R)
  Vector u;       // (T, R_pad)
  Vector probs;   // (T, G), sign bit set where the expert is dropped
  Vector parts;   // (splits, T, Z); none for one split
  int64_t top_k;  // 0: all experts are kept
  bool renormalizes;
  float scaling;
  std::optional<Dropout> dropout;
};

// parts[s] of wide · rowsᵀ: du = dy b in a pass of its own.
struct RowProductArguments {
  int64_t num_tokens, num_columns, num_rows;
  Matrix wide;   // (T, N), rows aligned to 16 bytes
  Vector rows;   // (V, N), V a multiple of 8
  Vector parts;  // (splits, T, V)
};

// parts[s] of wideᵀ · narrow over the tokens, and parts of wide · b.
struct FactorArguments {
  int64_t num_tokens, num_columns;
  int64_t num_narrow;    // V, a multiple of 8
  int64_t num_ranks;     // columns of b; 0 without it
  int64_t rank_columns;  // the first columns of narrow, which see wide with dropout
  Matrix wide;           // (T, N), rows aligned to 16 bytes
  Matrix narrow;         // (T, V), rows aligned to 16 bytes
  Vector b;              // (N, R), or none
  Vector du;             // (tiles, T, V), or none
  Vector parts;          // (shares, N, V)
  std::optional<Dropout> dropout;
  // Beside the kernel that makes narrow: its counts, and which parts are there, zeros before.
  // Behind both, without counts: the parts that are not there yet.
  Indices counts = {};
  Indices done = {};         // (tiles · shares), or none: all parts are made
  bool fits_narrow = false;  // products with narrow are no wider than needed
};

// u from h and the gates.
struct ScaleArguments {
  RankShape shape;
  Vector h;      // (T, R)
  Vector probs;  // (T, G)
  Vector u;      // (T, R_pad)
  float scaling;
};

// dz = [dh | dlogits] from the parts of du and what comes in from the gate sums.
struct RankArguments {
  RankShape shape;
  int64_t num_parts;  // C
  Vector du;          // (C, T, R_pad), or none: zero
  Vector h;           // (T, R)
  Vector probs;       // (T, G)
  Vector dgate;       // (T, G), or none: zero
  Vector dz;          // (T, Z)
  float scaling;
};

// One tensor of a sum: columns [first, first + count) of every row.
struct SumOutput {
  Vector out;  // (rows, count), or (count, rows) where it is transposed; fp32, bf16 or fp16
  int64_t first, count;
  bool is_transposed;
};

// Parts of gradients added in order.
struct SumArguments {
  int64_t num_parts, num_rows, num_columns;
  Vector parts;  // (C, rows, columns)
  std::vector<SumOutput> outputs;
};

// dx += dz [a; router], dropout over the part of a.
struct InputUpdateArguments {
  RankShape shape;
  int64_t num_inputs;
  Matrix dx;      // (T, K), rows aligned to 16 bytes; changed in place
  Vector dz;      // (T, Z)
  Vector stack;   // (Z, K)
  bool has_base;  // else dx is written
  Dropout dropout;
};

// out[t] += left[t] · right over the NaN and inf of right of the experts that t keeps.
struct NonFiniteArguments {
  RankShape shape;
  int64_t num_columns;
  Vector out;    // (T, N)
  Matrix left;   // (T, R)
  Matrix right;  // (R, N)
  Vector probs;  // (T, G)
  std::optional<Dropout> dropout;
};

// What is wrong with the arguments, naming the first one, or "". Counts of parts are the plan's.
std::string Invalid(const RankShape& shape);
std::string Invalid(const PackArguments& arguments);
std::string Invalid(const ShrinkArguments& arguments, int64_t num_splits);
std::string Invalid(const RowProductArguments& arguments, int64_t num_splits);
std::string Invalid(const FactorArguments& arguments, int64_t num_tiles, int64_t num_shares);
std::string Invalid(const ScaleArguments& arguments);
std::string Invalid(const RankArguments& arguments);
std::string Invalid(const SumArguments& arguments);
std::string Invalid(const InputUpdateArguments& arguments);
std::string Invalid(const NonFiniteArguments& arguments);

// A size that the plans take: positive, small enough for their products.
std::string InvalidSize(const std::string& name, int64_t size, int64_t most);

}  // namespace citi
