// How row dots are laid out on a GPU: pure arithmetic, also used where there is none.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/row_dots_kernels.h"
#include "row_dots_arguments.h"
#include "whole_numbers.h"

namespace citi {

// Blocks that fill any GPU of today: 132 multiprocessors hold 8 of 256 threads each. Assumed.
constexpr int64_t kWantedBlocks = 1056;
// Features of one token that a block reads at a time, roughly.
constexpr int64_t kTileFeatures = 1024;
constexpr int64_t kMinTokensPerPart = 16;
// 16 MiB of sums.
constexpr int64_t kMaxPartSums = int64_t{1} << 21;
constexpr int kWarp = 32;
// Vectors of a segment for each of its lanes, if there are enough.
constexpr int64_t kVectorsPerLane = 4;
constexpr int kMaxScoresPerBlock = 32;

// The smallest power of two that is at least x, at most `most`.
inline int PowerOfTwo(int64_t x, int most) {
  int power = 1;
  while (power < x && power < most) power *= 2;
  return power;
}

inline int64_t PlanParts(int64_t num_tokens, int64_t num_features, int64_t num_segments) {
  const int64_t tiles = num_segments == 1 ? 1 : CeilDiv(num_features, kTileFeatures);
  const int64_t most = std::min(num_tokens / kMinTokensPerPart, kMaxPartSums / num_segments);
  return std::clamp(kWantedBlocks / tiles, int64_t{1}, std::max(int64_t{1}, most));
}

struct RowDotsPlan {
  RowDotsLaunch launch;
  bool is_aligned;  // AlignedElements of a's dtype; else AnyElements
  bool is_columns;  // ColumnDots; else SegmentDots
  int64_t num_parts;
  int64_t num_blocks;
  int scores_per_block;
};

inline bool RowsAreAligned(const Matrix& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % kVectorBytes == 0 &&
         matrix.column_stride == 1 && matrix.row_stride * SizeOf(matrix.dtype) % kVectorBytes == 0;
}

inline RowDotsPlan PlanRowDots(const RowDots& dots) {
  const int64_t num_segments = dots.num_segments();
  const int64_t length = dots.num_features / num_segments;
  int64_t width = kVectorBytes / SizeOf(dots.a.dtype);
  RowDotsPlan plan{};
  plan.is_columns = length == 1;
  // Segments begin at a vector; columns, and a single segment, may end within one.
  const bool segments_fit =
      num_segments == 1 || (plan.is_columns ? dots.num_features % width == 0 : length % width == 0);
  plan.is_aligned = dots.a.dtype == dots.b.dtype && segments_fit && RowsAreAligned(dots.a) &&
                    RowsAreAligned(dots.b);
  if (!plan.is_aligned) width = 1;
  plan.num_parts = PlanParts(dots.num_tokens, dots.num_features, num_segments);

  RowDotsLaunch& launch = plan.launch;
  int64_t tile_segments;
  if (plan.is_columns) {
    launch.lanes = PowerOfTwo(CeilDiv(dots.num_features, width), kWarp);
    launch.tile_threads = launch.lanes;
    tile_segments = launch.lanes * width;
  } else {
    launch.lanes = PowerOfTwo(CeilDiv(length, width * kVectorsPerLane), kWarp);
    tile_segments = PowerOfTwo(num_segments, kThreads / launch.lanes);
    launch.tile_threads = static_cast<int>(tile_segments) * launch.lanes;
  }
  const int64_t num_tiles = CeilDiv(num_segments, tile_segments);
  launch.num_tiles = static_cast<uint32_t>(num_tiles);
  launch.a = dots.a.data;
  launch.b = dots.b.data;
  launch.valid = static_cast<const uint8_t*>(dots.valid.data);
  launch.offset = static_cast<const float*>(dots.offset.data);
  launch.parts = static_cast<double*>(dots.parts.data);
  launch.num_tokens = dots.num_tokens;
  launch.num_features = dots.num_features;
  launch.num_segments = num_segments;
  launch.length = length;
  launch.a_stride_t = dots.a.row_stride, launch.a_stride_f = dots.a.column_stride;
  launch.b_stride_t = dots.b.row_stride, launch.b_stride_f = dots.b.column_stride;
  launch.a_dtype = dots.a.dtype, launch.b_dtype = dots.b.dtype;
  launch.is_signed = dots.is_signed;
  launch.tokens_per_part = CeilDiv(dots.num_tokens, plan.num_parts);
  plan.num_blocks = plan.num_parts * num_tiles;
  plan.scores_per_block = PowerOfTwo(num_segments, kMaxScoresPerBlock);
  return plan;
}

}  // namespace citi
