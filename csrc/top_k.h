// Which experts a token keeps with top_k, and how its probabilities say so.
//
// A marked probability, of an expert that was dropped, has the sign bit set: one tensor says both.
// A NaN is never marked. Gate entry 0 is the backbone's, which is always kept; G = E + 1 entries.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace citi {

// In the order in which torch.sort has fp32: NaN the largest, -0 equal to 0.
CITI_HOST_DEVICE static inline int32_t Sortable(float logit) {
  if (logit != logit) return 0x7fffffff;
  if (logit == 0.0f) return 0;
  const auto bits = static_cast<int32_t>(BitsOfFloat(logit));
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

CITI_HOST_DEVICE static inline bool IsMarked(float prob) {
  return (BitsOfFloat(prob) & 0x80000000u) != 0 && prob == prob;
}

CITI_HOST_DEVICE static inline float Marked(float prob) {
  return prob == prob ? FloatOfBits(BitsOfFloat(prob) | 0x80000000u) : prob;
}

CITI_HOST_DEVICE static inline float IfKept(float gate, float value) {
  return IsMarked(gate) ? 0.0f : value;
}

// Without names outside, as in dtype.h.
namespace {

// A set of gate entries.
template <int kWords>
struct GateSet {
  uint64_t words[kWords];

  CITI_HOST_DEVICE bool Has(int g) const { return (words[Word(g)] >> (g % 64) & 1) != 0; }
  CITI_HOST_DEVICE void Add(int g) { words[Word(g)] |= uint64_t{1} << (g % 64); }

 private:
  CITI_HOST_DEVICE static int Word(int g) { return kWords == 1 ? 0 : g / 64; }
};

// The entries that are kept; all with a top_k of 0. Ties go to the lowest index. Logits are anything
// with [g].
template <int kWords, class Logits>
CITI_HOST_DEVICE inline GateSet<kWords> KeptEntries(Logits logits, int num_gates, int top_k) {
  GateSet<kWords> kept;
  for (int i = 0; i < kWords; ++i) kept.words[i] = top_k == 0 ? ~uint64_t{0} : uint64_t{0};
  if (top_k == 0) return kept;
  kept.Add(0);
  for (int choice = 0; choice < top_k; ++choice) {
    int best = 0;
    int32_t largest = 0;
    for (int g = 1; g < num_gates; ++g) {
      if (kept.Has(g)) continue;
      const int32_t image = Sortable(logits[g]);
      if (best == 0 || image > largest) best = g, largest = image;
    }
    kept.Add(best);
  }
  return kept;
}

}  // namespace
}  // namespace citi
