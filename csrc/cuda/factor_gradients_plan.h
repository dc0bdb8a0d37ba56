// How the gradients of low-rank factors are laid out on a GPU.
//
// Bytes, T tokens, N columns of the wide matrix (dy or x), V of the narrow one, S shares of the
// tokens, C tiles of 256 columns (128 for V > 48), elements of 2 bytes:
//   read     2 T N, once; 2 T V from L2 for each tile
//   written  4 S N V, and with du 4 C T V; both are read again by the kernels that add them
// C S is about the 132 multiprocessors. At 8192 x 4096: db and du at V = 32 read 67 MB and write
// 4 + 17 MB; da and drouter at V = 40 read 67 MB and write 5 MB.
// du grows with V: beyond 32 columns the parts of du would be as large as dy, so that du comes from
// a pass of its own over dy (Shrink), and dy is read twice.
#pragma once

#include "cuda/factor_gradients_kernels.h"
#include "cuda/skinny_plan.h"
#include "skinny_arguments.h"
#include "whole_numbers.h"

namespace citi {

struct FactorCut {
  int64_t num_tiles, num_shares, tokens_per_share;
};

struct FactorPlan {
  FactorCut cut;
  int column_tiles;  // kTiles of the kernel; 0: narrow is too wide
  int num_stages;
  int64_t num_blocks, shared_bytes;
};

inline bool GivesRanksInOnePass(int64_t num_narrow) { return num_narrow <= kUpTiles * 8; }

inline FactorCut CutFactor(int64_t num_tokens, int64_t num_columns, int column_tiles) {
  FactorCut cut{};
  cut.num_tiles = CeilDiv(num_columns, FactorColumns(column_tiles));
  const int64_t blocks = CeilDiv(num_tokens, kFactorTokens);
  const int64_t wanted = std::clamp(kSkinnyBlocks / cut.num_tiles, int64_t{1}, blocks);
  cut.tokens_per_share = CeilDiv(blocks, wanted) * kFactorTokens;
  cut.num_shares = CeilDiv(num_tokens, cut.tokens_per_share);
  return cut;
}

inline FactorPlan PlanFactor(int64_t num_tokens, int64_t num_columns, int64_t num_narrow,
                             bool gives_ranks, int64_t shared_limit, bool fits_narrow = false) {
  FactorPlan plan{};
  const bool takes_fewest = gives_ranks || (fits_narrow && num_narrow <= kUpTiles * 8);
  plan.column_tiles = takes_fewest ? kUpTiles : TilesFor(num_narrow);
  plan.cut = CutFactor(num_tokens, num_columns, plan.column_tiles);
  const int64_t stage_bytes = FactorStageBytes(plan.column_tiles);
  plan.num_stages = NumStages(stage_bytes, shared_limit);
  plan.num_blocks = plan.cut.num_tiles * plan.cut.num_shares;
  plan.shared_bytes = plan.num_stages * stage_bytes;
  return plan;
}

inline FactorLaunch AsFactorLaunch(const FactorArguments& s, const FactorPlan& plan) {
  FactorLaunch launch{};
  launch.wide = static_cast<const uint16_t*>(s.wide.data);
  launch.narrow = static_cast<const uint16_t*>(s.narrow.data);
  launch.b = static_cast<const uint16_t*>(s.b.data);
  launch.du = static_cast<float*>(s.du.data);
  launch.parts = static_cast<float*>(s.parts.data);
  launch.num_tokens = s.num_tokens;
  launch.num_columns = s.num_columns;
  launch.wide_stride = s.wide.row_stride, launch.narrow_stride = s.narrow.row_stride;
  launch.tokens_per_share = plan.cut.tokens_per_share;
  launch.num_tiles = plan.cut.num_tiles;
  launch.num_narrow = static_cast<int>(s.num_narrow);
  launch.num_ranks = static_cast<int>(s.num_ranks);
  launch.num_rank_tiles = static_cast<int>(s.rank_columns / kChunk);
  launch.num_stages = plan.num_stages;
  launch.dropout = s.dropout.value_or(kNoDropout);
  launch.counts = reinterpret_cast<const uint32_t*>(s.counts.data);
  launch.num_counts = static_cast<int>(s.counts.size);
  launch.done = reinterpret_cast<uint32_t*>(const_cast<int32_t*>(s.done.data));
  return launch;
}

}  // namespace citi
