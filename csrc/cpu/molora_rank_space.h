// What happens to a token in the rank space: routing, and its gradient.
//
// u and dz leave in the layouts of a left operand: for Expand blocks of (depth, kMoloraTokens), for
// SumOverTokens (T, columns).
#pragma once

#include <cmath>
#include <limits>

#include "cpu/molora_passes.h"
#include "top_k.h"

namespace citi {
namespace {

// Numbers of a few tokens as Expand takes them; column j of token t of a block.
template <class Words>
struct ExpandOperand {
  typename Words::Number* numbers;
  int64_t num_columns;

  typename Words::Number* Block(int64_t begin) const {
    return numbers + begin * WordsOf<Words>(num_columns) * Words::kNumbers;
  }
  static void Put(typename Words::Number* block, int64_t t, int64_t j,
                  typename Words::Number number) {
    constexpr int64_t n = Words::kNumbers;
    block[(j / n * kMoloraTokens + t) * n + j % n] = number;
  }
  // The other number of the last word.
  void Complete(typename Words::Number* block, int64_t t) const {
    if (num_columns % Words::kNumbers != 0) Put(block, t, num_columns, {});
  }
};

// Numbers of all tokens as SumOverTokens takes them.
template <class Words>
struct SumOperand {
  typename Words::Number* numbers;
  int64_t num_columns;

  void Put(int64_t t, int64_t j, typename Words::Number number) const {
    constexpr int64_t n = Words::kNumbers;
    numbers[(t / n * num_columns + j) * n + t % n] = number;
  }
  // The other token of the last word.
  void Complete(int64_t num_tokens) const {
    if (num_tokens % Words::kNumbers == 0) return;
    for (int64_t j = 0; j < num_columns; ++j) Put(num_tokens, j, {});
  }
};

inline void Softmax(const float* logits, int64_t n, float* probs) {
  float largest = logits[0];
  for (int64_t i = 1; i < n; ++i) largest = logits[i] > largest ? logits[i] : largest;
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    probs[i] = std::exp(logits[i] - largest);
    sum += probs[i];
  }
  for (int64_t i = 0; i < n; ++i) probs[i] /= sum;
}

// Probabilities of a token, those of dropped experts marked.
inline void Probabilities(const MoloraForward& forward, const float* logits, float* probs) {
  const int64_t n = forward.sizes.num_gates();
  if (forward.top_k == 0) return Softmax(logits, n, probs);
  constexpr int kWords = CeilDiv(kMaxStackedRank + 1, 64);
  const auto kept =
      KeptEntries<kWords>(logits, static_cast<int>(n), static_cast<int>(forward.top_k));
  float those_summed[kMaxStackedRank + 1];
  for (int64_t g = 0; g < n; ++g) {
    const bool is_summed = !forward.renormalizes || kept.Has(static_cast<int>(g));
    those_summed[g] = is_summed ? logits[g] : -std::numeric_limits<float>::infinity();
  }
  Softmax(those_summed, n, probs);
  for (int64_t g = 0; g < n; ++g) {
    if (!kept.Has(static_cast<int>(g))) probs[g] = Marked(probs[g]);
  }
}

// 1 / (1 - p), which all inputs of the ranks have; 1 without dropout.
inline float InverseKeep(const std::optional<Dropout>& dropout) {
  return dropout ? dropout->inverse_keep : 1.0f;
}

// h and the gates of one token, where they are wanted, from its dot products with a and router;
// put(j, u before rounding).
template <class X, class Put>
void Route(const MoloraForward& forward, const float* dots, const float* logits, int64_t token,
           const Put& put) {
  const MoloraSizes& sizes = forward.sizes;
  X* h = static_cast<X*>(forward.h.data);
  float* probs = static_cast<float*>(forward.probs.data);
  float probs_here[kMaxStackedRank + 1];
  if (h != nullptr) h += token * sizes.stacked_rank;
  probs = probs == nullptr ? probs_here : probs + token * sizes.num_gates();
  Probabilities(forward, logits, probs);
  const float inverse_keep = InverseKeep(forward.dropout);
  const int64_t rank = sizes.stacked_rank / sizes.num_experts;
  for (int64_t e = 0, j = 0; e < sizes.num_experts; ++e) {
    const float scale = forward.scaling * probs[e + 1];
    for (const int64_t end = j + rank; j < end; ++j) {
      const X h_j = Rounded<X>(dots[j] * inverse_keep);
      if (h != nullptr) h[j] = h_j;
      put(j, IfKept(probs[e + 1], ToFloat(h_j) * scale));
    }
  }
}

// The gradient of one token's z, as the inputs that are kept see it; du is null where y took no
// part in the loss.
template <class Words>
struct RankGradient {
  const MoloraBackward& backward;
  int64_t token;
  float dz[kMaxMoloraRows];

  void Compute(const float* du) {
    using X = typename Words::Element;
    const MoloraSizes& sizes = backward.sizes;
    const int64_t num_gates = sizes.num_gates();
    const X* h = static_cast<const X*>(backward.h.data) + token * sizes.stacked_rank;
    const float* probs = static_cast<const float*>(backward.probs.data) + token * num_gates;
    float* dgate = dz + sizes.stacked_rank;
    const float* given = static_cast<const float*>(backward.dgate.data);
    for (int64_t i = 0; i < num_gates; ++i) {
      dgate[i] = given == nullptr ? 0.0f : IfKept(probs[i], given[token * num_gates + i]);
    }
    const int64_t rank = sizes.stacked_rank / sizes.num_experts;
    const float inverse_keep = InverseKeep(backward.dropout);
    for (int64_t e = 0, j = 0; e < sizes.num_experts; ++e) {
      float dot = 0.0f;
      const float scale = backward.scaling * probs[e + 1] * inverse_keep;
      if (IsMarked(probs[e + 1])) {
        for (const int64_t end = j + rank; j < end; ++j) dz[j] = 0.0f;
        continue;
      }
      for (const int64_t end = j + rank; j < end; ++j) {
        const float du_j = du == nullptr ? 0.0f : du[j];
        dot += ToFloat(h[j]) * du_j;
        dz[j] = scale * du_j;
      }
      dgate[e + 1] += backward.scaling * dot;
    }
    float mean = 0.0f;
    for (int64_t i = 0; i < num_gates; ++i) mean += probs[i] * dgate[i];
    for (int64_t i = 0; i < num_gates; ++i) dgate[i] = std::fabs(probs[i]) * (dgate[i] - mean);
  }
};

}  // namespace
}  // namespace citi
