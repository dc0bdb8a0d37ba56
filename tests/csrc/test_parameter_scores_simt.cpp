// The CUDA kernels of the parameter scores, run on the host: values against naive loops, and the
// bits of stochastic rounding against those of the torch backend.

// Device code needs its words first.
// clang-format off
#include "simt_tensor_core.h"
#include "cuda/parameter_scores_plan.h"
// clang-format on
#include <set>
#include <utility>

#include "parameter_scores_cases.h"
#include "random_bits_case.h"

namespace citi {
namespace {

template <class Element, class Tile>
void RunTiles(const ParameterScoresPlan& plan) {
  simt::LaunchShared(plan.tiles.count(), Tile::kThreads, kSharedBytes<Element, Tile>,
                     plan.is_aligned ? ScoresOfTile<Element, Tile, AlignedRows<Element>>
                                     : ScoresOfTile<Element, Tile, AnyRows<Element>>,
                     plan.launch);
}

template <class Element>
void RunTiles(const ParameterScoresPlan& plan) {
  plan.tiles.is_large ? RunTiles<Element, LargeTile>(plan) : RunTiles<Element, SmallTile>(plan);
}

template <class Value>
void RunSums(const ParameterScoresPlan& plan) {
  simt::Launch((plan.num_scores - 1) / plan.scores_of_block + 1, kSumThreads, AddScoreSums<Value>,
               static_cast<const float*>(plan.launch.parts),
               static_cast<Value*>(plan.launch.scores), plan.num_summands, plan.num_scores,
               plan.length, plan.scores_of_block);
}

void Run(const ParameterScoresPlan& plan) {
  if (plan.launch.g.dtype == DType::kFloat32) {
    RunTiles<float>(plan);
  } else if (plan.launch.g.dtype == DType::kBFloat16) {
    RunTiles<BFloat16>(plan);
  } else {
    RunTiles<Float16>(plan);
  }
  if (plan.launch.granularity == Granularity::kElements) return;
  if (plan.launch.scores_dtype == DType::kFloat64) {
    RunSums<double>(plan);
  } else {
    RunSums<float>(plan);
  }
}

std::vector<double> CheckCase(const ScoresOptions& options, bool is_aligned, bool is_large) {
  ScoresProblem problem(options);
  const ParameterScores arguments = problem.Arguments(
      [=](const ParameterScores& sizes) { return CutIntoTiles(sizes, is_large).NumParts(sizes); });
  CHECK(InvalidSizes(arguments) == "", InvalidSizes(arguments));
  const TilesOfWeight tiles = CutIntoTiles(arguments, is_large);
  const std::string wrong = Invalid(arguments, tiles.NumParts(arguments));
  CHECK(wrong == "", wrong);
  const ParameterScoresPlan plan = PlanParameterScores(arguments, tiles);
  CHECK(plan.is_aligned == is_aligned, options.Name() + ": takes the other path");
  Run(plan);
  CHECK(problem.IsAccurate(), options.Name() + ": not the truth");
  return problem.Scores();
}

constexpr DType kFp32 = DType::kFloat32, kFp16 = DType::kFloat16, kBf16 = DType::kBFloat16;

ScoresOptions With(ScoresOptions options, DType dtype) {
  options.g = options.x = options.weight = dtype;
  return options;
}

void CheckAligned() {
  // More steps than stages, more tiles than one; heads; columns; elements of every dtype.
  ScoresOptions component{170, 72, 136, 1, 1};
  component.is_masked = true;
  const std::vector<double> first = CheckCase(component, true, false);
  CHECK(first == CheckCase(component, true, false), "other bits at the second run");
  CheckCase(With({37, 72, 72, 9, 1}, kFp16), true, false);
  ScoresOptions columns{37, 72, 40, 1, 40};
  columns.is_masked = columns.is_per_token = true;
  columns.scores = kFp32;
  CheckCase(columns, true, false);
  CheckCase({5, 24, 72, 24, 72}, true, false);
  ScoresOptions elements = With({21, 24, 40, 24, 40}, kFp32);
  elements.scores = kFp32;
  elements.is_masked = elements.is_per_token = true;
  CheckCase(elements, true, false);
  ScoresOptions rounded{21, 24, 40, 24, 40};
  rounded.scores = kBf16;
  rounded.weight = kFp32;
  CheckCase(rounded, true, false);
}

void CheckLargeTiles() {
  ScoresOptions rows{37, 136, 40, 136, 1};
  rows.is_masked = true;
  CheckCase(rows, true, true);
  CheckCase({5, 40, 136, 1, 17}, true, true);
  CheckCase(With({5, 16, 24, 1, 1}, kFp16), true, true);
  CheckCase(With({90, 136, 40, 1, 1}, kFp32), true, true);
  ScoresOptions elements{5, 40, 104, 40, 104};
  elements.layout = Layout::kColumnsApart;
  CheckCase(elements, false, true);
}

void CheckAnyLayout() {
  ScoresOptions mixed{37, 19, 70, 1, 1};
  mixed.x = kFp32, mixed.weight = kFp16;
  mixed.is_masked = true;
  CheckCase(mixed, false, false);
  ScoresOptions transposed = With({35, 66, 10, 33, 1}, kFp16);
  transposed.layout = transposed.weight_layout = Layout::kTransposed;
  CheckCase(transposed, false, false);
  ScoresOptions ragged{33, 19, 53, 19, 53};
  ragged.layout = Layout::kRowsApart, ragged.weight_layout = Layout::kColumnsApart;
  ragged.scores = kFp32;
  CheckCase(ragged, false, false);
  CheckCase(With({3, 5, 7, 1, 7}, kFp32), false, false);
  CheckCase({1, 1, 1, 1, 1}, false, false);
}

// Of a token that counts, inf or NaN shows in its row or column alone, where it also meets the
// zeros beyond the edge.
void CheckWhatIsNotFinite(bool is_rows, bool is_aligned, uint16_t bits) {
  ScoresOptions options{5, 24, 40, is_rows ? 24 : 1, is_rows ? 1 : 40};
  if (!is_aligned) options.layout = Layout::kColumnsApart;
  ScoresProblem problem(options);
  const size_t bad = is_rows ? 20 : 7;
  TestMatrix& matrix = is_rows ? problem.g : problem.x;
  *static_cast<uint16_t*>(matrix.At(2, static_cast<int64_t>(bad))) = bits;
  const ParameterScores arguments = problem.Arguments(
      [](const ParameterScores& sizes) { return CutIntoTiles(sizes, false).NumParts(sizes); });
  Run(PlanParameterScores(arguments, CutIntoTiles(arguments, false)));
  const std::vector<double> scores = problem.Scores();
  for (size_t i = 0; i < scores.size(); ++i) {
    const bool is_right = i != bad         ? std::isfinite(scores[i])
                          : bits == 0x7f80 ? std::isinf(scores[i])
                                           : std::isnan(scores[i]);
    CHECK(is_right, "not finite: " + std::to_string(i));
  }
}

void CheckRandomBits() {
  using namespace random_bits;
  for (const Wanted& wanted : kWanted) {
    ScoresOptions options{kTokens, kOut, kIn, kOut, kIn};
    options.scores = kBf16;
    ScoresProblem problem(options);
    const auto put = [](TestMatrix* matrix, int64_t row, int64_t column, int64_t value) {
      *static_cast<BFloat16*>(matrix->At(row, column)) =
          Rounded<BFloat16>(static_cast<float>(value));
    };
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t i = 0; i < kOut; ++i) put(&problem.g, t, i, G(t, i));
      for (int64_t j = 0; j < kIn; ++j) put(&problem.x, t, j, X(t, j));
    }
    for (int64_t i = 0; i < kOut; ++i) {
      for (int64_t j = 0; j < kIn; ++j) {
        put(&problem.weight, i, j, Weight(i, j));
        problem.PutScore(i * kIn + j, static_cast<double>(Before(i, j)));
      }
    }
    ParameterScores arguments = problem.Arguments([](const ParameterScores&) { return 0; });
    arguments.scale = random_bits::kScale;
    arguments.seed = wanted.seed;
    Run(PlanParameterScores(arguments, CutIntoTiles(arguments, false)));
    CHECK(Sum(arguments.scores.data) == wanted.sum, "other bits than torch's");
  }
}

void CheckPlaces() {
  for (const auto& [down, across] :
       {std::pair{1u, 1u}, std::pair{3u, 5u}, std::pair{8u, 2u}, std::pair{21u, 4u}}) {
    ParameterScoresLaunch launch{};
    launch.tiles_down = down, launch.tiles_across = across;
    launch.g.num_features = down * SmallTile::kSize - 1;
    launch.x.num_features = across * SmallTile::kSize;
    std::set<std::pair<uint32_t, uint32_t>> places;
    for (uint32_t tile = 0; tile < down * across; ++tile) {
      const TilePlace place = PlaceOf<SmallTile>(launch, tile);
      CHECK(place.down < down && place.across < across, "a tile beyond the weight");
      CHECK(place.num_rows == (place.down == down - 1 ? 63 : 64), "rows of a tile");
      CHECK(place.num_columns == 64, "columns of a tile");
      places.insert({place.down, place.across});
    }
    CHECK(places.size() == down * across, "two blocks own one tile");
  }
}

void CheckPlans() {
  ParameterScores sizes{};
  sizes.num_tokens = 2048, sizes.num_row_segments = 1, sizes.num_column_segments = 1;
  for (const int64_t num_out : {1, 64, 576, 4096, 14336}) {
    for (const int64_t num_in : {1, 65, 1536, 4096}) {
      sizes.num_out = num_out, sizes.num_in = num_in;
      const TilesOfWeight tiles = PlanTiles(sizes);
      const int64_t size = tiles.is_large ? LargeTile::kSize : SmallTile::kSize;
      CHECK(tiles.down * size >= num_out && (tiles.down - 1) * size < num_out, "tiles down");
      CHECK(tiles.across * size >= num_in && (tiles.across - 1) * size < num_in, "tiles across");
      // A small weight is cut into more tiles.
      if (num_out == num_in) CHECK(tiles.is_large == (num_out == 4096), "size of tiles");
    }
  }
}

}  // namespace
}  // namespace citi

int main() {
  citi::CheckPlaces();
  citi::CheckPlans();
  citi::CheckAligned();
  citi::CheckLargeTiles();
  citi::CheckAnyLayout();
  for (const bool is_rows : {true, false}) {
    citi::CheckWhatIsNotFinite(is_rows, true, 0x7f80);
    citi::CheckWhatIsNotFinite(is_rows, false, 0x7fff);
  }
  citi::CheckRandomBits();
  return citi::Report();
}
