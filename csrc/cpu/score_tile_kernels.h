// Scores of a tile, in terms of sixteen lanes; compiled once for each variant.
//
// A segment of a row is summed in 64 lanes: element j into lane j % 64, then the lanes pairwise.
// Rows of a column are summed eight at a time, in order.
#pragma once

#include "counter_hash.h"
#include "cpu/lanes.h"
#include "cpu/score_tile.h"
#include "whole_numbers.h"

namespace citi {
namespace {

constexpr int64_t kStripes = 4;
constexpr int64_t kRowsAtOnce = 8;

template <class L, class Element>
inline L LoadUpTo16(const Element* from, int64_t n) {
  return n >= kLanes ? L::Load(from) : LoadTail<L>(from, n);
}

template <class L, class Element>
inline void StoreUpTo16(const L& lanes, int64_t n, Element* to) {
  if (n >= kLanes) return lanes.Store(to);
  Element padded[kLanes];
  lanes.Store(padded);
  for (int64_t i = 0; i < n; ++i) to[i] = padded[i];
}

// The elements of one tile, by row.
template <class Gradient_, class Weight_>
struct Rows {
  using Gradient = Gradient_;
  using Weight = Weight_;
  const ScoreTile& tile;
  Floats scale;

  explicit Rows(const ScoreTile& tile_) : tile(tile_) {
    float scales[kLanes];
    for (float& each : scales) each = tile.scale;
    scale = Floats::Load(scales);
  }
  const Gradient* GradientAt(int64_t row, int64_t column) const {
    return static_cast<const Gradient*>(tile.gradient.data) + row * tile.gradient.row_stride +
           column;
  }
  const Weight* WeightAt(int64_t row, int64_t column) const {
    return static_cast<const Weight*>(tile.weight.data) + row * tile.weight.row_stride + column;
  }
  // Of 16 columns, or of the n that there are: the other lanes are 0.
  Floats Scores(const Gradient* gradient, const Weight* weight, int64_t n) const {
    return (LoadUpTo16<Floats>(gradient, n) * LoadUpTo16<Floats>(weight, n)).Abs() * scale;
  }
};

template <class R>
inline double SumOfSegment(const R& rows, int64_t row, int64_t column, int64_t length) {
  const typename R::Gradient* gradient = rows.GradientAt(row, column);
  const typename R::Weight* weight = rows.WeightAt(row, column);
  const auto scores = [&](int64_t j) { return rows.Scores(gradient + j, weight + j, kLanes); };
  Floats s0 = Floats::Zero(), s1 = s0, s2 = s0, s3 = s0;
  int64_t j = 0;
  for (; j + kStripes * kLanes <= length; j += kStripes * kLanes) {
    s0 = s0 + scores(j);
    s1 = s1 + scores(j + 16);
    s2 = s2 + scores(j + 32);
    s3 = s3 + scores(j + 48);
  }
  for (; j < length; j += kLanes) {
    s0 = s0 + rows.Scores(gradient + j, weight + j, Min(kLanes, length - j));
  }
  float lanes[kLanes];
  ((s0 + s1) + (s2 + s3)).Store(lanes);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] = lanes[i] + lanes[i + width];
  }
  return static_cast<double>(lanes[0]);
}

// sums (rows, segments of columns).
template <class R>
void SumSegments(const R& rows, int64_t begin, int64_t end) {
  const int64_t num_segments = rows.tile.tile_column_segments();
  const int64_t length = rows.tile.tile_column_length();
  double* sums = static_cast<double*>(rows.tile.sums.data) + begin * num_segments;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t s = 0; s < num_segments; ++s) {
      *sums++ = SumOfSegment(rows, row, s * length, length);
    }
  }
}

// sums (columns,) of this part = over rows from `begin` on.
template <class R>
void SumColumns(const R& rows, int64_t begin, int64_t end, double* sums) {
  const int64_t num_columns = rows.tile.num_columns;
  for (int64_t j = 0; j < num_columns; ++j) sums[j] = 0.0;
  for (int64_t row = begin; row < end; row += kRowsAtOnce) {
    const int64_t num_rows = Min(kRowsAtOnce, end - row);
    const typename R::Gradient* gradient = rows.GradientAt(row, 0);
    const typename R::Weight* weight = rows.WeightAt(row, 0);
    for (int64_t j = 0; j < num_columns; j += kLanes) {
      const int64_t n = Min(kLanes, num_columns - j);
      Floats sum = rows.Scores(gradient + j, weight + j, n);
      for (int64_t i = 1; i < num_rows; ++i) {
        sum = sum + rows.Scores(gradient + i * rows.tile.gradient.row_stride + j,
                                weight + i * rows.tile.weight.row_stride + j, n);
      }
      StoreUpTo16(LoadUpTo16<Doubles>(sums + j, n) + Widen(sum), n, sums + j);
    }
  }
}

inline void AddUpTo16(const Floats& added, int64_t n, uint32_t, uint32_t, double* scores) {
  StoreUpTo16(LoadUpTo16<Doubles>(scores, n) + Widen(added), n, scores);
}
inline void AddUpTo16(const Floats& added, int64_t n, uint32_t, uint32_t, float* scores) {
  StoreUpTo16(LoadUpTo16<Floats>(scores, n) + added, n, scores);
}
inline void AddUpTo16(const Floats& added, int64_t n, uint32_t hash_of_row, uint32_t column,
                      BFloat16* scores) {
  float sums[kLanes];
  (LoadUpTo16<Floats>(scores, n) + added).Store(sums);
  BFloat16 rounded[kLanes];
  for (uint32_t i = 0; i < kLanes; ++i) {
    rounded[i] = RoundedStochastically(sums[i], RandomBits(hash_of_row, column + i));
  }
  for (int64_t i = 0; i < n; ++i) scores[i] = rounded[i];
}

template <class Score, class R>
void AddElements(const R& rows, int64_t begin, int64_t end) {
  const ScoreTile& tile = rows.tile;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = (tile.first_row + row) * tile.num_column_segments + tile.first_column;
    Score* scores = static_cast<Score*>(tile.scores.data) + at;
    const typename R::Gradient* gradient = rows.GradientAt(row, 0);
    const typename R::Weight* weight = rows.WeightAt(row, 0);
    const uint32_t hash = HashOfRow(static_cast<uint32_t>(tile.first_row + row), tile.seed);
    for (int64_t j = 0; j < tile.num_columns; j += kLanes) {
      const int64_t n = Min(kLanes, tile.num_columns - j);
      AddUpTo16(rows.Scores(gradient + j, weight + j, n), n, hash,
                static_cast<uint32_t>(tile.first_column + j), scores + j);
    }
  }
}

template <class R>
void ScoresOf(const ScoreTile& tile, int64_t task) {
  const R rows(tile);
  if (tile.is_columns() && !tile.is_elements()) {
    const int64_t in_segment = task % tile.parts_of_segment() * ScoreTile::kPartRows;
    const int64_t begin = task / tile.parts_of_segment() * tile.tile_row_length() + in_segment;
    const int64_t num_rows = Min(ScoreTile::kPartRows, tile.tile_row_length() - in_segment);
    double* sums = static_cast<double*>(tile.sums.data) + task * tile.num_columns;
    return SumColumns(rows, begin, begin + num_rows, sums);
  }
  const int64_t begin = task * ScoreTile::kPartRows;
  const int64_t end = Min(begin + ScoreTile::kPartRows, tile.num_rows);
  if (!tile.is_elements()) return SumSegments(rows, begin, end);
  if (tile.scores.dtype == DType::kFloat64) return AddElements<double>(rows, begin, end);
  if (tile.scores.dtype == DType::kFloat32) return AddElements<float>(rows, begin, end);
  AddElements<BFloat16>(rows, begin, end);
}

template <class Gradient>
void WithWeight(const ScoreTile& tile, int64_t task) {
  if (tile.weight.dtype == DType::kFloat32) return ScoresOf<Rows<Gradient, float>>(tile, task);
  if (tile.weight.dtype == DType::kBFloat16) return ScoresOf<Rows<Gradient, BFloat16>>(tile, task);
  ScoresOf<Rows<Gradient, Float16>>(tile, task);
}

inline void ScoresOfTaskHere(const ScoreTile& tile, int64_t task) {
  if (tile.gradient.dtype == DType::kFloat32) return WithWeight<float>(tile, task);
  if (tile.gradient.dtype == DType::kBFloat16) return WithWeight<BFloat16>(tile, task);
  WithWeight<Float16>(tile, task);
}

}  // namespace
}  // namespace citi
