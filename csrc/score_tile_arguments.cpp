#include "score_tile_arguments.h"

namespace citi {
namespace {

// Products of two such numbers, times the size of a sum, stay below 2^63.
constexpr int64_t kMaxSize = int64_t{1} << 29;

std::string InvalidDirection(const std::string& what, int64_t size, int64_t first, int64_t length,
                             int64_t num_segments) {
  if (size < 1 || size > kMaxSize || first < 0 || first > kMaxSize) {
    return "tile: " + what + " must be positive, begin at 0 or later and stay below 2^29, got " +
           std::to_string(size) + " from " + std::to_string(first);
  }
  if (length < 1 || length > kMaxSize || num_segments < 1 || num_segments > kMaxSize) {
    return "segments: their number and length must be positive and at most 2^29, got " +
           std::to_string(num_segments) + " of " + std::to_string(length) + " " + what;
  }
  if (first + size > length * num_segments) {
    return "tile: " + what + " must end within the " + std::to_string(length * num_segments) +
           " of weight, got " + std::to_string(first + size);
  }
  const bool is_whole = first % length == 0 && size % length == 0;
  const bool is_within = first / length == (first + size - 1) / length;
  if (is_whole || is_within) return "";
  return "tile: must hold whole segments of " + std::to_string(length) + " " + what +
         " or lie within one, got " + std::to_string(size) + " from " + std::to_string(first);
}

std::string InvalidOperand(const std::string& name, const Matrix& matrix, const ScoreTile& tile) {
  if (matrix.dtype == DType::kFloat64) return name + ": dtype must be fp32, bf16 or fp16";
  std::string wrong = InvalidMatrix(name, matrix, tile.num_rows, tile.num_columns);
  if (wrong.empty() && tile.num_columns > 1 && matrix.column_stride != 1)
    wrong = name + ": column stride must be 1";
  return wrong;
}

std::string InvalidScores(const ScoreTile& tile) {
  const DType dtype = tile.scores.dtype;
  const bool is_wide = dtype == DType::kFloat32 || dtype == DType::kFloat64;
  if (!is_wide && !(tile.is_elements() && dtype == DType::kBFloat16)) {
    return "scores: dtype must be fp32 or fp64, or bf16 for scores of elements";
  }
  return InvalidVector("scores", tile.scores, tile.num_row_segments * tile.num_column_segments);
}

std::string InvalidSums(const ScoreTile& tile) {
  if (tile.is_elements()) {
    return tile.sums.data == nullptr ? "" : "sums: must be left out for scores of elements";
  }
  if (tile.sums.data == nullptr) return "sums: must be given, but for scores of elements";
  if (tile.sums.dtype != DType::kFloat64) return "sums: dtype must be fp64";
  return InvalidVector("sums", tile.sums, tile.num_sums());
}

}  // namespace

std::string InvalidSizes(const ScoreTile& tile) {
  std::string wrong = InvalidDirection("rows", tile.num_rows, tile.first_row, tile.row_length,
                                       tile.num_row_segments);
  if (!wrong.empty()) return wrong;
  return InvalidDirection("columns", tile.num_columns, tile.first_column, tile.column_length,
                          tile.num_column_segments);
}

std::string Invalid(const ScoreTile& tile) {
  std::string wrong = InvalidOperand("gradient", tile.gradient, tile);
  if (wrong.empty()) wrong = InvalidOperand("weight", tile.weight, tile);
  if (wrong.empty()) wrong = InvalidScores(tile);
  if (wrong.empty()) wrong = InvalidSums(tile);
  if (!wrong.empty()) return wrong;
  return InvalidOverlap({{"sums", tile.sums},
                         {"scores", tile.scores},
                         {"gradient", ExtentOf(tile.gradient, tile.num_rows, tile.num_columns)},
                         {"weight", ExtentOf(tile.weight, tile.num_rows, tile.num_columns)}},
                        2);
}

}  // namespace citi
