// From z = [a; router] x of some tokens, in shared memory, to gates, h and u.
//
//   gate = softmax(z[R_pad:])        in fp32; with top_k the gates of dropped experts are marked
//   h    = z[:R] / (1 - p)           rounded
//   u    = scaling * h ⊙ repeat(gate[1:], r)
//
// Marks: top_k.h. T tokens, R stacked rank, R_pad R rounded up to 8, G gate entries (E + 1).
#pragma once

#include <cstdint>

#include "cuda/pipeline.h"
#include "dtype.h"
#include "top_k.h"

namespace citi {

constexpr int kMaxGates = 64;  // the experts that are kept are bits of one word

struct RouteLaunch {
  void* h;       // (T, R)
  void* u;       // (T, R_pad)
  float* probs;  // (T, G)
  int num_ranks, padded_ranks, num_gates;
  int expert_rank;  // r
  int top_k;        // 0: all experts are kept
  bool renormalizes;
  float scaling, inverse_keep;
};

// Logits become marked probabilities, in place.
template <class Logits>
__device__ inline void Softmax(const RouteLaunch& r, Logits logits) {
  const GateSet<1> kept = KeptEntries<1>(logits, r.num_gates, r.top_k);
  const GateSet<1> summed = r.renormalizes ? kept : GateSet<1>{{~uint64_t{0}}};
  float largest = logits[0];
  for (int g = 1; g < r.num_gates; ++g) {
    if (summed.Has(g)) largest = fmaxf(largest, logits[g]);
  }
  float sum = 0.0f;
  for (int g = 0; g < r.num_gates; ++g) {
    logits[g] = summed.Has(g) ? expf(logits[g] - largest) : 0.0f;
    sum += logits[g];
  }
  for (int g = 0; g < r.num_gates; ++g) {
    const float prob = logits[g] / sum;
    logits[g] = kept.Has(g) ? prob : Marked(prob);
  }
}

// z [tokens, padded_ranks + num_gates], rows z_stride apart, written by threads of this block that
// have passed a barrier since. A block of kThreads threads, at least as many as tokens.
template <class Element, int kThreads>
__device__ inline void Route(const RouteLaunch& r, float* z, int z_stride, int64_t first_token,
                             int num_tokens) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < num_tokens) Softmax(r, z + thread * z_stride + r.padded_ranks);
  __syncthreads();
  for (int i = thread; i < num_tokens * r.num_gates; i += kThreads) {
    const int t = i / r.num_gates, g = i % r.num_gates;
    r.probs[first_token * r.num_gates + i] = z[t * z_stride + r.padded_ranks + g];
  }
  Element* h = static_cast<Element*>(r.h) + first_token * r.num_ranks;
  Element* u = static_cast<Element*>(r.u) + first_token * r.padded_ranks;
  for (int i = thread; i < num_tokens * r.padded_ranks; i += kThreads) {
    const int t = i / r.padded_ranks, rank = i % r.padded_ranks;
    Element scaled = Rounded<Element>(0.0f);
    if (rank < r.num_ranks) {
      const Element rounded = Rounded<Element>(z[t * z_stride + rank] * r.inverse_keep);
      const float gate = z[t * z_stride + r.padded_ranks + 1 + rank / r.expert_rank];
      h[t * r.num_ranks + rank] = rounded;
      scaled = Rounded<Element>(IfKept(gate, ToFloat(rounded) * (r.scaling * gate)));
    }
    u[i] = scaled;
  }
}

}  // namespace citi
