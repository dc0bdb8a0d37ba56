// Grouped products of top-k routing: the problems, as a backend takes them.
//
// A token has top_k slots, one for each expert that it keeps. Slots are sorted by pair (expert,
// choice); those of expert e and the choices c to d - 1 are offsets[e top_k + c] to
// offsets[e top_k + d] - 1, and slot s is that of token order[s] % T, its choice order[s] / T.
// A row of a matrix belongs to a token or to a slot.
//
// Shapes: T tokens, E experts, S slots (top_k T).
#pragma once

#include <cstdint>
#include <string>

#include "tensors.h"

namespace citi {

struct Routing {
  int64_t num_tokens;
  int64_t num_experts;
  int64_t top_k;
  Indices order;    // (S,)
  Indices offsets;  // (E top_k + 1,)

  int64_t num_slots() const { return num_tokens * top_k; }
};

struct Rows {
  Matrix matrix;
  bool are_slots;  // (S, ..); else (T, ..)
};

// For every slot of the choices, of expert e and token t:
//
//   product      = rows[slot or t] w_e
//   out[slot or t] (+)= scaling gates[t, 1 + e] product
//   dots[q, order[slot]] = scaling <factors[slot], product>, of the q-th tile of its columns
struct GroupedProduct {
  Routing routing;
  int64_t first_choice, end_choice;
  int64_t num_in, num_out;
  Rows rows;              // (.., in), bf16 or fp16, as weight and factors are
  Matrix weight;          // of all experts: each (in, out)
  bool weight_is_out_in;  // each (out, in)
  bool experts_in_rows;   // experts one below the other; else side by side
  Rows out;               // (.., out), in the dtype of rows or fp32
  bool adds;              // to what out holds
  Matrix gates;           // (T, E + 1) fp32, or none: 1
  float scaling;
  Matrix factors;  // (S, out), or none
  Vector dots;     // (tiles S,) fp32, or none
};

// For every expert e: out_e[m, n] = Σ_{s of e} left[s or its token, m] right[s or its token, n];
// zeros for an expert without slots.
struct GroupedGradient {
  Routing routing;
  int64_t num_rows, num_columns;  // of out_e
  Rows left;                      // (.., rows), bf16 or fp16, as right is
  Rows right;                     // (.., columns)
  Matrix out;                     // of all experts, in the dtype of left or fp32
  bool experts_in_rows;           // experts one below the other; else side by side
};

// What is wrong with the arguments, naming the first one, or "". num_tiles: of the dots' columns.
std::string Invalid(const GroupedProduct& product, int64_t num_tiles);
std::string Invalid(const GroupedGradient& gradient);

}  // namespace citi
