#include "cpu/score_tile.h"

#include "cpu/parallel.h"

namespace citi {
namespace {

ScoresOfTask* Select(Variant variant) {
  switch (variant) {
#if defined(CITI_AVX512_VARIANT)
    case Variant::kAvx512Bf16:
    case Variant::kAvx512:
      return ScoresOfTaskAvx512;
#endif
#if defined(CITI_AVX2_VARIANT)
    case Variant::kAvx2:
      return ScoresOfTaskAvx2;
#endif
    default:
      return ScoresOfTaskPortable;
  }
}

// Rows of sums (rows, sums_of_row), `per_segment` of them for each segment of rows.
template <class Score>
void AddSums(const ScoreTile& tile, int64_t num_segments, int64_t per_segment,
             int64_t sums_of_row) {
  const double* sums = static_cast<const double*>(tile.sums.data);
  const int64_t first = tile.first_column / tile.column_length;
  for (int64_t segment = 0; segment < num_segments; ++segment) {
    const int64_t p = tile.first_row / tile.row_length + segment;
    Score* scores = static_cast<Score*>(tile.scores.data) + p * tile.num_column_segments + first;
    for (int64_t q = 0; q < sums_of_row; ++q) {
      double sum = 0.0;
      for (int64_t i = 0; i < per_segment; ++i) {
        sum += sums[(segment * per_segment + i) * sums_of_row + q];
      }
      scores[q] = static_cast<Score>(static_cast<double>(scores[q]) + sum);
    }
  }
}

template <class Score>
void AddSums(const ScoreTile& tile) {
  const int64_t num_segments = tile.num_rows / tile.tile_row_length();
  if (tile.is_columns()) {
    return AddSums<Score>(tile, num_segments, tile.parts_of_segment(), tile.num_columns);
  }
  AddSums<Score>(tile, num_segments, tile.tile_row_length(), tile.tile_column_segments());
}

}  // namespace

void AccumulateScoreTile(const ScoreTile& tile, Variant variant, int64_t num_threads) {
  ScoresOfTask* const scores_of_task = Select(variant);
  ParallelFor(NumTasks(tile), num_threads, [&](int64_t task) { scores_of_task(tile, task); });
  if (tile.is_elements()) return;
  if (tile.scores.dtype == DType::kFloat64) return AddSums<double>(tile);
  AddSums<float>(tile);
}

}  // namespace citi
