// Importance of the parameters in one tile of a weight, on the CPU.
#pragma once

#include <cstdint>

#include "cpu/cpu_features.h"
#include "score_tile_arguments.h"

namespace citi {

// Adds to the scores; valid arguments (`InvalidSizes`, `Invalid`).
void AccumulateScoreTile(const ScoreTile& tile, Variant variant, int64_t num_threads);

// One task of those into which the tile is cut: its sums, or its elements into the scores. Variants
// by the CPU that they were compiled for; all give the same bits.
using ScoresOfTask = void(const ScoreTile& tile, int64_t task);
ScoresOfTask ScoresOfTaskPortable, ScoresOfTaskAvx2, ScoresOfTaskAvx512;

// Parts of segments of rows, where these are summed; else kPartRows rows.
inline int64_t NumTasks(const ScoreTile& tile) {
  if (tile.is_columns() && !tile.is_elements()) {
    return tile.num_rows / tile.tile_row_length() * tile.parts_of_segment();
  }
  return (tile.num_rows - 1) / ScoreTile::kPartRows + 1;
}

}  // namespace citi
