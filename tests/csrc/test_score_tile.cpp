// Scores of a tile on the CPU: values against a naive loop; variants, threads and layouts bit by
// bit; the bits of stochastic rounding against those of the torch backend.

#include <algorithm>

#include "cpu/score_tile.h"
#include "random_bits_case.h"
#include "row_dots_cases.h"

namespace citi {
namespace {

constexpr DType kFp32 = DType::kFloat32, kFp16 = DType::kFloat16, kBf16 = DType::kBFloat16;
constexpr float kTileScale = 0.25f;
constexpr double kBefore = 0.5;

struct TileOptions {
  int64_t num_rows, num_columns, first_row, first_column;
  int64_t row_length, column_length, num_row_segments, num_column_segments;
  DType gradient = kFp32, weight = kFp32, scores = DType::kFloat64;

  std::string Name() const {
    std::string name;
    for (const int64_t each : {num_rows, num_columns, first_row, first_column, row_length,
                               column_length, num_row_segments, num_column_segments}) {
      name += std::to_string(each) + " ";
    }
    for (const DType each : {gradient, weight, scores}) {
      name += "dtype " + std::to_string(static_cast<int>(each)) + " ";
    }
    return name;
  }
};

// Everything that a ScoreTile points to.
class TileProblem {
 public:
  TileProblem(const TileOptions& options, Layout layout)
      : options(options),
        gradient(options.num_rows, options.num_columns, options.gradient, layout, 1),
        weight(options.num_rows, options.num_columns, options.weight, layout, 2),
        scores(options.num_row_segments, options.num_column_segments, options.scores,
               Layout::kDense, 3) {
    for (int64_t p = 0; p < options.num_row_segments; ++p) {
      for (int64_t q = 0; q < options.num_column_segments; ++q) PutScore(p, q, kBefore);
    }
  }

  ScoreTile Arguments() {
    ScoreTile tile{};
    tile.num_rows = options.num_rows, tile.num_columns = options.num_columns;
    tile.first_row = options.first_row, tile.first_column = options.first_column;
    tile.row_length = options.row_length, tile.column_length = options.column_length;
    tile.num_row_segments = options.num_row_segments;
    tile.num_column_segments = options.num_column_segments;
    tile.gradient = gradient.AsMatrix(), tile.weight = weight.AsMatrix();
    const Matrix place = scores.AsMatrix();
    tile.scores = {const_cast<void*>(place.data), place.num_bytes, place.dtype,
                   scores.rows() * scores.columns()};
    tile.scale = kTileScale;
    tile.seed = 5;
    sums_.assign(static_cast<size_t>(tile.num_sums()), std::nan(""));
    if (!sums_.empty()) {
      const auto size = static_cast<int64_t>(sums_.size());
      tile.sums = {sums_.data(), size * 8, DType::kFloat64, size};
    }
    return tile;
  }

  void PutScore(int64_t p, int64_t q, double value) {
    void* at = scores.At(p, q);
    if (options.scores == DType::kFloat64) *static_cast<double*>(at) = value;
    if (options.scores == kFp32) *static_cast<float*>(at) = static_cast<float>(value);
    if (options.scores == kBf16) {
      *static_cast<BFloat16*>(at) = Rounded<BFloat16>(static_cast<float>(value));
    }
  }
  std::vector<double> Scores() {
    std::vector<double> values;
    for (int64_t p = 0; p < scores.rows(); ++p) {
      for (int64_t q = 0; q < scores.columns(); ++q) values.push_back(scores.Get(p, q));
    }
    return values;
  }

  // Summands are positive, so that errors scale with the sums.
  bool IsAccurate() {
    std::vector<double> truth(Scores().size(), kBefore);
    for (int64_t i = 0; i < options.num_rows; ++i) {
      for (int64_t j = 0; j < options.num_columns; ++j) {
        const int64_t p = (options.first_row + i) / options.row_length;
        const int64_t q = (options.first_column + j) / options.column_length;
        truth[static_cast<size_t>(p * options.num_column_segments + q)] +=
            std::fabs(gradient.Get(i, j) * weight.Get(i, j)) * kTileScale;
      }
    }
    const double eps =
        options.scores == kBf16 ? std::ldexp(1.0, -7) : 4.0 * std::numeric_limits<float>::epsilon();
    const std::vector<double> ours = Scores();
    for (size_t s = 0; s < ours.size(); ++s) {
      if (!(std::fabs(ours[s] - truth[s]) <= eps * truth[s])) return false;
    }
    return true;
  }

  TileOptions options;
  TestMatrix gradient, weight, scores;

 private:
  std::vector<double> sums_;
};

std::vector<double> Run(const TileOptions& options, Layout layout, Variant variant,
                        int64_t num_threads, bool* is_accurate) {
  TileProblem problem(options, layout);
  const ScoreTile tile = problem.Arguments();
  CHECK(InvalidSizes(tile) == "" && Invalid(tile) == "", InvalidSizes(tile) + Invalid(tile));
  AccumulateScoreTile(tile, variant, num_threads);
  *is_accurate = problem.IsAccurate();
  return problem.Scores();
}

void CheckCase(const TileOptions& options) {
  bool is_accurate = false;
  const std::vector<double> expected =
      Run(options, Layout::kDense, Variant::kPortable, 1, &is_accurate);
  CHECK(is_accurate, options.Name() + ": not the truth");
  for (const Variant variant : RunnableVariants()) {
    for (const Layout layout : {Layout::kDense, Layout::kRowsApart}) {
      const std::vector<double> scores = Run(options, layout, variant, 3, &is_accurate);
      CHECK(scores == expected, options.Name() + ": other bits in variant " + NameOf(variant));
    }
  }
}

void CheckValues() {
  for (const DType gradient : {kFp32, kBf16, kFp16}) {
    for (const DType weight : {kFp32, kBf16, kFp16}) {
      for (const DType scores : {DType::kFloat64, kFp32}) {
        const auto check = [&](TileOptions options) {
          options.gradient = gradient, options.weight = weight, options.scores = scores;
          CheckCase(options);
        };
        // The component; rows; heads of rows and of columns; columns; blocks; a tile within one.
        check({150, 213, 0, 0, 300, 213, 1, 1});
        check({9, 64, 3, 0, 1, 64, 12, 1});
        check({15, 70, 5, 0, 5, 70, 4, 1});
        check({6, 39, 2, 13, 20, 13, 1, 5});
        check({201, 37, 99, 0, 300, 1, 1, 37});
        check({130, 5, 65, 35, 65, 1, 3, 40});
        check({8, 9, 4, 3, 4, 3, 5, 4});
        check({3, 40, 5, 40, 9, 81, 2, 1});
        check({70, 33, 7, 33, 1, 1, 77, 66});
        check({1, 1, 0, 0, 1, 1, 1, 1});
      }
      CheckCase({70, 33, 7, 33, 1, 1, 77, 66, gradient, weight, kBf16});
    }
  }
}

void CheckRandomBits() {
  using namespace random_bits;
  for (const Wanted& wanted : kWanted) {
    // In two tiles, since elements are counted from the weight's first.
    TileProblem whole({kOut, kIn, 0, 0, 1, 1, kOut, kIn, kFp32, kFp32, kBf16}, Layout::kDense);
    for (int64_t i = 0; i < kOut; ++i) {
      for (int64_t j = 0; j < kIn; ++j) {
        int64_t sum = 0;
        for (int64_t t = 0; t < kTokens; ++t) sum += G(t, i) * X(t, j);
        *static_cast<float*>(whole.gradient.At(i, j)) = static_cast<float>(sum);
        *static_cast<float*>(whole.weight.At(i, j)) = static_cast<float>(Weight(i, j));
        whole.PutScore(i, j, static_cast<double>(Before(i, j)));
      }
    }
    constexpr int64_t kFirst = 7;
    for (const int64_t first : {int64_t{0}, kFirst}) {
      ScoreTile tile = whole.Arguments();
      tile.scale = kScale, tile.seed = wanted.seed;
      tile.first_column = first;
      tile.num_columns = first == 0 ? kFirst : kIn - kFirst;
      tile.gradient.data = whole.gradient.At(0, first);
      tile.weight.data = whole.weight.At(0, first);
      tile.gradient.num_bytes -= first * 4, tile.weight.num_bytes -= first * 4;
      CHECK(InvalidSizes(tile) == "" && Invalid(tile) == "", InvalidSizes(tile) + Invalid(tile));
      AccumulateScoreTile(tile, RunnableVariants()[0], 2);
    }
    CHECK(Sum(whole.Arguments().scores.data) == wanted.sum, "other bits than torch's");
  }
}

// NaN and inf show in their score and nowhere else.
void CheckWhatIsNotFinite() {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const DType scores : {DType::kFloat64, kBf16}) {
    const int64_t length = scores == kBf16 ? 1 : 10;
    TileProblem problem({5, 40, 0, 0, 1, length, 5, 40 / length, kFp32, kFp32, scores},
                        Layout::kDense);
    *static_cast<float*>(problem.gradient.At(2, 17)) = infinity;
    *static_cast<float*>(problem.gradient.At(3, 38)) = std::nanf("");
    AccumulateScoreTile(problem.Arguments(), RunnableVariants()[0], 1);
    for (int64_t p = 0; p < 5; ++p) {
      for (int64_t q = 0; q < 40 / length; ++q) {
        const double score = problem.scores.Get(p, q);
        CHECK(std::isinf(score) == (p == 2 && q == 17 / length), "inf elsewhere");
        CHECK(std::isnan(score) == (p == 3 && q == 38 / length), "NaN elsewhere");
      }
    }
  }
}

// Expects a message that begins with this name.
void CheckRefused(const ScoreTile& tile, const std::string& name) {
  const std::string sizes = InvalidSizes(tile);
  const std::string message = sizes.empty() ? Invalid(tile) : sizes;
  CHECK(message.compare(0, name.size(), name) == 0, "wanted " + name + ", got: " + message);
}

void CheckArguments() {
  TileProblem problem({6, 8, 6, 0, 3, 8, 5, 1}, Layout::kDense);
  const ScoreTile valid = problem.Arguments();
  CheckRefused(valid, "");
  ScoreTile tile = valid;
  const auto refused = [&](const char* name) {
    CheckRefused(tile, name);
    tile = valid;
  };
  tile.num_rows = 0, refused("tile: rows must be positive");
  tile.num_columns = INT64_MAX, refused("tile: columns must be positive");
  tile.first_row = -1, refused("tile: rows must be positive");
  tile.first_row = 10, refused("tile: rows must end within the 15");
  tile.first_row = 7, refused("tile: must hold whole segments of 3 rows");
  tile.row_length = INT64_MAX, refused("segments: ");
  tile.num_column_segments = 0, refused("segments: ");
  tile.gradient.data = nullptr, refused("gradient: data");
  tile.gradient.row_stride = 9, refused("gradient: shape and strides");
  tile.gradient.dtype = DType::kFloat64, refused("gradient: dtype");
  tile.gradient.dtype = kBf16, tile.gradient.column_stride = 2, refused("gradient: column stride");
  tile.weight.dtype = DType::kBool, refused("weight: dtype");
  tile.weight.num_bytes -= 1, refused("weight: shape and strides");
  tile.scores.size = 4, refused("scores: must have 5");
  tile.scores.dtype = kBf16, refused("scores: dtype");
  tile.sums.data = nullptr, refused("sums: must be given");
  tile.sums.size = 5, refused("sums: must have 6");
  tile.sums.dtype = kFp32, refused("sums: dtype");
  tile.sums.data = tile.scores.data, refused("sums: must not overlap scores");
  tile.sums.data = const_cast<void*>(tile.weight.data), refused("sums: must not overlap weight");
  tile.scores.data = const_cast<void*>(tile.weight.data),
  refused("scores: must not overlap weight");
}

}  // namespace
}  // namespace citi

int main() {
  citi::CheckValues();
  citi::CheckRandomBits();
  citi::CheckWhatIsNotFinite();
  citi::CheckArguments();
  return citi::Report();
}
