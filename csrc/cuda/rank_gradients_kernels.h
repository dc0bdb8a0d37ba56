// Device code of the backward in rank space, and of the sums that end two-stage reductions.
//
//   ScaleRanks      u = scaling * h ⊙ repeat(gate[1:], r), as the forward had it
//   RankGradients   from the parts of du to dz = [dh | dlogits]:
//       dh       = scaling * du ⊙ repeat(gate[1:], r)
//       dgate_i  = scaling * <h_i, du_i>  (+ what comes in from the gate sums);
//                  0 for dropped experts
//       dlogits  = gate ⊙ (dgate - <gate, dgate>)
//   SumShares       parts of parameter gradients, added in order
//
// Also compiled as plain C++ by a test. T tokens, R stacked rank, R_pad and Z multiples of 8,
// G gate entries (E + 1), C parts.
#pragma once

#include "cuda/route_kernels.h"

namespace citi {

constexpr int kRankThreads = 128;
constexpr int kRankTokens = 16;
constexpr int kRanksAtOnce = 4;  // of one thread
constexpr int kSumThreads = 256;
constexpr int kMaxTargets = 2;

struct RankLaunch {
  const float* du;     // (C, T, R_pad); null: du is 0
  const void* h;       // (T, R)
  const float* probs;  // (T, G), marked
  const float* dgate;  // (T, G), what comes in from the gate sums; null: 0
  void* u;             // (T, R_pad)
  void* dz;            // (T, Z): dh, zeros up to R_pad, dlogits, zeros up to Z
  int64_t num_tokens, num_parts;
  int num_ranks, padded_ranks, num_gates, padded_gates;
  int expert_rank;
  float scaling;
};

// Grid: T * R_pad elements.
template <class Element>
__global__ void __launch_bounds__(kSumThreads) ScaleRanks(const RankLaunch s) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t t = i / s.padded_ranks;
  if (t >= s.num_tokens) return;
  const int rank = static_cast<int>(i % s.padded_ranks);
  float scaled = 0.0f;
  if (rank < s.num_ranks) {
    const float gate = s.probs[t * s.num_gates + 1 + rank / s.expert_rank];
    const float h = ToFloat(static_cast<const Element*>(s.h)[t * s.num_ranks + rank]);
    scaled = IfKept(gate, h * (s.scaling * gate));
  }
  static_cast<Element*>(s.u)[i] = Rounded<Element>(scaled);
}

// du of kRanksAtOnce neighbouring ranks: the parts, in order.
__device__ inline void SumRanks(const RankLaunch& s, int64_t t, int rank, float* du) {
  for (int i = 0; i < kRanksAtOnce; ++i) du[i] = 0.0f;
  if (s.du == nullptr) return;
  const float* part = s.du + t * s.padded_ranks + rank;
#pragma unroll 8
  for (int64_t c = 0; c < s.num_parts; ++c) {
    const uint4 raw = *reinterpret_cast<const uint4*>(part + c * s.num_tokens * s.padded_ranks);
    du[0] += FloatOfBits(raw.x), du[1] += FloatOfBits(raw.y);
    du[2] += FloatOfBits(raw.z), du[3] += FloatOfBits(raw.w);
  }
}

// Writes dh; leaves h ⊙ du in shared memory, rows padded_ranks + 1 apart.
template <class Element>
__device__ inline void GradientsOfRanks(const RankLaunch& s, int64_t first_token, int num_tokens,
                                        float* products) {
  const int groups = s.padded_ranks / kRanksAtOnce, stride = s.padded_gates + s.padded_ranks;
  for (int i = static_cast<int>(threadIdx.x); i < num_tokens * groups; i += kRankThreads) {
    const int row = i / groups, first = i % groups * kRanksAtOnce;
    const int64_t t = first_token + row;
    float du[kRanksAtOnce];
    SumRanks(s, t, first, du);
    for (int j = 0; j < kRanksAtOnce; ++j) {
      const int rank = first + j;
      float dh = 0.0f;
      if (rank < s.num_ranks && s.du != nullptr) {
        const float gate = s.probs[t * s.num_gates + 1 + rank / s.expert_rank];
        const float h = ToFloat(static_cast<const Element*>(s.h)[t * s.num_ranks + rank]);
        products[row * (s.padded_ranks + 1) + rank] = h * du[j];
        dh = IfKept(gate, du[j] * (s.scaling * gate));
      }
      static_cast<Element*>(s.dz)[t * stride + rank] = Rounded<Element>(dh);
    }
  }
}

// The gradient of one gate entry.
__device__ inline float GradientOfGate(const RankLaunch& s, int64_t t, int g,
                                       const float* products) {
  float sum = s.dgate == nullptr ? 0.0f : s.dgate[t * s.num_gates + g];
  if (g > 0 && s.du != nullptr) {
    float dot = 0.0f;
    for (int i = 0; i < s.expert_rank; ++i) dot += products[(g - 1) * s.expert_rank + i];
    sum += s.scaling * dot;
  }
  return IfKept(s.probs[t * s.num_gates + g], sum);
}

// Grid: blocks of kRankTokens tokens.
template <class Element>
__global__ void __launch_bounds__(kRankThreads) RankGradients(const RankLaunch s) {
  float* products = reinterpret_cast<float*>(SharedMemory());
  float* gradients = products + kRankTokens * (s.padded_ranks + 1);
  float* inner = gradients + kRankTokens * (s.num_gates + 1);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kRankTokens;
  const int64_t left = s.num_tokens - first_token;
  const int num_tokens = left < kRankTokens ? static_cast<int>(left) : kRankTokens;
  GradientsOfRanks<Element>(s, first_token, num_tokens, products);
  __syncthreads();
  for (int i = thread; i < num_tokens * s.num_gates; i += kRankThreads) {
    const int row = i / s.num_gates, g = i % s.num_gates;
    gradients[row * (s.num_gates + 1) + g] =
        GradientOfGate(s, first_token + row, g, products + row * (s.padded_ranks + 1));
  }
  __syncthreads();
  if (thread < num_tokens) {
    const float* probs = s.probs + (first_token + thread) * s.num_gates;
    float sum = 0.0f;
    for (int g = 0; g < s.num_gates; ++g) {
      sum += fabsf(probs[g]) * gradients[thread * (s.num_gates + 1) + g];
    }
    inner[thread] = sum;
  }
  __syncthreads();
  const int stride = s.padded_gates + s.padded_ranks;
  for (int i = thread; i < num_tokens * s.padded_gates; i += kRankThreads) {
    const int row = i / s.padded_gates, g = i % s.padded_gates;
    const int64_t t = first_token + row;
    float dlogit = 0.0f;
    if (g < s.num_gates) {
      dlogit = fabsf(s.probs[t * s.num_gates + g]) *
               (gradients[row * (s.num_gates + 1) + g] - inner[row]);
    }
    static_cast<Element*>(s.dz)[t * stride + s.padded_ranks + g] = Rounded<Element>(dlogit);
  }
}

// Columns [first, first + count) of the sum, in any layout.
struct SumTarget {
  void* out;
  DType dtype;
  int first, count;
  int64_t row_stride, column_stride;
};

struct SumLaunch {
  const float* parts;  // (C, rows, columns)
  int64_t num_parts, num_rows;
  int num_columns, num_targets;
  SumTarget targets[kMaxTargets];
};

// Grid: rows * columns elements.
static __global__ void __launch_bounds__(kSumThreads) SumShares(const SumLaunch s) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t row = i / s.num_columns;
  if (row >= s.num_rows) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t part = 0; part < s.num_parts; ++part) {
    sum += s.parts[part * s.num_rows * s.num_columns + i];
  }
  const int column = static_cast<int>(i % s.num_columns);
#pragma unroll
  for (int j = 0; j < kMaxTargets; ++j) {
    if (j == s.num_targets) break;
    const SumTarget& target = s.targets[j];
    const int in_target = column - target.first;
    if (in_target < 0 || in_target >= target.count) continue;
    const int64_t at = row * target.row_stride + in_target * target.column_stride;
    if (target.dtype == DType::kFloat32) static_cast<float*>(target.out)[at] = sum;
    if (target.dtype == DType::kBFloat16) {
      static_cast<BFloat16*>(target.out)[at] = Rounded<BFloat16>(sum);
    }
    if (target.dtype == DType::kFloat16) {
      static_cast<Float16*>(target.out)[at] = Rounded<Float16>(sum);
    }
  }
}

}  // namespace citi
