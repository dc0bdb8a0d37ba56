// MOLoRA on the CPU: values against naive loops; threads, layouts and repeats bit by bit.

#include <cstring>
#include <utility>

#include "checks.h"
#include "molora_cases.h"

namespace citi {
namespace {

// T, K, N, E, R: blocks of tokens, chunks of features and tiles of lanes that end within.
constexpr MoloraSizes kSizes[] = {{1, 1, 1, 1, 1},      {7, 19, 53, 3, 15},  {33, 230, 40, 4, 32},
                                  {70, 65, 310, 5, 35}, {129, 50, 49, 1, 2}, {5, 9, 11, 128, 128},
                                  {34, 16, 48, 2, 64},  {1, 1000, 150, 4, 32}, {2, 47, 1100, 3, 33},
                                  {3, 16, 31, 1, 5},    {8, 330, 290, 2, 128},
                                  {9, 141, 70, 3, 33},  {16, 600, 270, 4, 32},
                                  {83, 47, 61, 3, 33}};

constexpr TopK kTopK[] = {{1, false}, {2, true}, {66, false}};

// A quarter is dropped.
constexpr Dropout kDropout{0x12345678u, 0x9abcdefu, 0x40000000u, 4.0f / 3.0f};

void RunBoth(MoloraProblem* problem, Variant variant, int64_t num_threads) {
  const MoloraForward forward = problem->Forward();
  const MoloraBackward backward = problem->Backward();
  const std::string wrong =
      Invalid(forward, forward.workspace.size) + Invalid(backward, backward.workspace.size);
  CHECK(wrong == "", wrong);
  RunMolora(forward, variant, num_threads);
  RunMolora(backward, variant, num_threads);
}

void CheckCase(MoloraCase molora_case, Variant variant) {
  std::vector<double> expected;
  for (const Layout layout : kLayouts) {
    // rows of a weight are contiguous
    if (molora_case.has_weight && layout > Layout::kRowsApart) continue;
    molora_case.layout = layout;
    MoloraProblem problem(molora_case);
    RunBoth(&problem, variant, layout == Layout::kDense ? 1 : 3);
    const std::string name = molora_case.Name() + ", " + NameOf(variant);
    if (layout == Layout::kDense) {
      expected = problem.Results();
      CHECK(problem.Inaccurate() == "", name + ": not the truth: " + problem.Inaccurate());
    }
    CHECK(problem.Results() == expected, name + ": other bits");
    CHECK(problem.y.NumNan() == problem.y.NumBetween(), name + ": y written elsewhere");
    CHECK(problem.dx.NumNan() == problem.dx.NumBetween(), name + ": dx written elsewhere");
  }
}

void CheckValues() {
  int number = 0;
  for (const MoloraSizes& sizes : kSizes) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const DType parameter_dtype : {DType::kFloat32, DType::kBFloat16}) {
        for (const Variant variant : RunnableVariants()) {
          const bool has_base = ++number % 3 != 0;
          CheckCase({sizes, dtype, parameter_dtype, Layout::kDense, has_base}, variant);
          CheckCase({sizes, dtype, parameter_dtype, Layout::kDense, has_base, kDropout}, variant);
          const TopK& top_k = kTopK[number / 2 % 3];
          if (top_k.num_kept < sizes.num_experts) {
            MoloraCase sparse{sizes, dtype, parameter_dtype, Layout::kDense, has_base};
            if (number % 2 == 0) sparse.dropout = kDropout;
            sparse.top_k = top_k;
            CheckCase(sparse, variant);
          }
          if (sizes.num_tokens > MostFewTokens(dtype)) continue;
          MoloraCase weighted{sizes, dtype, parameter_dtype, Layout::kDense, false};
          weighted.has_weight = true;
          CheckCase(weighted, variant);
          weighted.top_k = {1, false};
          if (sizes.num_experts > 1) CheckCase(weighted, variant);
        }
      }
    }
  }
}

// A gradient is the same whatever else is asked for.
void CheckSubsets(const std::optional<Dropout>& dropout) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const Variant variant : RunnableVariants()) {
      const MoloraCase molora_case{{37, 40, 61, 3, 9}, dtype, dtype, Layout::kDense, true, dropout};
      MoloraProblem all(molora_case);
      RunBoth(&all, variant, 1);
      const std::vector<double> expected = all.Results();
      for (int subset = 0; subset < 16; ++subset) {
        MoloraProblem some(molora_case);
        RunMolora(some.Forward(), variant, 1);
        MoloraBackward backward = some.Backward();
        if (!(subset & 1)) backward.dx.data = nullptr, some.dx.FillWithNan();
        if (!(subset & 2)) backward.da.data = nullptr;
        if (!(subset & 4)) backward.db.data = nullptr;
        if (!(subset & 8)) backward.drouter.data = nullptr;
        if (!(subset & 10)) backward.x.data = nullptr;
        RunMolora(backward, variant, 2);
        const std::vector<double> results = some.Results();
        size_t at = 0;
        bool is_same = true;
        for (const double result : results) {
          is_same = is_same && (std::isnan(result) || result == expected[at]);
          ++at;
        }
        CHECK(is_same, "subset " + std::to_string(subset) + ": other bits");
        const auto wants_nan = [&](int bit, const TestMatrix& gradient) {
          return (subset & bit) ? gradient.NumNan() == 0
                                : gradient.NumNan() == gradient.rows() * gradient.columns();
        };
        CHECK(wants_nan(1, some.dx) && wants_nan(2, some.da) && wants_nan(4, some.db) &&
                  wants_nan(8, some.drouter),
              "subset " + std::to_string(subset) + ": not what was asked for is written");
      }
    }
  }
}

// Nothing of an expert that a token drops reaches it, and nothing of what it sends back reaches the
// expert; beside an a of NaN in the forward, and an h, a dy b and gate sums' gradients of NaN in the
// backward. Whether gates of dropped experts were renormalized away or not.
void CheckDropped() {
  for (const MoloraSizes& sizes : {MoloraSizes{3, 30, 20, 3, 6}, MoloraSizes{11, 30, 20, 3, 6},
                                   MoloraSizes{40, 30, 20, 3, 6}}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const Variant variant : RunnableVariants()) {
        MoloraCase molora_case{sizes, dtype, dtype, Layout::kRowsApart, true};
        molora_case.top_k = {1, variant == Variant::kPortable};
        MoloraProblem clean(molora_case), broken(molora_case);
        for (MoloraProblem* each : {&clean, &broken}) each->PreferExpert(1);
        RunBoth(&clean, variant, 1);
        for (int64_t k = 0; k < sizes.num_in; ++k) PutNan(dtype, broken.a.At(5, k));
        RunMolora(broken.Forward(), variant, 2);
        // every h of that row is NaN; a must be finite in the backward
        MoloraBackward backward = broken.Backward();
        backward.a = clean.a.AsMatrix();
        for (int64_t n = 0; n < sizes.num_out; ++n) PutNan(dtype, broken.b.At(n, 5));
        for (int64_t t = 0; t < sizes.num_tokens; ++t) {
          CHECK(std::isnan(broken.h.Get(t, 5)), "h of a dropped expert is not NaN");
          PutNan(dtype, broken.h.At(t, 4));
          PutNan(DType::kFloat32, broken.dgate.At(t, 3));
        }
        RunMolora(backward, variant, 2);
        const auto is_same = [&](TestMatrix& ours, TestMatrix& others) {
          for (int64_t i = 0; i < ours.rows(); ++i) {
            for (int64_t j = 0; j < ours.columns(); ++j) {
              if (!(ours.Get(i, j) == others.Get(i, j))) return false;
            }
          }
          return true;
        };
        CHECK(is_same(clean.y, broken.y), "y sees a dropped expert");
        CHECK(is_same(clean.probs, broken.probs), "probs see a dropped expert");
        CHECK(is_same(clean.dx, broken.dx), "dx sees a dropped expert");
        CHECK(is_same(clean.da, broken.da), "da sees a dropped expert");
        CHECK(is_same(clean.db, broken.db), "db sees a dropped expert");
        CHECK(is_same(clean.drouter, broken.drouter), "drouter sees a dropped expert");
        for (const int64_t row : {0, 1, 4, 5}) {
          for (int64_t k = 0; k < sizes.num_in; ++k) {
            CHECK(broken.da.Get(row, k) == 0.0, "a dropped expert has a gradient");
          }
        }
      }
    }
  }
}

// Dropout of nothing is no dropout, but for the panels that router and a have of their own; a word
// of the seed, either, makes other masks.
void CheckDropout() {
  for (const Variant variant : RunnableVariants()) {
    const auto results_of = [&](const std::optional<Dropout>& dropout) {
      MoloraProblem problem({{37, 40, 61, 3, 9}, DType::kFloat32, DType::kFloat32, Layout::kDense,
                             true, dropout});
      RunBoth(&problem, variant, 1);
      return problem.Results();
    };
    const std::vector<double> expected = results_of(std::nullopt);
    const std::vector<double> kept = results_of(Dropout{1, 2, 0, 1.0f});
    bool is_close = true;
    for (size_t i = 0; i < expected.size(); ++i) {
      is_close = is_close && std::fabs(kept[i] - expected[i]) <= 0x1p-16 * (1 + std::fabs(kept[i]));
    }
    CHECK(is_close, "a threshold of 0 drops something");
    const std::vector<double> dropped = results_of(kDropout);
    CHECK(dropped != expected, "nothing is dropped");
    for (const bool is_low : {true, false}) {
      Dropout other = kDropout;
      ++(is_low ? other.seed_low : other.seed_high);
      CHECK(results_of(other) != dropped, "a word of the seed does not count");
    }
  }
}

// Where y took no part in the loss only the router's path is left.
void CheckWithoutDy() {
  for (const Variant variant : RunnableVariants()) {
    MoloraProblem problem(
        {{37, 40, 21, 3, 9}, DType::kFloat32, DType::kFloat32, Layout::kDense, true});
    RunMolora(problem.Forward(), variant, 1);
    MoloraBackward backward = problem.Backward();
    backward.dy.data = nullptr;
    backward.db.data = nullptr;
    RunMolora(backward, variant, 1);
    for (int64_t i = 0; i < 9; ++i) {
      for (int64_t k = 0; k < 40; ++k) CHECK(problem.da.Get(i, k) == 0.0, "da is not 0");
    }
    for (int64_t k = 0; k < 40; ++k) {
      double truth = 0.0, scale = 0.0;
      for (int64_t t = 0; t < 37; ++t) {
        double mean = 0.0;
        for (int64_t g = 0; g < 4; ++g) mean += problem.probs.Get(t, g) * problem.dgate.Get(t, g);
        const double term =
            problem.probs.Get(t, 2) * (problem.dgate.Get(t, 2) - mean) * problem.x.Get(t, k);
        truth += term, scale += std::fabs(term);
      }
      CHECK(std::fabs(problem.drouter.Get(2, k) - truth) <= 0x1p-18 * scale,
            "drouter without dy is not the truth");
    }
  }
}

// y is the same where h and the gates are not wanted.
void CheckWithoutSaved() {
  for (const MoloraSizes& sizes : kSizes) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      for (const Variant variant : RunnableVariants()) {
        for (const std::optional<Dropout>& dropout : {std::optional<Dropout>(), {kDropout}}) {
          const MoloraCase molora_case{sizes, dtype, dtype, Layout::kRowsApart, true, dropout};
          MoloraProblem with(molora_case), without(molora_case), probs_alone(molora_case);
          RunMolora(with.Forward(), variant, 1);
          MoloraForward forward = without.Forward();
          forward.h = {}, forward.probs = {};
          CHECK(Invalid(forward, forward.workspace.size) == "", "h and probs must be given");
          RunMolora(forward, variant, 2);
          forward = probs_alone.Forward();
          forward.h = {};
          RunMolora(forward, variant, 2);
          const int64_t num_saved = with.h.rows() * (with.h.columns() + with.probs.columns());
          CHECK(without.h.NumNan() + without.probs.NumNan() == num_saved, "h or probs written");
          bool is_same = true;
          for (int64_t t = 0; t < sizes.num_tokens; ++t) {
            for (int64_t n = 0; n < sizes.num_out; ++n) {
              is_same = is_same && without.y.Get(t, n) == with.y.Get(t, n);
            }
            for (int64_t g = 0; g < sizes.num_gates(); ++g) {
              is_same = is_same && probs_alone.probs.Get(t, g) == with.probs.Get(t, g);
            }
          }
          CHECK(is_same, molora_case.Name() + ": other bits without h or probs");
        }
      }
    }
  }
}

// With a weight a token among a part of the tokens has the bits that it has among all.
void CheckTokensOfWeight(int64_t num_all, int64_t num_part, DType dtype) {
  const MoloraCase molora_case{{num_all, 50, 45, 2, 6}, dtype,        dtype, Layout::kRowsApart,
                               false,                   std::nullopt, true};
  for (const Variant variant : RunnableVariants()) {
    MoloraProblem all(molora_case);
    RunMolora(all.Forward(), variant, 1);
    for (int64_t t = 0; t + num_part <= num_all; ++t) {
      MoloraProblem part(molora_case);
      MoloraForward forward = part.Forward();
      const auto skip_to_token = [&](Matrix* matrix) {
        const int64_t num_bytes = t * matrix->row_stride * SizeOf(dtype);
        matrix->data = static_cast<const char*>(matrix->data) + num_bytes;
        matrix->num_bytes -= num_bytes;
      };
      forward.sizes.num_tokens = num_part;
      forward.h = {}, forward.probs = {};
      skip_to_token(&forward.x), skip_to_token(&forward.y);
      CHECK(Invalid(forward, forward.workspace.size) == "", "a part is refused");
      RunMolora(forward, variant, 1);
      for (int64_t i = t; i < t + num_part; ++i) {
        for (int64_t n = 0; n < 45; ++n) {
          CHECK(part.y.Get(i, n) == all.y.Get(i, n), "other bits of a token among a part");
        }
      }
    }
  }
}

void CheckZeros() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const Layout layout : kLayouts) {
      const TestMatrix random(37, 21, dtype, layout, 11);
      CHECK(!IsZero(random.AsMatrix(), 37, 21), "random numbers are 0");
      CHECK(IsZero(random.AsMatrix(), 0, 21), "no row is not 0");
      CHECK(IsZero(random.AsMatrix(), 37, 0), "no column is not 0");
      for (const int64_t row : {0, 36}) {
        TestMatrix zeros(37, 21, dtype, layout, 11);
        for (int64_t i = 0; i < 37; ++i) {
          for (int64_t j = 0; j < 21; ++j) std::memset(zeros.At(i, j), 0, SizeOf(dtype));
        }
        CHECK(IsZero(zeros.AsMatrix(), 37, 21), "zeros are not 0");
        PutNan(dtype, zeros.At(row, 20));
        CHECK(!IsZero(zeros.AsMatrix(), 37, 21), "NaN is 0");
      }
    }
  }
}

void CheckFinite() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const Layout layout : kLayouts) {
      for (const auto& [row, column] : {std::pair{0, 20}, std::pair{36, 0}}) {
        TestMatrix matrix(37, 21, dtype, layout, 12);
        CHECK(IsFinite(matrix.AsMatrix(), 37, 21), "random numbers are not finite");
        const auto put = [&](uint32_t bits) {
          PutExact(dtype, FloatOfBits(bits), matrix.At(row, column));
          return IsFinite(matrix.AsMatrix(), 37, 21);
        };
        CHECK(!put(0xff800000u) && !put(0x7f800000u), "infinity is finite");
        CHECK(put(0xff7f7fffu) && put(0x7f7f0000u), "a large number is not finite");
        CHECK(put(0x7f7f8000u) == (dtype == DType::kBFloat16), "rounded to infinity");
        PutNan(dtype, matrix.At(row, column));
        CHECK(!IsFinite(matrix.AsMatrix(), 37, 21), "NaN is finite");
        CHECK(IsFinite(matrix.AsMatrix(), 0, 21), "no row is not finite");
      }
    }
  }
}

void CheckRefusals() {
  MoloraProblem problem({{9, 6, 7, 2, 4}, DType::kBFloat16, DType::kFloat32, Layout::kDense, true});
  const int64_t num_forward = MoloraForwardWorkspace({9, 6, 7, 2, 4}, DType::kBFloat16, false);
  const int64_t num_backward = MoloraBackwardWorkspace({9, 6, 7, 2, 4});
  const auto refuses_forward = [&](const std::string& name, const auto& change) {
    MoloraForward forward = problem.Forward();
    change(&forward);
    const std::string message = Invalid(forward, num_forward);
    CHECK(message.rfind(name, 0) == 0, "wanted " + name + ", got '" + message + "'");
  };
  refuses_forward("shape: num_tokens", [](auto* f) { f->sizes.num_tokens = -1; });
  refuses_forward("shape: num_experts", [](auto* f) { f->sizes.num_experts = 3; });
  refuses_forward("shape: stacked_rank", [](auto* f) { f->sizes.stacked_rank = 130; });
  refuses_forward("dropout: 1 / (1 - p)", [](auto* f) { f->dropout = {1, 2, 3, 0.5f}; });
  refuses_forward("x: dtype", [](auto* f) { f->x.dtype = DType::kFloat16; });
  refuses_forward("y: dtype", [](auto* f) { f->y.dtype = DType::kFloat32; });
  refuses_forward("h: dtype", [](auto* f) { f->h.dtype = DType::kFloat32; });
  refuses_forward("a: dtype", [](auto* f) { f->a.dtype = DType::kFloat16; });
  refuses_forward("router: shape and strides", [](auto* f) { f->router.row_stride = 7; });
  refuses_forward("y: rows must be contiguous", [](auto* f) { f->y.column_stride = 0; });
  refuses_forward("y: rows must be contiguous", [](auto* f) { f->y.row_stride = 6; });
  refuses_forward("h: must have", [](auto* f) { f->h.size = 35; });
  refuses_forward("y: must not overlap x", [](auto* f) { f->x.data = f->y.data; });
  refuses_forward("workspace: must have", [](auto* f) { --f->workspace.size; });
  MoloraProblem few({{2, 6, 7, 2, 4}, DType::kBFloat16, DType::kFloat32, Layout::kDense, false,
                     std::nullopt, true});
  const auto refuses_few = [&](const std::string& name, const auto& change) {
    MoloraForward forward = few.Forward();
    CHECK(Invalid(forward, forward.workspace.size) == "", "a weight is refused");
    change(&forward);
    const std::string message = Invalid(forward, forward.workspace.size);
    CHECK(message.rfind(name, 0) == 0, "wanted " + name + ", got '" + message + "'");
  };
  refuses_few("weight: must be left out of many", [](auto* f) { f->dropout = kDropout; });
  refuses_few("weight: must be left out where y", [](auto* f) { f->has_base = true; });
  refuses_few("weight: dtype", [](auto* f) { f->weight.dtype = DType::kFloat32; });
  refuses_few("weight: shape and strides", [](auto* f) { f->weight.row_stride = 7; });
  refuses_few("weight: rows must be contiguous", [](auto* f) { f->weight.column_stride = 0; });
  refuses_few("x: rows must be contiguous", [](auto* f) { f->x.column_stride = 0; });
  refuses_few("bias: must be left out", [](auto* f) { f->weight = {}; });
  refuses_few("bias: dtype", [](auto* f) { f->bias.dtype = DType::kFloat32; });
  refuses_few("bias: must have", [](auto* f) { --f->bias.size; });
  refuses_few("y: must not overlap weight", [](auto* f) { f->weight.data = f->y.data; });
  refuses_forward("top_k: must be in [0, 2], got 3", [](auto* f) { f->top_k = 3; });
  refuses_forward("top_k: must be in [0, 2], got -1", [](auto* f) { f->top_k = -1; });
  Matrix down = problem.a.AsMatrix(), up = problem.b.AsMatrix();
  const auto wrong_factors = [&] { return InvalidFactors({9, 6, 7, 2, 4}, &down, &up); };
  CHECK(wrong_factors() == "", "a and b are refused");
  --up.num_bytes;
  CHECK(wrong_factors().rfind("b: shape and strides", 0) == 0, "b is too short");
  --down.num_bytes;
  CHECK(wrong_factors().rfind("a: shape and strides", 0) == 0, "a is too short");
  CHECK(InvalidFactors({9, 6, 7, 2, 4}, nullptr, nullptr) == "", "neither is needed");
  const auto refuses_backward = [&](const std::string& name, const auto& change) {
    MoloraBackward backward = problem.Backward();
    change(&backward);
    const std::string message = Invalid(backward, num_backward);
    CHECK(message.rfind(name, 0) == 0, "wanted " + name + ", got '" + message + "'");
  };
  refuses_backward("dropout: 1 / (1 - p)", [](auto* b) { b->dropout = {1, 2, 3, NAN}; });
  refuses_backward("dy: must be given", [](auto* b) { b->dy.data = nullptr; });
  refuses_backward("x: must be given", [](auto* b) { b->x.data = nullptr; });
  refuses_backward("dgate: dtype must be fp32", [](auto* b) { b->dgate.dtype = DType::kBFloat16; });
  refuses_backward("da: must not overlap db", [](auto* b) { b->db.data = b->da.data; });
  refuses_backward("workspace: must not overlap h", [](auto* b) { b->h.data = b->workspace.data; });
}

}  // namespace
}  // namespace citi

int main() {
  citi::CheckValues();
  citi::CheckSubsets(std::nullopt);
  citi::CheckSubsets(citi::kDropout);
  citi::CheckDropout();
  citi::CheckWithoutDy();
  citi::CheckWithoutSaved();
  citi::CheckTokensOfWeight(citi::kFewestInLanes - 1, 1, citi::DType::kFloat32);
  citi::CheckTokensOfWeight(citi::kLaneTokens, citi::kFewTokens + 1, citi::DType::kFloat32);
  citi::CheckTokensOfWeight(3, 1, citi::DType::kFloat32);
  citi::CheckTokensOfWeight(citi::kFewTokens, 1, citi::DType::kBFloat16);
  citi::CheckTokensOfWeight(7, 1, citi::DType::kBFloat16);
  citi::CheckZeros();
  citi::CheckFinite();
  citi::CheckDropped();
  citi::CheckRefusals();
  return citi::Report();
}
