// What the plans of the skinny passes share: pure arithmetic, also used where there is no GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/pipeline.h"
#include "dropout.h"

namespace citi {

// Blocks that fill an H100, at one for each multiprocessor; the same on every GPU, so that sums
// have one order everywhere.
constexpr int64_t kSkinnyBlocks = 132;
// Dynamic shared memory that a block may have on every GPU of sm_80 and later.
constexpr int64_t kLeastSharedLimit = 99 * 1024;
// Tiles of 8 columns for which kernels are compiled.
constexpr int kCompiledTiles[] = {6, 12, 24};

constexpr Dropout kNoDropout{0, 0, 0, 1.0f};

// The fewest that hold `columns`; 0: none does.
inline int TilesFor(int64_t columns) {
  for (const int tiles : kCompiledTiles) {
    if (columns <= tiles * 8) return tiles;
  }
  return 0;
}

inline int NumStages(int64_t stage_bytes, int64_t shared_limit) {
  return static_cast<int>(
      std::clamp(shared_limit / stage_bytes, int64_t{kMinStages}, int64_t{kMaxStages}));
}

}  // namespace citi
