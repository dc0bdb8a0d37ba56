// Importance of the parameters in one tile of a weight, whose gradient somebody has formed.
//
//   scores[p, q] += scale · Σ_{i in p, j in q} | W[i, j] · gradient[i, j] |
//
// Products are formed in fp32, sums of up to 64 rows or columns too, all others in fp64. Two
// stages, no atomics: the tile is cut by its shape alone, whatever the machine and the number of
// threads; the sums are added in order.
#pragma once

#include <cstdint>
#include <string>

#include "tensors.h"

namespace citi {

// The tile holds whole segments or lies within one, in both directions.
struct ScoreTile {
  int64_t num_rows, num_columns;
  int64_t first_row, first_column;                // in the weight
  int64_t row_length, column_length;              // of a segment
  int64_t num_row_segments, num_column_segments;  // P, Q of the weight
  Matrix gradient;                                // (rows, columns), columns side by side
  Matrix weight;                                  // the tile's part of it, columns side by side
  Vector scores;  // (P * Q,) fp64 or fp32, of elements also bf16; changed in place
  float scale;
  uint64_t seed;  // of the stochastic rounding to bf16
  Vector sums;    // (num_sums(),) fp64, overwritten; none for elements

  bool is_elements() const { return row_length == 1 && column_length == 1; }
  // Columns are not summed, so rows are.
  bool is_columns() const { return column_length == 1; }
  // What of a segment is in the tile.
  int64_t tile_row_length() const { return row_length < num_rows ? row_length : num_rows; }
  int64_t tile_column_length() const {
    return column_length < num_columns ? column_length : num_columns;
  }
  int64_t tile_column_segments() const { return num_columns / tile_column_length(); }
  // Parts of at most kPartRows rows, each within a segment of rows.
  static constexpr int64_t kPartRows = 64;
  int64_t parts_of_segment() const { return (tile_row_length() - 1) / kPartRows + 1; }
  int64_t num_sums() const {
    if (is_elements()) return 0;
    if (is_columns()) return num_rows / tile_row_length() * parts_of_segment() * num_columns;
    return num_rows * tile_column_segments();
  }
};

// What is wrong with the sizes, or ""; num_sums() is computed from valid ones.
std::string InvalidSizes(const ScoreTile& tile);

// What is wrong with the arguments, naming the first one, or "".
std::string Invalid(const ScoreTile& tile);

}  // namespace citi
