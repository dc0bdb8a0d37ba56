// The CUDA kernels of grouped products, run on the host: values against a naive loop.

// Device code needs its words first.
// clang-format off
#include "simt_tensor_core.h"
#include "cuda/grouped_launches.h"
// clang-format on
#include "grouped_cases.h"

namespace citi {
namespace {

void Run(const GroupedProduct& product) {
  CHECK(Invalid(product, NumColumnTiles(product.num_out)) == "",
        Invalid(product, NumColumnTiles(product.num_out)));
  const ProductPlan plan = PlanProduct(product);
  WithTile(product.rows.matrix.dtype, plan.columns, [&](auto element, auto columns) {
    using Element = decltype(element);
    constexpr int kColumns = decltype(columns)::value;
    if (product.weight_is_out_in) {
      simt::LaunchShared(plan.num_blocks, kGroupThreads, ProductTile<kColumns, true>::kSharedBytes,
                         MultiplyGroups<Element, kColumns, true>, plan.launch);
    } else {
      simt::LaunchShared(plan.num_blocks, kGroupThreads, ProductTile<kColumns, false>::kSharedBytes,
                         MultiplyGroups<Element, kColumns, false>, plan.launch);
    }
  });
}

void Run(const GroupedGradient& gradient) {
  CHECK(Invalid(gradient) == "", Invalid(gradient));
  const GradientPlan plan = PlanGradient(gradient);
  WithTile(gradient.left.matrix.dtype, plan.columns, [&](auto element, auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    simt::LaunchShared(plan.num_blocks, kGroupThreads, GradientTile<kColumns>::kSharedBytes,
                       SumGroups<decltype(element), kColumns>, plan.launch);
  });
}

enum class Use { kShrink, kExpand, kRankGradient, kInputGradient };

struct ProductCase {
  Use use;
  int64_t num_tokens, num_experts, top_k, rank, num_features;
  DType dtype;
  DType out_dtype;
  Spread spread;
  Layout layout;
  bool adds;

  bool by_slot_in() const { return use == Use::kExpand || use == Use::kInputGradient; }
  bool by_slot_out() const { return !by_slot_in(); }
  bool is_out_in() const { return use == Use::kShrink || use == Use::kExpand; }
  bool experts_in_rows() const { return use == Use::kShrink || use == Use::kInputGradient; }
  bool is_scaled() const { return use == Use::kExpand || use == Use::kRankGradient; }
  bool has_dots() const { return use == Use::kRankGradient; }
  int64_t num_in() const { return by_slot_in() ? rank : num_features; }
  int64_t num_out() const { return by_slot_in() ? num_features : rank; }
  std::string Name() const {
    return "use " + std::to_string(static_cast<int>(use)) + ", tokens " +
           std::to_string(num_tokens) + ", experts " + std::to_string(num_experts) + ", top_k " +
           std::to_string(top_k) + ", rank " + std::to_string(rank) + ", features " +
           std::to_string(num_features) + ", dtype " + std::to_string(static_cast<int>(dtype));
  }
};

// One use of a grouped product with all that it points to.
class ProductProblem {
 public:
  explicit ProductProblem(const ProductCase& c)
      : routing(c.num_tokens, c.num_experts, c.top_k, c.spread),
        rows(c.by_slot_in() ? routing.num_slots() : c.num_tokens, c.num_in(), c.dtype, c.layout, 1),
        weight(WeightRows(c), WeightColumns(c), c.dtype, c.layout, 2),
        gates(c.num_tokens, c.num_experts + 1, DType::kFloat32, Layout::kRowsApart, 3),
        factors(routing.num_slots(), c.num_out(), c.dtype, c.layout, 4),
        out(c.by_slot_out() ? routing.num_slots() : c.num_tokens, c.num_out(), c.out_dtype,
            c.layout, c.adds),
        dots(static_cast<size_t>(NumColumnTiles(c.num_out()) * routing.num_slots()), std::nanf("")),
        case_(c) {}

  GroupedProduct Arguments(int64_t first_choice, int64_t end_choice, bool adds) {
    const ProductCase& c = case_;
    GroupedProduct p{};
    p.routing = routing.AsRouting();
    p.first_choice = first_choice, p.end_choice = end_choice;
    p.num_in = c.num_in(), p.num_out = c.num_out();
    p.rows = {rows.AsMatrix(), c.by_slot_in()};
    p.weight = weight.AsMatrix();
    p.weight_is_out_in = c.is_out_in();
    p.experts_in_rows = c.experts_in_rows();
    p.out = {out.matrix.AsMatrix(), c.by_slot_out()};
    p.adds = adds;
    if (c.is_scaled()) p.gates = gates.AsMatrix();
    p.scaling = Scaling();
    if (!c.has_dots()) return p;
    p.factors = factors.AsMatrix();
    const auto size = static_cast<int64_t>(dots.size());
    p.dots = {dots.data(), size * 4, DType::kFloat32, size};
    return p;
  }

  // All slots at once where rows of out are slots, else choice after choice.
  void RunAll() {
    if (case_.by_slot_out()) return Run(Arguments(0, case_.top_k, case_.adds));
    for (int64_t choice = 0; choice < case_.top_k; ++choice) {
      Run(Arguments(choice, choice + 1, case_.adds || choice > 0));
    }
  }

  double Weight(int64_t expert, int64_t in, int64_t out_column) {
    int64_t row = case_.is_out_in() ? out_column : in;
    int64_t column = case_.is_out_in() ? in : out_column;
    int64_t& stacked = case_.experts_in_rows() ? row : column;
    stacked += expert * (case_.experts_in_rows() ? WeightRows(case_) : WeightColumns(case_)) /
               case_.num_experts;
    return weight.Get(row, column);
  }
  float Scaling() const { return case_.is_scaled() ? 0.5f : 1.0f; }

  TestRouting routing;
  TestMatrix rows, weight, gates, factors;
  TestOutput out;
  std::vector<float> dots;

 private:
  static int64_t WeightRows(const ProductCase& c) {
    return (c.is_out_in() ? c.num_out() : c.num_in()) * (c.experts_in_rows() ? c.num_experts : 1);
  }
  static int64_t WeightColumns(const ProductCase& c) {
    return (c.is_out_in() ? c.num_in() : c.num_out()) * (c.experts_in_rows() ? 1 : c.num_experts);
  }
  ProductCase case_;
};

// The truth of rows of out, and of the dots.
void CheckValues(const ProductCase& c, ProductProblem* problem) {
  const auto num_rows = static_cast<size_t>(problem->out.matrix.rows());
  const auto num_out = static_cast<size_t>(c.num_out());
  std::vector<std::vector<double>> truth(num_rows, std::vector<double>(num_out, 0.0));
  std::vector<std::vector<double>> scale = truth;
  std::vector<double> dots(static_cast<size_t>(problem->routing.num_slots()), 0.0);
  std::vector<double> dot_scales = dots;
  for (int64_t slot = 0; slot < problem->routing.num_slots(); ++slot) {
    const int64_t token = problem->routing.Token(slot), expert = problem->routing.Expert(slot);
    const auto row = static_cast<size_t>(c.by_slot_out() ? slot : token);
    const double factor = static_cast<double>(problem->Scaling()) *
                          (c.is_scaled() ? problem->gates.Get(token, 1 + expert) : 1.0);
    for (size_t n = 0; n < num_out; ++n) {
      const auto column = static_cast<int64_t>(n);
      double sum = 0.0, absolute = 0.0;
      for (int64_t k = 0; k < c.num_in(); ++k) {
        const double term = problem->rows.Get(c.by_slot_in() ? slot : token, k) *
                            problem->Weight(expert, k, column);
        sum += term, absolute += std::fabs(term);
      }
      truth[row][n] += factor * sum;
      scale[row][n] += std::fabs(factor) * absolute;
      const auto flat = static_cast<size_t>(problem->routing.order[static_cast<size_t>(slot)]);
      const double factor_of_dot = problem->factors.Get(slot, column) * problem->Scaling();
      dots[flat] += factor_of_dot * sum, dot_scales[flat] += std::fabs(factor_of_dot) * absolute;
    }
  }
  bool is_right = true, has_right_dots = true;
  for (size_t row = 0; row < num_rows; ++row) {
    for (size_t n = 0; n < num_out; ++n) {
      const auto at_row = static_cast<int64_t>(row), column = static_cast<int64_t>(n);
      const double before = c.adds ? problem->out.Before(at_row, column) : 0.0;
      const double wanted = before + truth[row][n], sum = std::fabs(before) + scale[row][n];
      // A row of a token is rounded at each of its choices.
      const double rounded =
          c.by_slot_out() ? std::fabs(wanted) : static_cast<double>(c.top_k) * sum;
      is_right = is_right && IsClose(problem->out.matrix.Get(at_row, column), wanted, sum, rounded,
                                     c.out_dtype);
    }
  }
  CHECK(is_right, c.Name() + ": not the truth");
  CHECK(problem->out.IsIntactBetweenRows(), c.Name() + ": writes between the rows");
  if (!c.has_dots()) return;
  const auto num_slots = dots.size();
  for (size_t flat = 0; flat < num_slots; ++flat) {
    double sum = 0.0;
    for (size_t at = flat; at < problem->dots.size(); at += num_slots) {
      sum += static_cast<double>(problem->dots[at]);
    }
    has_right_dots =
        has_right_dots && IsClose(sum, dots[flat], dot_scales[flat], 0.0, DType::kFloat32);
  }
  CHECK(has_right_dots, c.Name() + ": dots are not the truth");
}

void CheckCase(const ProductCase& c) {
  ProductProblem problem(c);
  problem.RunAll();
  CheckValues(c, &problem);
}

void CheckProducts() {
  const DType bf16 = DType::kBFloat16, f16 = DType::kFloat16, f32 = DType::kFloat32;
  // Whole vectors, more depths than stages, more than a tile of rows for an expert.
  CheckCase({Use::kShrink, 70, 3, 1, 24, 328, bf16, bf16, Spread::kRandom, Layout::kDense, false});
  CheckCase({Use::kShrink, 70, 2, 1, 40, 72, f16, f16, Spread::kAllOnOne, Layout::kDense, false});
  CheckCase({Use::kExpand, 40, 3, 2, 40, 136, bf16, bf16, Spread::kRandom, Layout::kDense, true});
  CheckCase({Use::kExpand, 9, 4, 2, 8, 48, f16, f32, Spread::kSomeEmpty, Layout::kDense, false});
  CheckCase({Use::kRankGradient, 66, 4, 2, 8, 136, bf16, bf16, Spread::kSomeEmpty, Layout::kDense,
             false});
  CheckCase(
      {Use::kInputGradient, 20, 3, 2, 24, 72, f16, f16, Spread::kRandom, Layout::kDense, true});
  CheckCase(
      {Use::kRankGradient, 70, 3, 1, 40, 264, f16, f16, Spread::kAllOnOne, Layout::kDense, false});
  // Elements one by one, odd sizes, NaN between the rows.
  CheckCase({Use::kShrink, 9, 3, 2, 1, 19, bf16, bf16, Spread::kRandom, Layout::kRowsApart, false});
  CheckCase({Use::kExpand, 17, 3, 2, 3, 35, bf16, bf16, Spread::kRandom, Layout::kRowsApart, true});
  CheckCase(
      {Use::kRankGradient, 9, 3, 1, 131, 70, f16, f16, Spread::kRandom, Layout::kRowsApart, false});
  CheckCase({Use::kInputGradient, 5, 130, 2, 9, 33, bf16, f32, Spread::kRandom, Layout::kRowsApart,
             false});
}

// A block's run of several column tiles, which launches of this size would not have.
void CheckRuns() {
  ProductProblem problem({Use::kExpand, 20, 2, 1, 8, 300, DType::kBFloat16, DType::kBFloat16,
                          Spread::kRandom, Layout::kDense, true});
  ProductPlan plan = PlanProduct(problem.Arguments(0, 1, true));
  plan.num_blocks /= plan.launch.num_runs;
  plan.launch.run = 2, plan.launch.num_runs = 2;
  simt::LaunchShared(plan.num_blocks * 2, kGroupThreads, ProductTile<128, true>::kSharedBytes,
                     MultiplyGroups<BFloat16, 128, true>, plan.launch);
  CheckValues({Use::kExpand, 20, 2, 1, 8, 300, DType::kBFloat16, DType::kBFloat16, Spread::kRandom,
               Layout::kDense, true},
              &problem);
}

struct GradientCase {
  bool is_of_a;
  int64_t num_tokens, num_experts, top_k, rank, num_features;
  DType dtype;
  DType out_dtype;
  Spread spread;
  Layout layout;
};

class GradientProblem {
 public:
  explicit GradientProblem(const GradientCase& c)
      : routing(c.num_tokens, c.num_experts, c.top_k, c.spread),
        tokens(c.num_tokens, c.num_features, c.dtype, c.layout, 1),
        slots(routing.num_slots(), c.rank, c.dtype, c.layout, 2),
        out(c.is_of_a ? c.num_experts * c.rank : c.num_features,
            c.is_of_a ? c.num_features : c.num_experts * c.rank, c.out_dtype, c.layout, false),
        case_(c) {}
  GroupedGradient Arguments() {
    const Rows of_tokens{tokens.AsMatrix(), false}, of_slots{slots.AsMatrix(), true};
    return {routing.AsRouting(),
            case_.is_of_a ? case_.rank : case_.num_features,
            case_.is_of_a ? case_.num_features : case_.rank,
            case_.is_of_a ? of_slots : of_tokens,
            case_.is_of_a ? of_tokens : of_slots,
            out.matrix.AsMatrix(),
            case_.is_of_a};
  }

  TestRouting routing;
  TestMatrix tokens, slots;
  TestOutput out;

 private:
  GradientCase case_;
};

void CheckCase(const GradientCase& c) {
  GradientProblem problem(c);
  Run(problem.Arguments());
  bool is_right = true;
  for (int64_t expert = 0; expert < c.num_experts; ++expert) {
    for (int64_t r = 0; r < c.rank; ++r) {
      for (int64_t f = 0; f < c.num_features; ++f) {
        double sum = 0.0, absolute = 0.0;
        for (int64_t slot = 0; slot < problem.routing.num_slots(); ++slot) {
          if (problem.routing.Expert(slot) != expert) continue;
          const double term =
              problem.slots.Get(slot, r) * problem.tokens.Get(problem.routing.Token(slot), f);
          sum += term, absolute += std::fabs(term);
        }
        const int64_t stacked = expert * c.rank + r;
        const double ours =
            problem.out.matrix.Get(c.is_of_a ? stacked : f, c.is_of_a ? f : stacked);
        // Without a slot: exactly 0.
        is_right = is_right && IsClose(ours, sum, absolute, std::fabs(sum), c.out_dtype);
      }
    }
  }
  const std::string name = (c.is_of_a ? "da, rank " : "db, rank ") + std::to_string(c.rank);
  CHECK(is_right, name + ": not the truth");
  CHECK(problem.out.IsIntactBetweenRows(), name + ": writes between the rows");
}

void CheckGradients() {
  const DType bf16 = DType::kBFloat16, f16 = DType::kFloat16, f32 = DType::kFloat32;
  // More steps than stages, experts without slots, ends within a step.
  CheckCase({true, 200, 2, 1, 8, 72, bf16, bf16, Spread::kAllOnOne, Layout::kDense});
  CheckCase({false, 70, 4, 2, 24, 72, f16, f16, Spread::kSomeEmpty, Layout::kDense});
  CheckCase({false, 35, 3, 2, 40, 16, bf16, f32, Spread::kRandom, Layout::kDense});
  CheckCase({true, 35, 3, 1, 65, 19, f16, f32, Spread::kRandom, Layout::kRowsApart});
  CheckCase({false, 9, 3, 2, 1, 33, bf16, bf16, Spread::kRandom, Layout::kRowsApart});
}

// NaN of an expert that a token does not keep, and of another token, reaches no row of it.
void CheckNan() {
  ProductProblem problem({Use::kExpand, 12, 3, 1, 8, 40, DType::kBFloat16, DType::kBFloat16,
                          Spread::kRandom, Layout::kDense, true});
  for (int64_t n = 0; n < 40; ++n) {
    for (int64_t r = 0; r < 8; ++r) PutNan(DType::kBFloat16, problem.weight.At(n, 2 * 8 + r));
  }
  PutNan(DType::kBFloat16, problem.rows.At(0, 3));
  problem.RunAll();
  for (int64_t slot = 0; slot < problem.routing.num_slots(); ++slot) {
    const bool has_nan = problem.routing.Expert(slot) == 2 || slot == 0;
    for (int64_t n = 0; n < 40; ++n) {
      CHECK(std::isnan(problem.out.matrix.Get(problem.routing.Token(slot), n)) == has_nan,
            "NaN of a dropped expert or of another token");
    }
  }
}

// Wrong entries of order and offsets leave slots out, and touch nothing that is not theirs.
void CheckWrongIndices() {
  std::mt19937 random(3);
  for (int repeat = 0; repeat < 3; ++repeat) {
    const DType bf16 = DType::kBFloat16;
    ProductProblem expand(
        {Use::kExpand, 12, 3, 1, 8, 40, bf16, bf16, Spread::kRandom, Layout::kRowsApart, true});
    ProductProblem ranks({Use::kRankGradient, 12, 3, 1, 8, 40, bf16, bf16, Spread::kRandom,
                          Layout::kRowsApart, false});
    GradientProblem gradient(
        {true, 12, 3, 1, 8, 24, bf16, bf16, Spread::kRandom, Layout::kRowsApart});
    for (TestRouting* routing : {&expand.routing, &ranks.routing, &gradient.routing}) {
      for (size_t i = 0; i < routing->order.size(); i += 2) {
        routing->order[i] = i % 4 == 0 ? static_cast<int32_t>(random()) : 12 + repeat;
      }
      for (size_t i = static_cast<size_t>(repeat); i < routing->offsets.size(); i += 3) {
        routing->offsets[i] = static_cast<int32_t>(random());
      }
    }
    Run(expand.Arguments(0, 1, true));
    Run(ranks.Arguments(0, 1, false));
    Run(gradient.Arguments());
    CHECK(expand.out.IsIntactBetweenRows() && ranks.out.IsIntactBetweenRows() &&
              gradient.out.IsIntactBetweenRows(),
          "a wrong index leads beyond the rows");
    for (int64_t slot = 0; slot < 12; slot += 2) {
      CHECK(std::isnan(ranks.out.matrix.Get(slot, 0)), "a slot of no token is written");
    }
  }
}

void CheckRepeats() {
  const ProductCase c{
      Use::kRankGradient, 30,   3, 2, 24, 72, DType::kBFloat16, DType::kBFloat16, Spread::kRandom,
      Layout::kDense,     false};
  ProductProblem one(c), other(c);
  one.RunAll();
  other.RunAll();
  CHECK(one.out.Bytes() == other.out.Bytes() && one.dots == other.dots, "other bits, run again");
}

}  // namespace
}  // namespace citi

int main() {
  citi::CheckProducts();
  citi::CheckRuns();
  citi::CheckGradients();
  citi::CheckNan();
  citi::CheckWrongIndices();
  citi::CheckRepeats();
  return citi::Report();
}
