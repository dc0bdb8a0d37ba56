// How the correction of library products is laid out on a GPU: 2 R N bytes read for each share of
// the tokens, for N columns and stacked rank R; more only where there is a NaN or inf.
#pragma once

#include "cuda/non_finite_kernels.h"
#include "cuda/skinny_plan.h"
#include "skinny_arguments.h"
#include "whole_numbers.h"

namespace citi {

constexpr int64_t kNonFiniteShares = 16;

struct NonFinitePlan {
  int64_t num_blocks;
  NonFiniteLaunch launch;
};

inline NonFinitePlan PlanNonFinite(const NonFiniteArguments& s) {
  const int64_t num_tokens = s.shape.num_tokens;
  NonFinitePlan plan{};
  NonFiniteLaunch& launch = plan.launch;
  launch.num_tiles = CeilDiv(s.num_columns, kNonFiniteThreads);
  launch.tokens_per_share = CeilDiv(num_tokens, std::min(num_tokens, kNonFiniteShares));
  plan.num_blocks = launch.num_tiles * CeilDiv(num_tokens, launch.tokens_per_share);
  launch.out = s.out.data;
  launch.left = s.left.data, launch.right = s.right.data;
  launch.probs = static_cast<const float*>(s.probs.data);
  launch.num_tokens = num_tokens, launch.num_columns = s.num_columns;
  launch.left_stride = s.left.row_stride;
  launch.right_row_stride = s.right.row_stride;
  launch.right_column_stride = s.right.column_stride;
  launch.num_ranks = static_cast<int>(s.shape.num_ranks());
  launch.num_gates = static_cast<int>(s.shape.num_gates());
  launch.expert_rank = static_cast<int>(s.shape.expert_rank);
  launch.has_dropout = s.dropout.has_value();
  launch.dropout = s.dropout.value_or(kNoDropout);
  return plan;
}

}  // namespace citi
