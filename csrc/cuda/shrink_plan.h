// How the shrink is laid out on a GPU.
//
// Bytes, T tokens, K in-features, Z = R + G rows of w, elements of 2 bytes:
//   read     2 T K, once; 2 Z K from L2 for each 64 tokens
//   written  2 T R (h) + 2 T R (u) + 4 T G; with S splits of K another 4 S T Z, written and read
// At 8192 x 4096 and 40 rows: 67 MB of x, 42 MB of w from L2, 1.2 MB written. The stack w is what
// bounds wide ranks: at 192 rows it is three times x, and L2 rather than memory sets the time.
#pragma once

#include "cuda/shrink_kernels.h"
#include "cuda/skinny_plan.h"
#include "skinny_arguments.h"
#include "whole_numbers.h"

namespace citi {

struct ShrinkPlan {
  int row_tiles;  // kTiles of the kernel; 0: w has too many rows
  int num_stages;
  int64_t num_splits, tiles_per_split;
  int64_t num_blocks, shared_bytes;
  int64_t num_route_blocks, route_shared_bytes;
};

// About one block for each multiprocessor; parts cost more than idle multiprocessors do.
inline int64_t ShrinkSplits(int64_t num_tokens, int64_t num_inputs) {
  const int64_t blocks = CeilDiv(num_tokens, kShrinkTokens);
  const int64_t tiles = CeilDiv(num_inputs, kShrinkDepth);
  const int64_t wanted = std::clamp((kSkinnyBlocks + blocks / 2) / blocks, int64_t{1}, tiles);
  return CeilDiv(tiles, CeilDiv(tiles, wanted));
}

inline ShrinkPlan PlanShrink(int64_t num_tokens, int64_t num_inputs, int64_t num_rows,
                             int64_t shared_limit) {
  ShrinkPlan plan{};
  plan.row_tiles = TilesFor(num_rows);
  const int64_t stage_bytes = ShrinkStageBytes(plan.row_tiles);
  plan.num_stages = NumStages(stage_bytes, shared_limit);
  plan.num_splits = ShrinkSplits(num_tokens, num_inputs);
  plan.tiles_per_split = CeilDiv(CeilDiv(num_inputs, kShrinkDepth), plan.num_splits);
  plan.num_blocks = CeilDiv(num_tokens, kShrinkTokens) * plan.num_splits;
  plan.shared_bytes = plan.num_stages * stage_bytes;
  plan.num_route_blocks = CeilDiv(num_tokens, kRouteTokens);
  plan.route_shared_bytes = kRouteTokens * (num_rows + 1) * int64_t{sizeof(float)};
  return plan;
}

inline RouteLaunch AsRouteLaunch(const ShrinkArguments& s) {
  RouteLaunch route{};
  route.h = s.h.data, route.u = s.u.data;
  route.probs = static_cast<float*>(s.probs.data);
  route.num_ranks = static_cast<int>(s.shape.num_ranks());
  route.padded_ranks = static_cast<int>(s.shape.padded_ranks());
  route.num_gates = static_cast<int>(s.shape.num_gates());
  route.expert_rank = static_cast<int>(s.shape.expert_rank);
  route.top_k = s.top_k == s.shape.num_experts ? 0 : static_cast<int>(s.top_k);
  route.renormalizes = s.renormalizes;
  route.scaling = s.scaling;
  route.inverse_keep = s.dropout.value_or(kNoDropout).inverse_keep;
  return route;
}

inline ShrinkLaunch AsShrinkLaunch(const ShrinkArguments& s, const ShrinkPlan& plan) {
  ShrinkLaunch launch{};
  launch.x = static_cast<const uint16_t*>(s.x.data);
  launch.w = static_cast<const uint16_t*>(s.stack.data);
  launch.parts = plan.num_splits > 1 ? static_cast<float*>(s.parts.data) : nullptr;
  launch.num_tokens = s.shape.num_tokens;
  launch.num_inputs = s.num_inputs;
  launch.x_stride = s.x.row_stride;
  launch.num_rows = static_cast<int>(s.shape.num_rows());
  launch.num_rank_tiles = static_cast<int>(s.shape.padded_ranks() / kChunk);
  launch.num_splits = plan.num_splits, launch.tiles_per_split = plan.tiles_per_split;
  launch.num_stages = plan.num_stages;
  launch.dropout = s.dropout.value_or(kNoDropout);
  launch.route = AsRouteLaunch(s);
  return launch;
}

inline ShrinkLaunch AsShrinkLaunch(const RowProductArguments& s, const ShrinkPlan& plan) {
  ShrinkLaunch launch{};
  launch.x = static_cast<const uint16_t*>(s.wide.data);
  launch.w = static_cast<const uint16_t*>(s.rows.data);
  launch.parts = static_cast<float*>(s.parts.data);
  launch.num_tokens = s.num_tokens;
  launch.num_inputs = s.num_columns;
  launch.x_stride = s.wide.row_stride;
  launch.num_rows = static_cast<int>(s.num_rows);
  launch.num_splits = plan.num_splits, launch.tiles_per_split = plan.tiles_per_split;
  launch.num_stages = plan.num_stages;
  launch.dropout = kNoDropout;
  return launch;
}

}  // namespace citi
