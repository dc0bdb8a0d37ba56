// A MOLoRA layer on Hopper in one call: its arguments, and what can be known to be wrong.
//
// Every expert is kept, and there is no dropout. T, K, N, E, r, R, G, P and Z as in
// skinny_arguments.h.
#pragma once

#include <cstdint>
#include <string>

#include "skinny_arguments.h"

namespace citi {

// K and N are multiples of 8.
struct LayerShape {
  RankShape ranks;
  int64_t num_in, num_out;
};

// Matrices as the GEMMs take them (16-bit, rows at multiples of 16 bytes); a, b and router of any
// strides, fp32 too.
struct LayerForward {
  LayerShape shape;
  bool is_routed;
  float scaling;
  Matrix x, weight;
  Vector bias;  // or none
  Matrix a, b, router;
  Vector y;      // (T, N)
  Vector h;      // (T, R)
  Vector probs;  // (T, G)
};

struct LayerBackward {
  LayerShape shape;
  bool is_routed;
  float scaling;
  Matrix dy;
  Matrix x;  // not looked at without da and drouter
  Matrix weight, a, b, router;
  Vector h, probs;
  Vector dgate;            // (T, G), or none
  Vector dx;               // (T, K)
  Vector da, db, drouter;  // as the parameters, contiguous; each may be none
};

// What is wrong with what sizes follow from, or "".
std::string Invalid(const LayerShape& shape);
std::string Invalid(const LayerForward& layer);
std::string Invalid(const LayerBackward& layer);

// What is written that overlaps something else, or "": passes run beside others. Of a layer whose
// passes are known to be valid; without data a workspace is left out.
std::string InvalidOverlap(const LayerForward& layer, const Vector& workspace);
std::string InvalidOverlap(const LayerBackward& layer, const Vector& workspace);

}  // namespace citi
