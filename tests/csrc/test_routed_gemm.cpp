// The routed GEMM on Hopper without a GPU: its schedule by counting, and the kernel itself on a
// model of the hardware, values against naive loops in fp64.

// Device code needs its words first.
// clang-format off
#include "hopper_model.h"
#include "simt_tensor_core.h"
#include "wgmma_model.h"
#include "cuda/routed_gemm_kernel.h"
// clang-format on
#include <cmath>
#include <set>
#include <utility>
#include <vector>

#include "gemm_operands.h"

namespace citi {
namespace {

using gemm::NarrowRoutedTiles;
using gemm::WideRoutedTiles;

constexpr float kScaling = 0.75f;

struct Case {
  bool is_gradient;
  DType dtype;
  int64_t num_tokens, num_in, num_out, num_experts, expert_rank;
  bool has_more;  // the bias of a linear layer, dgate of a gradient
  int num_multiprocessors;
  bool fits_narrow = false;
  GemmOrder order = {};

  RankShape Ranks() const { return {num_tokens, num_experts, expert_rank}; }
  std::string Name() const {
    return std::string(is_gradient ? "input gradient " : "linear ") +
           (dtype == DType::kBFloat16 ? "bf16 " : "fp16 ") + std::to_string(num_tokens) + " x " +
           std::to_string(num_in) + " x " + std::to_string(num_out) + ", " +
           std::to_string(num_experts) + " experts of " + std::to_string(expert_rank) +
           (has_more ? ", bias or dgate" : "") + ", on " + std::to_string(num_multiprocessors);
  }
};

// A dense tensor in memory of exactly its size: NaN, or random.
class Dense {
 public:
  Dense(int64_t rows, int64_t columns, DType dtype, unsigned seed)
      : matrix_(rows, columns, dtype, Layout::kDense, seed) {
    if (seed == 0) matrix_.FillWithNan();
  }
  double Get(int64_t t, int64_t c) { return matrix_.Get(t, c); }
  void* At(int64_t t, int64_t c) { return matrix_.At(t, c); }
  Vector AsVector() { return matrix_.AsVector(); }
  Matrix AsMatrix() const { return matrix_.AsMatrix(); }

 private:
  TestMatrix matrix_;
};

// A value and the sum of the absolute values that its rounding errors scale with.
struct Sum {
  double value = 0.0, scale = 0.0;

  void Add(double product) { value += product, scale += std::fabs(product); }
};

class Problem {
 public:
  explicit Problem(const Case& wanted)
      : case_(wanted),
        ranks_(wanted.Ranks()),
        x_(wanted.num_tokens, wanted.is_gradient ? wanted.num_out : wanted.num_in, wanted.dtype, 1,
           8),
        weight_(wanted.num_out, wanted.num_in, wanted.dtype, 2, 0),
        bias_(1, wanted.num_out, wanted.dtype, 3, 0),
        stack_(ranks_.num_rows(), wanted.num_in, wanted.dtype, 4, 8),
        b_(wanted.num_out, ranks_.num_ranks(), wanted.dtype, 5, 0),
        out_(wanted.num_tokens, wanted.is_gradient ? wanted.num_in : wanted.num_out, wanted.dtype,
             0, 16),
        h_(wanted.num_tokens, ranks_.num_ranks(), wanted.dtype, wanted.is_gradient ? 6 : 0),
        left_(wanted.num_tokens, wanted.is_gradient ? ranks_.num_rows() : ranks_.padded_ranks(),
              wanted.dtype, 0),
        probs_(wanted.num_tokens, ranks_.num_gates(), DType::kFloat32, wanted.is_gradient ? 7 : 0),
        dgate_(wanted.num_tokens, ranks_.num_gates(), DType::kFloat32, 8),
        counts_(static_cast<size_t>((wanted.num_tokens + 127) / 128), 0) {
    // Small logits, so that no gate is nearly 1; rows of padding are zeros.
    for (int64_t i = 0; i < ranks_.num_rows(); ++i) {
      const bool is_gate = i >= ranks_.padded_ranks();
      const bool is_padding =
          is_gate ? i >= ranks_.padded_ranks() + ranks_.num_gates() : i >= ranks_.num_ranks();
      for (int64_t k = 0; k < wanted.num_in; ++k) {
        const double factor = is_padding ? 0.0 : is_gate ? 0.0625 : 1.0;
        Put(factor * stack_.Get(i, k), stack_.At(i, k));
      }
    }
    if (!wanted.is_gradient) return;
    for (int64_t t = 0; t < wanted.num_tokens; ++t) {
      double sum = 0.0;
      for (int64_t g = 0; g < ranks_.num_gates(); ++g) sum += std::fabs(probs_.Get(t, g));
      for (int64_t g = 0; g < ranks_.num_gates(); ++g) {
        *static_cast<float*>(probs_.At(t, g)) =
            static_cast<float>(std::fabs(probs_.Get(t, g)) / sum);
      }
    }
  }

  RoutedGemm Arguments() {
    const Case& c = case_;
    RoutedGemm routed = c.is_gradient ? RoutedInputGradientProblem(ranks_, c.num_in, c.num_out)
                                      : RoutedLinearProblem(ranks_, c.num_in, c.num_out);
    routed.gemm.left = x_.AsMatrix();
    routed.gemm.right = weight_.AsMatrix();
    routed.gemm.more_left = left_.AsMatrix();
    routed.gemm.more_right = c.is_gradient ? stack_.AsMatrix() : b_.AsMatrix();
    routed.gemm.out = out_.AsMatrix();
    routed.narrow = c.is_gradient ? b_.AsMatrix() : stack_.AsMatrix();
    routed.h = h_.AsVector();
    routed.probs = probs_.AsVector();
    if (c.has_more && c.is_gradient) routed.dgate = dgate_.AsVector();
    if (c.has_more && !c.is_gradient) {
      routed.gemm.bias = {bias_.At(0, 0), 2 * c.num_out, c.dtype, c.num_out};
    }
    routed.counts = {counts_.data(), static_cast<int64_t>(counts_.size()) * 4,
                     static_cast<int64_t>(counts_.size())};
    routed.scaling = kScaling;
    routed.fits_narrow = c.fits_narrow;
    routed.gemm.order = c.order;
    return routed;
  }

  void Verify(const std::string& name) {
    for (const int32_t count : counts_) CHECK(count == 2, name + ": a count is not 2");
    bool are_ranks_right = true;
    for (int64_t t = 0; t < case_.num_tokens; ++t) {
      are_ranks_right = are_ranks_right && (case_.is_gradient ? HasGradients(t) : IsRouted(t));
    }
    CHECK(are_ranks_right, name + ": what is rank-sized is not the truth");
    CHECK(IsOutRight(), name + ": the output is not the truth");
    CHECK(out_.IsIntact(), name + ": written between rows");
  }

 private:
  void Put(double value, void* to) {
    const auto number = static_cast<float>(value);
    *static_cast<uint16_t*>(to) =
        case_.dtype == DType::kBFloat16 ? BFloat16BitsOf(number) : Float16BitsOf(number);
  }
  // Up to one rounding to the dtype, and sums in fp32.
  bool IsNear(double ours, const Sum& truth) const {
    const double half_step = case_.dtype == DType::kBFloat16 ? 1.0 / 256 : 1.0 / 2048;
    const double least = case_.dtype == DType::kBFloat16 ? 0.0 : std::ldexp(1.0, -25);
    return std::fabs(ours - truth.value) <=
           half_step * std::fabs(truth.value) + 4e-6 * truth.scale + least;
  }
  int64_t ExpertOf(int64_t rank) const { return rank / case_.expert_rank; }

  bool IsRouted(int64_t t) {
    const int64_t R = ranks_.num_ranks(), P = ranks_.padded_ranks(), G = ranks_.num_gates();
    std::vector<Sum> z(static_cast<size_t>(P + G));
    for (int64_t i = 0; i < P + G; ++i) {
      for (int64_t k = 0; k < case_.num_in; ++k) {
        z[static_cast<size_t>(i)].Add(x_.Get(t, k) * stack_.Get(i, k));
      }
    }
    double sum = 0.0;
    for (int64_t g = 0; g < G; ++g) sum += std::exp(z[static_cast<size_t>(P + g)].value);
    for (int64_t g = 0; g < G; ++g) {
      const Sum& logit = z[static_cast<size_t>(P + g)];
      const double truth = std::exp(logit.value) / sum;
      if (!(std::fabs(probs_.Get(t, g) - truth) <= truth * (1e-5 + 1e-5 * logit.scale))) {
        return false;
      }
    }
    for (int64_t i = 0; i < P; ++i) {
      if (i >= R) {
        if (left_.Get(t, i) != 0.0) return false;
        continue;
      }
      if (!IsNear(h_.Get(t, i), z[static_cast<size_t>(i)])) return false;
      Sum u;
      u.Add(h_.Get(t, i) * kScaling * probs_.Get(t, 1 + ExpertOf(i)));
      if (!IsNear(left_.Get(t, i), u)) return false;
    }
    return true;
  }

  bool HasGradients(int64_t t) {
    const int64_t R = ranks_.num_ranks(), P = ranks_.padded_ranks(), G = ranks_.num_gates();
    std::vector<Sum> dgate(static_cast<size_t>(G));
    for (int64_t g = 0; g < G && case_.has_more; ++g) {
      dgate[static_cast<size_t>(g)].Add(dgate_.Get(t, g));
    }
    for (int64_t i = 0; i < P; ++i) {
      Sum dh;
      if (i < R) {
        Sum du;
        for (int64_t n = 0; n < case_.num_out; ++n) du.Add(x_.Get(t, n) * b_.Get(n, i));
        const double factor = kScaling * probs_.Get(t, 1 + ExpertOf(i));
        dh = {factor * du.value, std::fabs(factor) * du.scale};
        Sum& gradient = dgate[static_cast<size_t>(1 + ExpertOf(i))];
        gradient.value += kScaling * h_.Get(t, i) * du.value;
        gradient.scale += kScaling * std::fabs(h_.Get(t, i)) * du.scale;
      }
      if (!IsNear(left_.Get(t, i), dh)) return false;
    }
    Sum inner;
    for (int64_t g = 0; g < G; ++g) {
      inner.value += probs_.Get(t, g) * dgate[static_cast<size_t>(g)].value;
      inner.scale += probs_.Get(t, g) * dgate[static_cast<size_t>(g)].scale;
    }
    for (int64_t g = 0; g < ranks_.padded_gates(); ++g) {
      Sum dlogit;
      if (g < G) {
        const Sum& own = dgate[static_cast<size_t>(g)];
        dlogit = {probs_.Get(t, g) * (own.value - inner.value),
                  probs_.Get(t, g) * (own.scale + inner.scale)};
      }
      if (!IsNear(left_.Get(t, P + g), dlogit)) return false;
    }
    return true;
  }

  // With u or dz as the kernel has them.
  bool IsOutRight() {
    const Case& c = case_;
    const int64_t num_columns = c.is_gradient ? c.num_in : c.num_out;
    const int64_t depth = c.is_gradient ? c.num_out : c.num_in;
    const int64_t more = c.is_gradient ? ranks_.num_rows() : ranks_.num_ranks();
    for (int64_t t = 0; t < c.num_tokens; ++t) {
      for (int64_t n = 0; n < num_columns; ++n) {
        Sum sum;
        if (c.has_more && !c.is_gradient) sum.Add(bias_.Get(0, n));
        for (int64_t k = 0; k < depth; ++k) {
          sum.Add(x_.Get(t, k) * (c.is_gradient ? weight_.Get(k, n) : weight_.Get(n, k)));
        }
        for (int64_t i = 0; i < more; ++i) {
          sum.Add(left_.Get(t, i) * (c.is_gradient ? stack_.Get(i, n) : b_.Get(n, i)));
        }
        if (!IsNear(out_.Get(t, n), sum)) return false;
      }
    }
    return true;
  }

  Case case_;
  RankShape ranks_;
  Operand x_, weight_, bias_, stack_, b_, out_;
  Dense h_, left_, probs_, dgate_;
  std::vector<int32_t> counts_;
};

template <class Tiles, DType kDType, bool kIsTransposed, int kNarrow>
void Run(const RoutedGemm& routed, int num_multiprocessors) {
  const gemm::Launch launch = gemm::PlanLaunch<Tiles>(routed.gemm);
  const gemm::RankSpace ranks = gemm::RankSpaceOf(routed);
  const gemm::RoutedMaps maps{AsMaps(gemm::ShapesOf(routed.gemm)),
                              AsMap(gemm::NarrowShapeOf(routed, kNarrow))};
  const int64_t num_blocks = gemm::NumBlocks<Tiles>(routed.gemm, num_multiprocessors);
  hopper::RunTogether(0, num_blocks, num_blocks, Tiles::kCluster, gemm::kThreads, [&] {
    gemm::RunRoutedGemm<Tiles, kDType, kIsTransposed, kNarrow>(launch, maps, ranks);
  });
}

template <class Tiles, DType kDType>
void Run(const RoutedGemm& routed, int num_multiprocessors) {
  if (gemm::TakesSmallTransposedNarrow(routed)) {
    Run<Tiles, kDType, true, gemm::kSmallTransposedNarrow>(routed, num_multiprocessors);
  } else if (routed.gemm.is_input_gradient) {
    Run<Tiles, kDType, true, gemm::kMaxNarrow>(routed, num_multiprocessors);
  } else if (gemm::TakesSmallNarrow(routed)) {
    Run<Tiles, kDType, false, gemm::kSmallNarrow>(routed, num_multiprocessors);
  } else {
    Run<Tiles, kDType, false, gemm::kMaxNarrow>(routed, num_multiprocessors);
  }
}

template <class Tiles>
void CheckValues(const Case& wanted) {
  Problem problem(wanted);
  const RoutedGemm routed = problem.Arguments();
  CHECK(Invalid(routed) == "", Invalid(routed));
  if (wanted.dtype == DType::kBFloat16) {
    Run<Tiles, DType::kBFloat16>(routed, wanted.num_multiprocessors);
  } else {
    Run<Tiles, DType::kFloat16>(routed, wanted.num_multiprocessors);
  }
  problem.Verify(wanted.Name());
  for (const std::string& failure : hopper::failures) CHECK(false, wanted.Name() + ": " + failure);
  hopper::failures.clear();
}

void CheckValuesOfAll() {
  const DType bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  // Two units of the first columns in a row, a block without rows, more units than clusters; edges
  // in every dimension, stages that come round many times, one or more chunks of gates.
  CheckValues<WideRoutedTiles>({false, bf16, 600, 200, 264, 4, 8, true, 4});
  CheckValues<WideRoutedTiles>({true, bf16, 600, 264, 200, 4, 8, true, 4});
  CheckValues<WideRoutedTiles>({false, f16, 130, 200, 267, 7, 7, false, 6});
  CheckValues<WideRoutedTiles>({true, f16, 130, 264, 200, 7, 7, false, 6});
  CheckValues<WideRoutedTiles>({true, bf16, 300, 72, 136, 3, 5, true, 2});
  CheckValues<NarrowRoutedTiles>({false, f16, 300, 392, 136, 1, 16, true, 2});
  CheckValues<NarrowRoutedTiles>({true, f16, 300, 136, 392, 25, 1, true, 1});
  CheckValues<NarrowRoutedTiles>({false, bf16, 1, 72, 8, 20, 2, false, 5});
  CheckValues<NarrowRoutedTiles>({true, bf16, 129, 200, 65, 2, 24, false, 3});
  CheckValues<NarrowRoutedTiles>({false, bf16, 129, 65, 391, 2, 20, true, 3});
  // No more products than needed, other orders of the units, and cache policies.
  CheckValues<WideRoutedTiles>({true, bf16, 600, 264, 200, 4, 8, true, 4, true, {1, true}});
  CheckValues<WideRoutedTiles>({true, f16, 300, 72, 136, 3, 5, false, 2, true, {}});
  CheckValues<NarrowRoutedTiles>({true, f16, 300, 136, 392, 25, 1, true, 1, true, {16, false}});
  CheckValues<NarrowRoutedTiles>({true, bf16, 129, 200, 65, 2, 24, false, 3, true, {2, true}});
  CheckValues<WideRoutedTiles>({false, bf16, 600, 200, 264, 4, 8, true, 4, false, {2, true}});
}

// Every piece of the output is made once; what a unit waits for is begun before it by a cluster
// that waits for nothing but what is begun before that.
template <class Tiles>
void CheckSchedule(int64_t num_rows, int64_t num_columns, int num_multiprocessors) {
  ExtendedGemm gemm{};
  gemm.num_rows = num_rows;
  gemm.num_columns = num_columns;
  gemm.depth = 64;
  const gemm::Launch launch = gemm::PlanLaunch<Tiles>(gemm);
  const std::string name = std::to_string(num_rows) + " x " + std::to_string(num_columns) + " on " +
                           std::to_string(num_multiprocessors);
  std::set<std::pair<uint32_t, uint32_t>> places;
  for (uint32_t unit = 0; unit < launch.NumUnits(); ++unit) {
    const gemm::Place place = gemm::PlaceOfRoutedUnit(launch, unit);
    CHECK((place.column == 0) == (unit < launch.num_unit_rows), name + ": first columns first");
    CHECK(place.row < launch.num_unit_rows && place.column < launch.num_unit_columns,
          name + ": beyond the output");
    places.insert({place.row, place.column});
  }
  CHECK(places.size() == launch.NumUnits(), name + ": a tile left out, or made twice");
  const int64_t clusters = gemm::NumBlocks<Tiles>(gemm, num_multiprocessors) / Tiles::kCluster;
  CHECK(clusters <= std::max(num_multiprocessors / Tiles::kCluster, 1), name + ": not resident");
}

void CheckSchedules() {
  for (const int num_multiprocessors : {1, 2, 7, 114, 132}) {
    for (const int64_t num_rows : {1, 128, 257, 2500, 8192, 20000}) {
      for (const int64_t num_columns : {8, 256, 1000, 4096}) {
        CheckSchedule<WideRoutedTiles>(num_rows, num_columns, num_multiprocessors);
        CheckSchedule<NarrowRoutedTiles>(num_rows, num_columns, num_multiprocessors);
      }
    }
  }
}

// Narrow tiles lie in the store buffers, and apart from all else.
template <class Tiles>
void CheckLayout() {
  std::vector<std::pair<uint32_t, uint32_t>> pieces = {{Tiles::Stored(), gemm::kBarrierBytes}};
  for (int stage = 0; stage < Tiles::kStages; ++stage) {
    pieces.push_back({Tiles::Left(stage), Tiles::kLeftBytes});
    pieces.push_back({Tiles::Right(stage), Tiles::kRightBytes});
    pieces.push_back({Tiles::Narrow(stage), gemm::kNarrowSlotBytes});
    pieces.push_back({Tiles::Full(stage), gemm::kBarrierBytes});
    pieces.push_back({Tiles::Empty(stage), gemm::kBarrierBytes});
  }
  for (int buffer = 0; buffer < gemm::kConsumers * gemm::kNumBuffers; ++buffer) {
    CHECK(Tiles::Buffer(buffer / 2, buffer % 2) == Tiles::Narrow(buffer), "not in a buffer");
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

// Fragments and columns of a warp's rows meet in a bank twice at most.
void CheckBanks() {
  for (int c = 0; c < gemm::kMaxNarrow; ++c) {
    std::vector<int> of_rows(32, 0), of_fragment(32, 0);
    for (int lane = 0; lane < 32; ++lane) {
      ++of_rows[static_cast<size_t>((c ^ gemm::SumSwizzle(lane)) % 32)];
      const int row = gemm::FragmentRow(lane, c / 2), column = gemm::FragmentColumn(lane, c / 2);
      ++of_fragment[static_cast<size_t>((column ^ gemm::SumSwizzle(row)) % 32)];
    }
    CHECK(*std::max_element(of_rows.begin(), of_rows.end()) <= 2, "rows meet in a bank");
    CHECK(*std::max_element(of_fragment.begin(), of_fragment.end()) <= 2, "fragments meet");
  }
}

void CheckRegisters() {
  const int launched = 65536 / gemm::kThreads / 8 * 8;
  CHECK(gemm::kRoutedProducerRegisters + gemm::kConsumers * gemm::kRoutedConsumerRegisters <=
            (1 + gemm::kConsumers) * launched,
        "more registers than the block has");
}

}  // namespace
}  // namespace citi

int main() {
  citi::CheckSchedules();
  citi::CheckLayout<citi::gemm::WideRoutedTiles>();
  citi::CheckLayout<citi::gemm::NarrowRoutedTiles>();
  citi::CheckBanks();
  citi::CheckRegisters();
  citi::CheckValuesOfAll();
  return citi::Report();
}
