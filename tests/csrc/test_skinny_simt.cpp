// The skinny passes of a MOLoRA layer, run on the host: values against naive loops in fp64.

// Device code needs its words first.
// clang-format off
#include "simt_tensor_core.h"
#include "cuda/shrink_plan.h"
#include "cuda/factor_gradients_plan.h"
#include "cuda/rank_gradients_plan.h"
#include "cuda/input_update_plan.h"
#include "cuda/non_finite_plan.h"
#include "cuda/pack_plan.h"
// clang-format on
#include "skinny_cases.h"

namespace citi {
namespace {

constexpr Dropout kQuarter{12345u, 678u, 1u << 30, 4.0f / 3.0f};
constexpr Dropout kHalf{987u, 0x80000001u, 1u << 31, 2.0f};
constexpr int64_t kLimits[] = {kLeastSharedLimit, 227 * 1024};

struct Layer {
  RankShape shape;
  int64_t num_inputs, gap, top_k;
  bool renormalizes;
  std::optional<Dropout> dropout;

  std::string Name() const {
    return std::to_string(shape.num_tokens) + "x" + std::to_string(num_inputs) + ", " +
           std::to_string(shape.num_experts) + " experts of rank " +
           std::to_string(shape.expert_rank) + ", top " + std::to_string(top_k);
  }
};

template <class Element>
struct Shrunk {
  Table<Element> x, stack, h, u;
  Table<float> probs, parts;

  explicit Shrunk(const Layer& l)
      : x(l.shape.num_tokens, l.num_inputs, l.gap),
        stack(l.shape.num_rows(), l.num_inputs),
        h(l.shape.num_tokens, l.shape.num_ranks()),
        u(l.shape.num_tokens, l.shape.padded_ranks()),
        probs(l.shape.num_tokens, l.shape.num_gates()),
        parts(l.shape.num_tokens * ShrinkSplits(l.shape.num_tokens, l.num_inputs),
              l.shape.num_rows()) {
    x.Fill(1, 1.0), stack.Fill(2, 0.125);
    for (int64_t k = 0; k < l.num_inputs; ++k) {
      for (int64_t row = 0; row < l.shape.num_rows(); ++row) {
        const int64_t gate = row - l.shape.padded_ranks();
        const bool is_padding = gate < 0 ? row >= l.shape.num_ranks() : gate >= l.shape.num_gates();
        if (is_padding) stack(row, k) = Rounded<Element>(0.0f);
      }
    }
  }
  ShrinkArguments Arguments(const Layer& l) {
    return {l.shape,      l.num_inputs,     x.AsMatrix(),     stack.AsVector(), h.AsVector(),
            u.AsVector(), probs.AsVector(), parts.AsVector(), l.top_k,          l.renormalizes,
            0.75f,        l.dropout};
  }
};

template <class Element, int kTiles>
void LaunchShrink(const ShrinkPlan& plan, const ShrinkLaunch& launch, bool has_dropout) {
  simt::LaunchShared(plan.num_blocks, kShrinkThreads, static_cast<size_t>(plan.shared_bytes),
                     has_dropout ? Shrink<Element, kTiles, true> : Shrink<Element, kTiles, false>,
                     launch);
}

template <class Element>
void LaunchShrink(const ShrinkPlan& plan, const ShrinkLaunch& launch, bool has_dropout) {
  if (plan.row_tiles == 6) LaunchShrink<Element, 6>(plan, launch, has_dropout);
  if (plan.row_tiles == 12) LaunchShrink<Element, 12>(plan, launch, has_dropout);
  if (plan.row_tiles == 24) LaunchShrink<Element, 24>(plan, launch, has_dropout);
}

template <class Element>
void RunShrink(const ShrinkArguments& arguments, int64_t shared_limit) {
  const ShrinkPlan plan = PlanShrink(arguments.shape.num_tokens, arguments.num_inputs,
                                     arguments.shape.num_rows(), shared_limit);
  CHECK(Invalid(arguments, plan.num_splits).empty(), Invalid(arguments, plan.num_splits));
  const ShrinkLaunch launch = AsShrinkLaunch(arguments, plan);
  LaunchShrink<Element>(plan, launch, arguments.dropout.has_value());
  if (plan.num_splits == 1) return;
  simt::LaunchShared(plan.num_route_blocks, kShrinkThreads,
                     static_cast<size_t>(plan.route_shared_bytes), SumAndRoute<Element>, launch);
}

// Which gate entries a token keeps, by a stable sort.
std::vector<bool> Kept(const std::vector<double>& logits, int64_t top_k) {
  std::vector<size_t> order;
  for (size_t g = 1; g < logits.size(); ++g) order.push_back(g);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t one, size_t other) { return logits[one] > logits[other]; });
  std::vector<bool> kept(logits.size(), top_k == 0);
  kept[0] = true;
  for (int64_t i = 0; i < top_k; ++i) kept[order[static_cast<size_t>(i)]] = true;
  return kept;
}

template <class Element>
void CheckGates(const Layer& l, Shrunk<Element>& s, int64_t t) {
  const auto num_gates = static_cast<size_t>(l.shape.num_gates());
  std::vector<double> logits(num_gates, 0.0);
  for (size_t g = 0; g < num_gates; ++g) {
    for (int64_t k = 0; k < l.num_inputs; ++k) {
      logits[g] += s.x.Get(t, k) * s.stack.Get(l.shape.padded_ranks() + static_cast<int64_t>(g), k);
    }
  }
  const std::vector<bool> kept = Kept(logits, l.top_k);
  double sum = 0.0;
  const double largest = *std::max_element(logits.begin(), logits.end());
  for (size_t g = 0; g < num_gates; ++g) {
    if (kept[g] || !l.renormalizes) sum += std::exp(logits[g] - largest);
  }
  for (size_t g = 0; g < num_gates; ++g) {
    const float ours = s.probs(t, static_cast<int64_t>(g));
    const double truth = kept[g] || !l.renormalizes ? std::exp(logits[g] - largest) / sum : 0.0;
    CHECK(std::signbit(ours) != kept[g], l.Name() + ": another expert is kept");
    CHECK(IsClose(std::fabs(static_cast<double>(ours)), truth, truth + 1e-30),
          l.Name() + ": another probability");
  }
}

template <class Element>
void CheckRanks(const Layer& l, Shrunk<Element>& s, int64_t t) {
  for (int64_t r = 0; r < l.shape.num_ranks(); ++r) {
    double sum = 0.0;
    for (int64_t k = 0; k < l.num_inputs; ++k) {
      if (IsKept(l.dropout, t, k)) sum += s.x.Get(t, k) * s.stack.Get(r, k);
    }
    const float h = static_cast<float>(sum) * ScaleOf(l.dropout);
    CHECK(SameBits(s.h(t, r), Rounded<Element>(h)), l.Name() + ": another h");
    const float gate = s.probs(t, 1 + r / l.shape.expert_rank);
    const float u = std::signbit(gate) ? 0.0f : ToFloat(s.h(t, r)) * (0.75f * gate);
    CHECK(SameBits(s.u(t, r), Rounded<Element>(u)), l.Name() + ": another u");
  }
  for (int64_t r = l.shape.num_ranks(); r < l.shape.padded_ranks(); ++r) {
    CHECK(s.u.Get(t, r) == 0.0, l.Name() + ": padding of u");
  }
}

template <class Element>
void CheckShrink(const Layer& l, int64_t num_splits) {
  CHECK(ShrinkSplits(l.shape.num_tokens, l.num_inputs) == num_splits, l.Name() + ": splits");
  for (const int64_t limit : kLimits) {
    Shrunk<Element> s(l);
    RunShrink<Element>(s.Arguments(l), limit);
    for (int64_t t = 0; t < l.shape.num_tokens; ++t) {
      CheckGates(l, s, t);
      CheckRanks(l, s, t);
    }
    if (l.shape.num_rows() <= 48) continue;
    break;
  }
}

void CheckShrinks() {
  // Blocks that end early, in tokens and in K; ranks that need padding; K cut and whole.
  CheckShrink<BFloat16>({{67, 4, 8}, 72, 0, 0, false, {}}, 2);
  CheckShrink<Float16>({{5, 3, 4}, 328, 8, 2, true, kQuarter}, 6);
  CheckShrink<BFloat16>({{3, 1, 5}, 8, 16, 0, false, kHalf}, 1);
  CheckShrink<Float16>({{33, 9, 5}, 64, 0, 3, false, {}}, 1);
  CheckShrink<BFloat16>({{9, 7, 7}, 136, 8, 7, false, kQuarter}, 3);
  CheckShrink<BFloat16>({{18, 63, 2}, 40, 8, 5, true, {}}, 1);
}

template <class Element>
void CheckRowProduct() {
  Table<Element> wide(21, 144, 8), rows(64, 144);
  wide.Fill(3, 1.0), rows.Fill(4, 0.25);
  const int64_t num_splits = ShrinkSplits(21, 144);
  Table<float> parts(num_splits * 21, 64);
  const RowProductArguments arguments{
      21, 144, 64, wide.AsMatrix(), rows.AsVector(), parts.AsVector()};
  CHECK(Invalid(arguments, num_splits).empty(), Invalid(arguments, num_splits));
  const ShrinkPlan plan = PlanShrink(21, 144, 64, kLeastSharedLimit);
  LaunchShrink<Element>(plan, AsShrinkLaunch(arguments, plan), false);
  for (int64_t t = 0; t < 21; ++t) {
    for (int64_t v = 0; v < 64; ++v) {
      double ours = 0.0, truth = 0.0;
      for (int64_t part = 0; part < num_splits; ++part) ours += parts.Get(part * 21 + t, v);
      for (int64_t n = 0; n < 144; ++n) truth += wide.Get(t, n) * rows.Get(v, n);
      CHECK(ours == truth, "another product of rows");
    }
  }
}

struct Factors {
  int64_t num_tokens, num_columns, num_narrow, num_ranks, rank_columns;
  std::optional<Dropout> dropout;

  std::string Name() const {
    return std::to_string(num_tokens) + "x" + std::to_string(num_columns) + " by " +
           std::to_string(num_narrow);
  }
};

template <class Element, int kTiles>
void LaunchFactor(const FactorPlan& plan, const FactorLaunch& launch, bool has_dropout) {
  auto* kernel = has_dropout ? FactorGradients<Element, kTiles, false, true>
                             : FactorGradients<Element, kTiles, false, false>;
  simt::LaunchShared(plan.num_blocks, kFactorThreads, static_cast<size_t>(plan.shared_bytes),
                     kernel, launch);
}

template <class Element>
void RunFactor(const FactorArguments& arguments, const FactorPlan& plan) {
  CHECK(Invalid(arguments, plan.cut.num_tiles, plan.cut.num_shares).empty(),
        Invalid(arguments, plan.cut.num_tiles, plan.cut.num_shares));
  const FactorLaunch launch = AsFactorLaunch(arguments, plan);
  const bool has_dropout = arguments.dropout.has_value();
  if (plan.column_tiles == kUpTiles && arguments.num_ranks == 0) {
    LaunchFactor<Element, kUpTiles>(plan, launch, has_dropout);
  } else if (plan.column_tiles == kUpTiles) {
    simt::LaunchShared(plan.num_blocks, kFactorThreads, static_cast<size_t>(plan.shared_bytes),
                       FactorGradients<Element, kUpTiles, true, false>, launch);
  }
  if (plan.column_tiles == 6) LaunchFactor<Element, 6>(plan, launch, has_dropout);
  if (plan.column_tiles == 12) LaunchFactor<Element, 12>(plan, launch, has_dropout);
  if (plan.column_tiles == 24) LaunchFactor<Element, 24>(plan, launch, has_dropout);
}

// The sums of the parts, in fp32 as they lie and transposed in the dtype.
template <class Element>
void CheckSums(const Factors& f, Table<Element>& wide, Table<Element>& narrow, Table<float>& parts,
               int64_t num_shares) {
  const int64_t last = f.num_narrow - 1;
  Table<float> sums(f.num_columns, last);
  Table<Element> column(1, f.num_columns);
  const SumArguments arguments{
      num_shares,
      f.num_columns,
      f.num_narrow,
      parts.AsVector(),
      {{sums.AsVector(), 0, last, false}, {column.AsVector(), last, 1, true}}};
  CHECK(Invalid(arguments).empty(), Invalid(arguments));
  simt::Launch(PlanSumShares(f.num_columns, f.num_narrow).num_blocks, kSumThreads, SumShares,
               AsSumLaunch(arguments));
  for (int64_t n = 0; n < f.num_columns; ++n) {
    for (int64_t v = 0; v < f.num_narrow; ++v) {
      const bool is_dropped_out = f.dropout && v < f.rank_columns;
      double truth = 0.0;
      for (int64_t t = 0; t < f.num_tokens; ++t) {
        if (!is_dropped_out || IsKept(f.dropout, t, n)) truth += wide.Get(t, n) * narrow.Get(t, v);
      }
      if (is_dropped_out) truth *= static_cast<double>(ScaleOf(f.dropout));
      const bool is_same =
          v < last ? sums.Get(n, v) == truth
                   : SameBits(column(0, n), Rounded<Element>(static_cast<float>(truth)));
      CHECK(is_same, f.Name() + ": another sum over tokens");
    }
  }
}

template <class Element>
void CheckFactors(const Factors& f, int64_t limit, bool fits_narrow = false) {
  Table<Element> wide(f.num_tokens, f.num_columns, 8), narrow(f.num_tokens, f.num_narrow, 16);
  wide.Fill(5, 1.0), narrow.Fill(6, 0.5);
  Table<Element> b(f.num_columns, std::max(f.num_ranks, int64_t{1}));
  b.Fill(7, 0.25);
  const bool gives_ranks = f.num_ranks != 0;
  const FactorPlan plan =
      PlanFactor(f.num_tokens, f.num_columns, f.num_narrow, gives_ranks, limit, fits_narrow);
  CHECK(!fits_narrow || plan.column_tiles == kUpTiles, "products that are wider than needed");
  Table<float> du(plan.cut.num_tiles * f.num_tokens, f.num_narrow);
  Table<float> parts(plan.cut.num_shares * f.num_columns, f.num_narrow);
  RunFactor<Element>({f.num_tokens, f.num_columns, f.num_narrow, f.num_ranks, f.rank_columns,
                      wide.AsMatrix(), narrow.AsMatrix(), gives_ranks ? b.AsVector() : Vector{},
                      gives_ranks ? du.AsVector() : Vector{}, parts.AsVector(), f.dropout},
                     plan);
  CheckSums(f, wide, narrow, parts, plan.cut.num_shares);
  for (int64_t t = 0; gives_ranks && t < f.num_tokens; ++t) {
    for (int64_t r = 0; r < f.num_narrow; ++r) {
      double ours = 0.0, truth = 0.0;
      for (int64_t tile = 0; tile < plan.cut.num_tiles; ++tile) {
        ours += du.Get(tile * f.num_tokens + t, r);
      }
      for (int64_t n = 0; r < f.num_ranks && n < f.num_columns; ++n) {
        truth += wide.Get(t, n) * b.Get(n, r);
      }
      CHECK(ours == truth, f.Name() + ": another du");
    }
  }
}

// A launch that looks at counts does all parts or none; the one behind it those that are not there.
template <class Element>
void CheckFactorsInTwo(const Factors& f, int64_t limit) {
  for (const int32_t last_count : {2, 1}) {
    Table<Element> wide(f.num_tokens, f.num_columns, 8), narrow(f.num_tokens, f.num_narrow);
    wide.Fill(5, 1.0), narrow.Fill(6, 0.5);
    const FactorPlan plan = PlanFactor(f.num_tokens, f.num_columns, f.num_narrow, false, limit);
    const int64_t num_blocks = plan.cut.num_tiles * plan.cut.num_shares;
    Table<float> parts(plan.cut.num_shares * f.num_columns, f.num_narrow);
    std::vector<int32_t> counts(kFactorThreads + 1, 2), done(static_cast<size_t>(num_blocks), 0);
    counts.back() = last_count;
    FactorArguments arguments{f.num_tokens,   f.num_columns,    f.num_narrow,      0,
                              f.rank_columns, wide.AsMatrix(),  narrow.AsMatrix(), Vector{},
                              Vector{},       parts.AsVector(), f.dropout};
    arguments.counts = {counts.data(), static_cast<int64_t>(counts.size()) * 4,
                        static_cast<int64_t>(counts.size())};
    arguments.done = {done.data(), num_blocks * 4, num_blocks};
    RunFactor<Element>(arguments, plan);
    for (const int32_t each : done) CHECK(each == (last_count == 2 ? 1 : 0), "all parts or none");
    CHECK(std::isnan(parts(0, 0)) == (last_count != 2), "a part that is not counted");
    const int64_t kept = num_blocks / 2;
    if (last_count == 2) {
      // Were they made again, it would show.
      wide.Fill(9, 2.0);
    } else {
      done[static_cast<size_t>(kept)] = 1;
    }
    arguments.counts = {};
    RunFactor<Element>(arguments, plan);
    wide.Fill(5, 1.0);
    if (last_count != 2) {
      const int64_t share = kept / plan.cut.num_tiles, tile = kept % plan.cut.num_tiles;
      const int64_t column = tile * FactorColumns(plan.column_tiles);
      CHECK(std::isnan(parts(share * f.num_columns + column, 0)), "a part that was done, again");
      done[static_cast<size_t>(kept)] = 0;
      RunFactor<Element>(arguments, plan);
    }
    CheckSums(f, wide, narrow, parts, plan.cut.num_shares);
  }
}

void CheckAllFactors() {
  // Both rings; shares that end early; columns of two tiles and of less than one; ragged ranks.
  CheckFactors<BFloat16>({150, 264, 32, 32, 0, {}}, kLimits[0]);
  CheckFactors<Float16>({70, 40, 16, 12, 0, {}}, kLimits[1]);
  CheckFactors<BFloat16>({131, 72, 40, 0, 32, {}}, kLimits[0]);
  CheckFactors<Float16>({37, 264, 40, 0, 24, kHalf}, kLimits[1]);
  CheckFactors<BFloat16>({66, 136, 56, 0, 40, kHalf}, kLimits[0]);
  CheckFactors<Float16>({66, 16, 96, 0, 0, {}}, kLimits[1]);
  CheckFactors<BFloat16>({65, 24, 192, 0, 128, kHalf}, kLimits[0]);
  CheckFactors<BFloat16>({150, 264, 32, 0, 0, {}}, kLimits[0], true);
  CheckFactors<Float16>({70, 40, 16, 0, 8, kHalf}, kLimits[1], true);
  CheckFactorsInTwo<BFloat16>({150, 264, 40, 0, 0, {}}, kLimits[0]);
  CheckFactorsInTwo<Float16>({70, 40, 56, 0, 0, {}}, kLimits[1]);
}

template <class Element>
void CheckRankGradients(const RankShape& shape, int64_t num_parts, bool has_dgate) {
  const auto [num_tokens, num_experts, expert_rank] = shape;
  Table<float> du(std::max(num_parts, int64_t{1}) * num_tokens, shape.padded_ranks());
  Table<float> probs(num_tokens, shape.num_gates()), dgate(num_tokens, shape.num_gates());
  Table<Element> h(num_tokens, shape.num_ranks()), dz(num_tokens, shape.num_rows());
  Table<Element> u(num_tokens, shape.padded_ranks());
  du.Fill(8, 0.5), dgate.Fill(9, 0.25), h.Fill(10, 0.25), probs.Fill(11, 0.125);
  const RankArguments arguments{shape,
                                num_parts,
                                num_parts > 0 ? du.AsVector() : Vector{},
                                h.AsVector(),
                                probs.AsVector(),
                                has_dgate ? dgate.AsVector() : Vector{},
                                dz.AsVector(),
                                0.5f};
  CHECK(Invalid(arguments).empty(), Invalid(arguments));
  const BlockPlan plan = PlanRankGradients(num_tokens, shape.padded_ranks(), shape.num_gates());
  simt::LaunchShared(plan.num_blocks, kRankThreads, static_cast<size_t>(plan.shared_bytes),
                     RankGradients<Element>, AsRankLaunch(arguments));
  const ScaleArguments scale{shape, h.AsVector(), probs.AsVector(), u.AsVector(), 0.5f};
  CHECK(Invalid(scale).empty(), Invalid(scale));
  simt::Launch(PlanScaleRanks(num_tokens, shape.padded_ranks()).num_blocks, kSumThreads,
               ScaleRanks<Element>, AsRankLaunch(scale));
  const double eps = std::is_same_v<Element, BFloat16> ? 1.0 / 256 : 1.0 / 2048;
  for (int64_t t = 0; t < num_tokens; ++t) {
    std::vector<double> gradients(static_cast<size_t>(shape.num_gates()), 0.0);
    double inner = 0.0;
    for (int64_t g = 0; g <= num_experts; ++g) {
      const bool is_dropped = std::signbit(probs(t, g));
      double sum = has_dgate ? dgate.Get(t, g) : 0.0;
      for (int64_t i = 0; g > 0 && i < expert_rank; ++i) {
        const int64_t r = (g - 1) * expert_rank + i;
        double of_rank = 0.0;
        for (int64_t c = 0; c < num_parts; ++c) of_rank += du.Get(c * num_tokens + t, r);
        const double gate = is_dropped ? 0.0 : 0.5 * probs.Get(t, g);
        sum += 0.5 * of_rank * h.Get(t, r);
        CHECK(std::fabs(dz.Get(t, r) - of_rank * gate) <= eps * std::fabs(of_rank * gate),
              "another dh");
        CHECK(std::fabs(u.Get(t, r) - h.Get(t, r) * gate) <= eps * std::fabs(h.Get(t, r) * gate),
              "another u");
      }
      gradients[static_cast<size_t>(g)] = is_dropped ? 0.0 : sum;
      inner += std::fabs(probs.Get(t, g)) * gradients[static_cast<size_t>(g)];
    }
    for (int64_t g = 0; g <= num_experts; ++g) {
      const double prob = std::fabs(probs.Get(t, g));
      const double truth = prob * (gradients[static_cast<size_t>(g)] - inner);
      const double ours = dz.Get(t, shape.padded_ranks() + g);
      CHECK(std::fabs(ours - truth) <= eps * std::fabs(truth) + 1e-5, "another dlogit");
    }
    for (int64_t z = 0; z < shape.num_rows(); ++z) {
      const bool is_padding = z < shape.padded_ranks()
                                  ? z >= shape.num_ranks()
                                  : z >= shape.padded_ranks() + shape.num_gates();
      if (is_padding) CHECK(dz.Get(t, z) == 0.0, "padding of dz");
      if (z >= shape.num_ranks() && z < shape.padded_ranks()) {
        CHECK(u.Get(t, z) == 0.0, "padding of u");
      }
    }
  }
}

template <class Element>
void CheckInputUpdate(const RankShape& shape, int64_t num_inputs, bool has_base) {
  const int64_t num_tokens = shape.num_tokens, num_rows = shape.num_rows();
  Table<Element> dx(num_tokens, num_inputs, 8), dz(num_tokens, num_rows);
  Table<Element> stack(num_rows, num_inputs);
  if (has_base) dx.Fill(12, 1.0);
  dz.Fill(13, 0.5), stack.Fill(18, 0.25);
  Table<Element> before = dx;
  const InputUpdateArguments arguments{
      shape, num_inputs, dx.AsMatrix(), dz.AsVector(), stack.AsVector(), has_base, kHalf};
  CHECK(Invalid(arguments).empty(), Invalid(arguments));
  const InputPlan plan = PlanInputUpdate(arguments);
  CHECK(plan.shared_bytes <= kLeastSharedLimit, "too much shared memory");
  simt::LaunchShared(plan.num_blocks, kInputThreads, static_cast<size_t>(plan.shared_bytes),
                     UpdateInputGradient<Element>, plan.launch);
  for (int64_t t = 0; t < num_tokens; ++t) {
    for (int64_t k = 0; k < num_inputs; ++k) {
      double truth = has_base ? before.Get(t, k) : 0.0;
      for (int64_t z = 0; z < num_rows; ++z) {
        const double scale = z >= shape.padded_ranks() ? 1.0 : IsKept(kHalf, t, k) ? 2.0 : 0.0;
        truth += scale * dz.Get(t, z) * stack.Get(z, k);
      }
      CHECK(SameBits(dx(t, k), Rounded<Element>(static_cast<float>(truth))), "another dx");
    }
  }
}

template <class Element>
void CheckNonFinite(bool is_transposed, const std::optional<Dropout>& dropout) {
  const RankShape shape{19, 3, 2};
  Table<Element> out(19, 140), left(19, 6, 2), right(6, 140), transposed(140, 6);
  Table<float> probs(19, 4);
  out.Fill(14, 1.0), left.Fill(15, 1.0), right.Fill(16, 1.0), probs.Fill(17, 0.125);
  right(2, 5) = Rounded<Element>(std::nanf("")), right(3, 5) = Rounded<Element>(INFINITY);
  right(4, 131) = Rounded<Element>(-INFINITY);
  for (int64_t r = 0; r < 6; ++r) {
    for (int64_t n = 0; n < 140; ++n) transposed(n, r) = right(r, n);
  }
  Table<Element> before = out;
  Matrix of_right = right.AsMatrix();
  if (is_transposed) {
    of_right = transposed.AsMatrix();
    std::swap(of_right.row_stride, of_right.column_stride);
  }
  const NonFiniteArguments arguments{
      shape, 140, out.AsVector(), left.AsMatrix(), of_right, probs.AsVector(), dropout};
  CHECK(Invalid(arguments).empty(), Invalid(arguments));
  const NonFinitePlan plan = PlanNonFinite(arguments);
  simt::Launch(plan.num_blocks, kNonFiniteThreads, AddNonFinite<Element>, plan.launch);
  for (int64_t t = 0; t < 19; ++t) {
    for (int64_t n = 0; n < 140; ++n) {
      double truth = before.Get(t, n);
      for (int64_t r = 0; IsKept(dropout, t, n) && r < 6; ++r) {
        if (!std::isfinite(right.Get(r, n)) && !std::signbit(probs(t, 1 + r / 2))) {
          truth += left.Get(t, r) * right.Get(r, n);
        }
      }
      const double ours = out.Get(t, n);
      CHECK(std::isnan(truth) ? std::isnan(ours) : ours == truth, "NaN or inf at another token");
    }
  }
}

// Two sources of their own dtypes, the second one transposed; the rest of the rows is zero.
template <class Element, class First, class Second>
void CheckPack(int64_t num_columns, int64_t num_zeros) {
  const int64_t gap = 2, out_columns = (num_columns + 7) / 8 * 8 + num_zeros;
  Table<First> first(5, num_columns, 3);
  Table<Second> second(num_columns, 4);
  Table<Element> out(5 + gap + 4 + 1, out_columns);
  first.Fill(21, 0.3), second.Fill(22, 0.7);
  first(1, 2) = Rounded<First>(std::nanf("")), second(2, 1) = Rounded<Second>(INFINITY);
  // More of them than chunks to write, too.
  std::vector<int32_t> zeros(static_cast<size_t>(200), -1);
  Matrix transposed = second.AsMatrix();
  std::swap(transposed.row_stride, transposed.column_stride);
  const PackArguments arguments{
      out.rows,
      out_columns,
      {{first.AsMatrix(), 0, 5, num_columns}, {transposed, 5 + gap, 4, num_columns}},
      out.AsVector(),
      {zeros.data(), static_cast<int64_t>(zeros.size()) * 4, static_cast<int64_t>(zeros.size())}};
  CHECK(Invalid(arguments).empty(), Invalid(arguments));
  const PackPlan plan = PlanPack(arguments);
  simt::Launch(plan.num_blocks, kPackThreads, PackRows<Element>, plan.launch);
  for (const int32_t zero : zeros) CHECK(zero == 0, "a number that did not become zero");
  for (int64_t r = 0; r < out.rows; ++r) {
    for (int64_t c = 0; c < out_columns; ++c) {
      float truth = 0.0f;
      if (c < num_columns && r < 5) truth = ToFloat(first(r, c));
      if (c < num_columns && r >= 5 + gap && r < 9 + gap) truth = ToFloat(second(c, r - 5 - gap));
      const bool is_same = std::isnan(truth) ? std::isnan(out.Get(r, c))
                                             : SameBits(out(r, c), Rounded<Element>(truth));
      CHECK(is_same, "another entry of what was packed");
    }
  }
}

void CheckPlans() {
  for (const int64_t num_tokens : {1, 63, 64, 512, 2048, 8192, 1 << 20}) {
    for (const int64_t size : {8, 576, 4096, 14336}) {
      const int64_t splits = ShrinkSplits(num_tokens, size);
      const ShrinkPlan plan = PlanShrink(num_tokens, size, 192, kLeastSharedLimit);
      CHECK(splits == plan.num_splits && splits >= 1, "splits");
      CHECK((splits - 1) * plan.tiles_per_split * kShrinkDepth < size, "a split without work");
      CHECK(splits * plan.tiles_per_split * kShrinkDepth >= size, "inputs that none sums");
      for (const int64_t columns : {8, 32, 40, 96, 192}) {
        for (const int64_t limit : kLimits) {
          const bool gives_ranks = GivesRanksInOnePass(columns);
          const FactorPlan factor = PlanFactor(num_tokens, size, columns, gives_ranks, limit);
          CHECK((factor.cut.num_shares - 1) * factor.cut.tokens_per_share < num_tokens,
                "idle share");
          CHECK(factor.cut.num_shares * factor.cut.tokens_per_share >= num_tokens, "tokens left");
          CHECK(factor.shared_bytes <= limit, "too much shared memory");
          CHECK(PlanShrink(num_tokens, size, columns, limit).shared_bytes <= limit,
                "too much shared memory");
        }
      }
    }
  }
  CHECK(PlanShrink(8192, 4096, 40, kLimits[1]).num_blocks == 128, "blocks at 8192 tokens");
  CHECK(PlanShrink(512, 4096, 40, kLimits[1]).num_blocks == 128, "blocks at 512 tokens");
}

}  // namespace
}  // namespace citi

int main() {
  using namespace citi;
  CheckPlans();
  CheckShrinks();
  CheckRowProduct<Float16>();
  CheckAllFactors();
  CheckRankGradients<BFloat16>({19, 4, 8}, 3, true);
  CheckRankGradients<Float16>({5, 3, 5}, 1, false);
  CheckRankGradients<BFloat16>({17, 63, 2}, 0, true);
  CheckInputUpdate<BFloat16>({70, 4, 10}, 136, true);
  CheckInputUpdate<Float16>({5, 3, 8}, 24, false);
  CheckInputUpdate<BFloat16>({2, 63, 2}, 8, true);
  CheckPack<BFloat16, BFloat16, BFloat16>(24, 0);
  CheckPack<Float16, float, Float16>(1029, 8);
  CheckPack<BFloat16, Float16, float>(3, 0);
  CheckNonFinite<BFloat16>(false, {});
  CheckNonFinite<Float16>(true, kHalf);
  return Report();
}
