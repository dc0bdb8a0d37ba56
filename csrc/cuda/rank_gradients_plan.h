// How rank space and the second stages are laid out on a GPU.
//
// Bytes, T tokens, R stacked rank, G gate entries, C parts of du, S parts of a sum over n elements:
//   ScaleRanks      read 2 T R + 4 T G, written 2 T R
//   RankGradients   read 4 C T R + 2 T R + 4 T G, written 2 T (R + G)
//   SumShares       read 4 S n, written 2 n or 4 n
// At T 8192, R 32, C 16: 17 MB of du, which the pass before has left in L2 as far as it fits.
#pragma once

#include "cuda/rank_gradients_kernels.h"
#include "cuda/skinny_plan.h"
#include "skinny_arguments.h"
#include "whole_numbers.h"

namespace citi {

struct BlockPlan {
  int64_t num_blocks, shared_bytes;
};

inline BlockPlan PlanScaleRanks(int64_t num_tokens, int64_t padded_ranks) {
  return {CeilDiv(num_tokens * padded_ranks, kSumThreads), 0};
}

inline BlockPlan PlanRankGradients(int64_t num_tokens, int64_t padded_ranks, int64_t num_gates) {
  const int64_t floats_of_token = padded_ranks + 1 + num_gates + 1 + 1;
  return {CeilDiv(num_tokens, kRankTokens),
          kRankTokens * floats_of_token * int64_t{sizeof(float)}};
}

inline BlockPlan PlanSumShares(int64_t num_rows, int64_t num_columns) {
  return {CeilDiv(num_rows * num_columns, kSumThreads), 0};
}

inline RankLaunch AsRankLaunch(const RankShape& shape, const Vector& h, const Vector& probs,
                               float scaling) {
  RankLaunch launch{};
  launch.h = h.data;
  launch.probs = static_cast<const float*>(probs.data);
  launch.num_tokens = shape.num_tokens;
  launch.num_ranks = static_cast<int>(shape.num_ranks());
  launch.padded_ranks = static_cast<int>(shape.padded_ranks());
  launch.num_gates = static_cast<int>(shape.num_gates());
  launch.padded_gates = static_cast<int>(shape.padded_gates());
  launch.expert_rank = static_cast<int>(shape.expert_rank);
  launch.scaling = scaling;
  return launch;
}

inline RankLaunch AsRankLaunch(const ScaleArguments& s) {
  RankLaunch launch = AsRankLaunch(s.shape, s.h, s.probs, s.scaling);
  launch.u = s.u.data;
  return launch;
}

inline RankLaunch AsRankLaunch(const RankArguments& s) {
  RankLaunch launch = AsRankLaunch(s.shape, s.h, s.probs, s.scaling);
  launch.du = static_cast<const float*>(s.du.data);
  launch.num_parts = s.num_parts;
  launch.dgate = static_cast<const float*>(s.dgate.data);
  launch.dz = s.dz.data;
  return launch;
}

inline SumLaunch AsSumLaunch(const SumArguments& s) {
  SumLaunch launch{};
  launch.parts = static_cast<const float*>(s.parts.data);
  launch.num_parts = s.num_parts, launch.num_rows = s.num_rows;
  launch.num_columns = static_cast<int>(s.num_columns);
  for (const SumOutput& each : s.outputs) {
    launch.targets[launch.num_targets++] = {each.out.data,
                                            each.out.dtype,
                                            static_cast<int>(each.first),
                                            static_cast<int>(each.count),
                                            each.is_transposed ? 1 : each.count,
                                            each.is_transposed ? s.num_rows : 1};
  }
  return launch;
}

}  // namespace citi
