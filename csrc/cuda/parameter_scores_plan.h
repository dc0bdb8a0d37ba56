// How parameter scores are laid out on a GPU: pure arithmetic, also used where there is none.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/parameter_scores_sums.h"
#include "parameter_scores_arguments.h"

namespace citi {

// A weight of fewer large tiles is cut into small ones: an H100 has 132 multiprocessors. Assumed.
constexpr int64_t kMinLargeTiles = 132;
// Scores of a block of AddScoreSums, if their segments are short.
constexpr int64_t kMaxScoresOfBlock = 64;

// A weight as tiles, and the sums of these.
struct TilesOfWeight {
  bool is_large;
  int64_t down, across;

  int64_t count() const { return down * across; }
  int64_t NumParts(const ParameterScores& problem) const {
    switch (problem.granularity()) {
      case Granularity::kComponent:
        return count();
      case Granularity::kRows:
        return across * problem.num_out;
      case Granularity::kColumns:
        return down * problem.num_in;
      case Granularity::kElements:
        return 0;
    }
    return 0;
  }
};

inline TilesOfWeight CutIntoTiles(const ParameterScores& problem, bool is_large) {
  const int64_t size = is_large ? LargeTile::kSize : SmallTile::kSize;
  return {is_large, (problem.num_out - 1) / size + 1, (problem.num_in - 1) / size + 1};
}

inline TilesOfWeight PlanTiles(const ParameterScores& problem) {
  const TilesOfWeight large = CutIntoTiles(problem, true);
  return large.count() >= kMinLargeTiles ? large : CutIntoTiles(problem, false);
}

struct ParameterScoresPlan {
  ParameterScoresLaunch launch;
  TilesOfWeight tiles;
  bool is_aligned;  // AlignedRows of g's dtype; else AnyRows
  // Of AddScoreSums.
  int64_t num_scores, length, num_summands;
  int scores_of_block;
};

inline bool AreRowsAligned(const Matrix& matrix, int64_t num_columns) {
  const int64_t size = SizeOf(matrix.dtype);
  return reinterpret_cast<uintptr_t>(matrix.data) % kChunkBytes == 0 && matrix.column_stride == 1 &&
         matrix.row_stride * size % kChunkBytes == 0 && num_columns * size % kChunkBytes == 0;
}

// The largest power of two that is at most x.
inline int64_t PowerOfTwoWithin(int64_t x) {
  int64_t power = 1;
  while (power <= x / 2) power *= 2;
  return power;
}

inline void PlanSums(const ParameterScores& problem, ParameterScoresPlan* plan) {
  const TilesOfWeight& tiles = plan->tiles;
  plan->num_scores = problem.num_row_segments * problem.num_column_segments;
  if (problem.granularity() == Granularity::kElements) return;
  plan->num_summands = tiles.NumParts(problem) / plan->num_scores;
  plan->length = tiles.count();
  if (problem.granularity() == Granularity::kRows) {
    plan->length = problem.num_out / problem.num_row_segments;
  } else if (problem.granularity() == Granularity::kColumns) {
    plan->length = problem.num_in / problem.num_column_segments;
  }
  const int64_t most = std::max(int64_t{1}, kMaxScoresOfBlock / plan->length);
  plan->scores_of_block = static_cast<int>(PowerOfTwoWithin(std::min(plan->num_scores, most)));
}

inline ParameterScoresPlan PlanParameterScores(const ParameterScores& problem,
                                               const TilesOfWeight& tiles) {
  ParameterScoresPlan plan{};
  plan.tiles = tiles;
  plan.is_aligned = problem.g.dtype == problem.x.dtype &&
                    AreRowsAligned(problem.g, problem.num_out) &&
                    AreRowsAligned(problem.x, problem.num_in);
  PlanSums(problem, &plan);

  ParameterScoresLaunch& launch = plan.launch;
  launch.g = {problem.g.data, problem.g.row_stride, problem.g.column_stride, problem.num_out,
              problem.g.dtype};
  launch.x = {problem.x.data, problem.x.row_stride, problem.x.column_stride, problem.num_in,
              problem.x.dtype};
  launch.valid = static_cast<const uint8_t*>(problem.valid.data);
  launch.num_tokens = problem.num_tokens;
  launch.weight = problem.weight.data;
  launch.weight_stride_n = problem.weight.row_stride;
  launch.weight_stride_k = problem.weight.column_stride;
  launch.weight_dtype = problem.weight.dtype;
  launch.is_per_token = problem.is_per_token;
  launch.scale = problem.scale;
  launch.granularity = problem.granularity();
  launch.scores_dtype = problem.scores.dtype;
  launch.scores = problem.scores.data;
  launch.parts = static_cast<float*>(problem.parts.data);
  launch.seed = problem.seed;
  // Of more tiles than a grid may have, which the launch refuses, these are not used.
  launch.tiles_down = static_cast<uint32_t>(plan.tiles.down);
  launch.tiles_across = static_cast<uint32_t>(plan.tiles.across);
  return plan;
}

}  // namespace citi
