// The extended GEMM on Hopper without a GPU: its plan by counting, and the kernel itself on a model
// of the hardware, values against a naive product in fp64.

// Device code needs its words first.
// clang-format off
#include "hopper_model.h"
#include "wgmma_model.h"
#include "cuda/extended_gemm_kernel.h"
// clang-format on
#include <set>
#include <utility>

#include "gemm_operands.h"

namespace citi {
namespace {

using gemm::NarrowTiles;
using gemm::WideTiles;

struct Case {
  bool is_input_gradient;
  DType dtype;
  int64_t num_rows, num_columns, depth, more;
  bool has_bias;
  int num_multiprocessors;

  std::string Name() const {
    return std::string(is_input_gradient ? "input gradient " : "linear ") +
           (dtype == DType::kBFloat16 ? "bf16 " : "fp16 ") + std::to_string(num_rows) + " x " +
           std::to_string(num_columns) + ", depth " + std::to_string(depth) + " + " +
           std::to_string(more) + (has_bias ? ", bias" : "") + ", on " +
           std::to_string(num_multiprocessors);
  }
};

class Problem {
 public:
  explicit Problem(const Case& wanted)
      : case_(wanted),
        left_(wanted.num_rows, wanted.depth, wanted.dtype, 1, 8),
        right_(RightRows(wanted.depth), RightColumns(wanted.depth), wanted.dtype, 2, 0),
        more_left_(wanted.num_rows, More(), wanted.dtype, 3, 0),
        more_right_(RightRows(More()), RightColumns(More()), wanted.dtype, 4, 8),
        bias_(1, wanted.num_columns, wanted.dtype, 5, 0),
        out_(wanted.num_rows, wanted.num_columns, wanted.dtype, 0, 16) {}

  ExtendedGemm Arguments() {
    ExtendedGemm gemm{};
    gemm.is_input_gradient = case_.is_input_gradient;
    gemm.num_rows = case_.num_rows;
    gemm.num_columns = case_.num_columns;
    gemm.depth = case_.depth;
    gemm.more = case_.more;
    gemm.left = left_.AsMatrix();
    gemm.right = right_.AsMatrix();
    gemm.more_left = more_left_.AsMatrix();
    gemm.more_right = more_right_.AsMatrix();
    gemm.out = out_.AsMatrix();
    if (case_.has_bias) {
      gemm.bias = {bias_.At(0, 0), 2 * case_.num_columns, case_.dtype, case_.num_columns};
    }
    return gemm;
  }

  // Whether the output is the truth, up to sums in fp32 and one rounding; nothing else was written.
  bool IsAccurate() {
    const double half_step = case_.dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
    const double least = case_.dtype == DType::kBFloat16 ? 0.0 : std::ldexp(1.0, -25);
    for (int64_t r = 0; r < case_.num_rows; ++r) {
      for (int64_t c = 0; c < case_.num_columns; ++c) {
        double truth = case_.has_bias ? bias_.Get(0, c) : 0.0, scale = std::fabs(truth);
        AddProducts(&left_, &right_, case_.depth, r, c, &truth, &scale);
        if (case_.more > 0)
          AddProducts(&more_left_, &more_right_, case_.more, r, c, &truth, &scale);
        const double allowed = half_step * std::fabs(truth) + 4e-6 * scale + least;
        if (!(std::fabs(out_.Get(r, c) - truth) <= allowed)) return false;
      }
    }
    return out_.IsIntact();
  }

 private:
  int64_t More() const { return std::max(case_.more, int64_t{1}); }
  int64_t RightRows(int64_t depth) const {
    return case_.is_input_gradient ? depth : case_.num_columns;
  }
  int64_t RightColumns(int64_t depth) const {
    return case_.is_input_gradient ? case_.num_columns : depth;
  }
  void AddProducts(Operand* left, Operand* right, int64_t depth, int64_t r, int64_t c,
                   double* truth, double* scale) {
    for (int64_t k = 0; k < depth; ++k) {
      const double product =
          left->Get(r, k) * (case_.is_input_gradient ? right->Get(k, c) : right->Get(c, k));
      *truth += product;
      *scale += std::fabs(product);
    }
  }

  Case case_;
  Operand left_, right_, more_left_, more_right_, bias_, out_;
};

template <class Tiles, DType kDType, bool kIsTransposed>
void Run(const ExtendedGemm& problem, int num_multiprocessors) {
  const gemm::Launch launch = gemm::PlanLaunch<Tiles>(problem);
  const gemm::Maps maps = AsMaps(gemm::ShapesOf(problem));
  hopper::RunClusters(gemm::NumBlocks<Tiles>(problem, num_multiprocessors), Tiles::kCluster,
                      gemm::kThreads,
                      [&] { gemm::RunExtendedGemm<Tiles, kDType, kIsTransposed>(launch, maps); });
}

template <class Tiles>
void CheckValues(const Case& wanted) {
  constexpr DType kBFloat16 = DType::kBFloat16, kFloat16 = DType::kFloat16;
  Problem problem(wanted);
  const ExtendedGemm gemm = problem.Arguments();
  CHECK(Invalid(gemm) == "", Invalid(gemm));
  if (wanted.is_input_gradient) {
    wanted.dtype == kBFloat16 ? Run<Tiles, kBFloat16, true>(gemm, wanted.num_multiprocessors)
                              : Run<Tiles, kFloat16, true>(gemm, wanted.num_multiprocessors);
  } else {
    wanted.dtype == kBFloat16 ? Run<Tiles, kBFloat16, false>(gemm, wanted.num_multiprocessors)
                              : Run<Tiles, kFloat16, false>(gemm, wanted.num_multiprocessors);
  }
  CHECK(problem.IsAccurate(), wanted.Name() + ": not the truth");
  for (const std::string& failure : hopper::failures) CHECK(false, wanted.Name() + ": " + failure);
  hopper::failures.clear();
}

void CheckValuesOfAll() {
  const DType bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  // Several units for a cluster, edges in every dimension, stages that come round many times.
  CheckValues<WideTiles>({false, bf16, 300, 520, 200, 40, true, 2});
  CheckValues<WideTiles>({true, bf16, 300, 520, 200, 45, false, 3});
  CheckValues<WideTiles>({false, f16, 100, 267, 72, 0, true, 4});
  CheckValues<WideTiles>({true, f16, 130, 264, 64, 72, false, 9});
  CheckValues<NarrowTiles>({false, f16, 140, 391, 136, 8, true, 2});
  CheckValues<NarrowTiles>({true, f16, 260, 200, 320, 37, false, 1});
  CheckValues<NarrowTiles>({false, bf16, 1, 8, 8, 256, false, 5});
  CheckValues<NarrowTiles>({true, bf16, 129, 72, 65, 0, false, 1});
}

// Every piece of the output belongs to one unit, and every unit to one cluster.
template <class Tiles>
void CheckSchedule(int64_t num_rows, int64_t num_columns, int num_multiprocessors) {
  ExtendedGemm gemm{};
  gemm.num_rows = num_rows;
  gemm.num_columns = num_columns;
  gemm.depth = 64;
  const gemm::Launch launch = gemm::PlanLaunch<Tiles>(gemm);
  const int64_t num_blocks = gemm::NumBlocks<Tiles>(gemm, num_multiprocessors);
  const std::string name = std::to_string(num_rows) + " x " + std::to_string(num_columns) + " on " +
                           std::to_string(num_multiprocessors);
  CHECK(num_blocks % Tiles::kCluster == 0 && num_blocks > 0, name + ": part of a cluster");
  CHECK(num_blocks <= std::max(num_multiprocessors, Tiles::kCluster), name + ": too many blocks");
  const auto num_clusters = static_cast<uint32_t>(num_blocks / Tiles::kCluster);
  std::set<std::pair<uint32_t, uint32_t>> places;
  uint32_t num_units = 0;
  for (uint32_t cluster = 0; cluster < num_clusters; ++cluster) {
    for (uint32_t unit = cluster; unit < launch.NumUnits(); unit += num_clusters) {
      const gemm::Place place = gemm::PlaceOfUnit(launch, unit);
      places.insert({place.row, place.column});
      ++num_units;
      CHECK(place.row * Tiles::kCluster * gemm::kTileRows < num_rows, name + ": beyond the rows");
      CHECK(place.column * Tiles::kWidth < num_columns, name + ": beyond the columns");
    }
  }
  const int64_t wanted = CeilDiv(num_rows, gemm::kTileRows * Tiles::kCluster) *
                         CeilDiv(num_columns, Tiles::kWidth);
  CHECK(num_units == wanted && static_cast<int64_t>(places.size()) == wanted,
        name + ": a tile left out, or made twice");
}

void CheckSchedules() {
  for (const int num_multiprocessors : {1, 2, 7, 114, 132}) {
    for (const int64_t num_rows : {1, 128, 257, 2048, 2500, 8192}) {
      for (const int64_t num_columns : {8, 256, 1000, 4096, 14336}) {
        CheckSchedule<WideTiles>(num_rows, num_columns, num_multiprocessors);
        CheckSchedule<NarrowTiles>(num_rows, num_columns, num_multiprocessors);
      }
    }
  }
}

// As few clusters as make the same number of rounds.
void CheckBalance() {
  ExtendedGemm gemm{};
  gemm.num_columns = 4096;
  gemm.num_rows = 8192;
  CHECK(gemm::NumBlocks<WideTiles>(gemm, 132) == 128, "512 units on 66 clusters: 64 make 8 rounds");
  gemm.num_columns = 14336;
  CHECK(gemm::NumBlocks<WideTiles>(gemm, 132) == 128, "1792 units on 66 clusters: 64 make 28");
  gemm.num_rows = 300;
  gemm.num_columns = 520;
  CHECK(gemm::NumBlocks<NarrowTiles>(gemm, 132) == 15, "fewer units than blocks");
  CHECK(gemm::NumBlocks<NarrowTiles>(gemm, 14) == 8, "15 units in 2 rounds");
}

// Units that run at once lie close together: eight rows of them before the next column.
void CheckLocality() {
  ExtendedGemm gemm{};
  gemm.num_rows = 8192;
  gemm.num_columns = 4096;
  const gemm::Launch launch = gemm::PlanLaunch<WideTiles>(gemm);
  std::set<uint32_t> rows, columns;
  for (uint32_t unit = 0; unit < 66; ++unit) {
    rows.insert(gemm::PlaceOfUnit(launch, unit).row);
    columns.insert(gemm::PlaceOfUnit(launch, unit).column);
  }
  CHECK(rows.size() == 8 && columns.size() == 9, "tiles of one round are not a square");
}

void CheckRing() {
  gemm::Ring<3> ring;
  for (uint32_t n = 0; n < 50; ++n) {
    CHECK(ring.stage == static_cast<int>(n % 3) && ring.phase == (n / 3) % 2, "stage or phase");
    ring.Advance();
  }
}

// Instructions cover the depth of both products, none without an element of it.
void CheckSteps() {
  for (const int32_t depth : {1, 8, 16, 17, 63, 64, 65, 200, 4096}) {
    for (const int32_t more : {0, 1, 16, 37, 64, 72, 256}) {
      gemm::Launch launch{};
      launch.depth = depth;
      launch.more = more;
      int32_t base = 0, extension = 0;
      for (int32_t step = 0; step < launch.NumSteps(); ++step) {
        const int32_t mmas = launch.NumMmas(step);
        CHECK(mmas >= 1 && mmas <= 4, "a step of no instruction");
        (step < launch.NumBaseSteps() ? base : extension) += mmas;
      }
      CHECK(base == (depth + 15) / 16 && extension == (more + 15) / 16, "instructions of a unit");
    }
  }
}

void CheckDescriptors() {
  // Start 0x12400, no use of leading, 1024 bytes to the next 8 rows.
  CHECK(gemm::DepthMajorDescriptor(0x12400) == 0x4000004000011240u, "rows of depth");
  // 8192 bytes to the next 64 columns, 1024 to the next 8 of depth.
  CHECK(gemm::ColumnMajorDescriptor(0x12400) == 0x4000004002001240u, "rows of columns");
  CHECK(gemm::DescriptorAdvance(false) == 2 && gemm::DescriptorAdvance(true) == 128, "advance");
}

template <class Tiles>
void CheckLayout() {
  std::vector<std::pair<uint32_t, uint32_t>> pieces;
  for (int stage = 0; stage < Tiles::kStages; ++stage) {
    pieces.push_back({Tiles::Left(stage), Tiles::kLeftBytes});
    pieces.push_back({Tiles::Right(stage), Tiles::kRightBytes});
    pieces.push_back({Tiles::Full(stage), gemm::kBarrierBytes});
    pieces.push_back({Tiles::Empty(stage), gemm::kBarrierBytes});
  }
  for (int buffer = 0; buffer < gemm::kConsumers * gemm::kNumBuffers; ++buffer) {
    pieces.push_back({Tiles::Buffer(buffer / 2, buffer % 2), gemm::kBufferBytes});
  }
  std::sort(pieces.begin(), pieces.end());
  for (size_t i = 0; i + 1 < pieces.size(); ++i) {
    CHECK(pieces[i].first + pieces[i].second <= pieces[i + 1].first, "pieces overlap");
  }
  for (const auto& [at, size] : pieces) {
    CHECK(at % (size >= 1024 ? 1024 : 8) == 0, "a piece is not aligned");
  }
  CHECK(pieces.back().first + pieces.back().second <= Tiles::kUsedBytes, "beyond the end");
}

// No two rows of a stored matrix lie in the same banks.
void CheckBanks() {
  for (int sixteenth = 0; sixteenth < 4; ++sixteenth) {
    for (int thread = 0; thread < gemm::kGroupThreads; thread += 8) {
      std::set<uint32_t> banks;
      for (int i = 0; i < 8; ++i) banks.insert(gemm::StoredOffset(thread + i, sixteenth) % 128);
      CHECK(banks.size() == 8, "bank conflict");
    }
  }
}

void CheckChoice() {
  ExtendedGemm gemm{};
  gemm.depth = 4096;
  gemm.num_columns = 4096;
  gemm.num_rows = 8192;
  CHECK(gemm::TakesWideTiles(gemm, 132), "many tiles");
  gemm.num_rows = 128;
  CHECK(!gemm::TakesWideTiles(gemm, 132), "few tiles");
  CHECK(!gemm::TakesWideTiles(gemm, 1), "no cluster fits");
}

}  // namespace
}  // namespace citi

int main() {
  citi::CheckRing();
  citi::CheckSteps();
  citi::CheckSchedules();
  citi::CheckBalance();
  citi::CheckLocality();
  citi::CheckDescriptors();
  citi::CheckLayout<citi::gemm::WideTiles>();
  citi::CheckLayout<citi::gemm::NarrowTiles>();
  citi::CheckBanks();
  citi::CheckChoice();
  citi::CheckValuesOfAll();
  return citi::Report();
}
