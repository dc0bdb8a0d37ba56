// Random MOLoRA problems in every layout, and their truth by naive loops in fp64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/molora.h"
#include "test_matrix.h"

namespace citi {

// How many experts a token keeps, 0 for all, and whether their gates sum to 1 with the backbone's.
struct TopK {
  int64_t num_kept;
  bool renormalizes;
};

struct MoloraCase {
  MoloraSizes sizes;
  DType dtype, parameter_dtype;
  Layout layout;
  bool has_base;
  std::optional<Dropout> dropout = std::nullopt;
  bool has_weight = false;  // in place of a base
  TopK top_k = {0, false};

  std::string Name() const {
    std::string name = "T K N E R";
    for (const int64_t size :
         {sizes.num_tokens, sizes.num_in, sizes.num_out, sizes.num_experts, sizes.stacked_rank}) {
      name += " " + std::to_string(size);
    }
    return name + ", dtypes " + std::to_string(static_cast<int>(dtype)) + " " +
           std::to_string(static_cast<int>(parameter_dtype)) + ", layout " +
           std::to_string(static_cast<int>(layout)) + (has_base ? "" : ", no base") +
           (dropout ? ", dropout" : "") + (has_weight ? ", weight" : "") + ", top " +
           std::to_string(top_k.num_kept) + (top_k.renormalizes ? ", renormalized" : "");
  }
};

// A number that bf16 has exactly.
inline void PutExact(DType dtype, float value, void* to) {
  uint16_t halves[2];
  std::memcpy(halves, &value, sizeof value);
  std::memcpy(to, dtype == DType::kFloat32 ? halves : halves + 1, SizeOf(dtype));
}

using Values = std::vector<std::vector<double>>;

// A truth with what its rounding errors scale with.
struct Truth {
  Values value, scale;

  Truth(int64_t rows, int64_t columns)
      : value(static_cast<size_t>(rows), std::vector<double>(static_cast<size_t>(columns))),
        scale(value) {}
  void Add(size_t i, size_t j, double term, double magnitude) {
    value[i][j] += term;
    scale[i][j] += magnitude;
  }
  void Add(size_t i, size_t j, double term) { Add(i, j, term, std::fabs(term)); }
};

// Everything that a forward and its backward point to. Outputs begin as NaN, y and dx as a base.
class MoloraProblem {
 public:
  explicit MoloraProblem(const MoloraCase& molora_case)
      : case_(molora_case),
        sizes_(molora_case.sizes),
        x(case_.has_weight ? InPlace(sizes_.num_tokens, sizes_.num_in, 1)
                           : Input(sizes_.num_tokens, sizes_.num_in, case_.dtype, 1)),
        dy(Input(sizes_.num_tokens, sizes_.num_out, case_.dtype, 2)),
        a(Input(sizes_.stacked_rank, sizes_.num_in, case_.parameter_dtype, 3)),
        b(Input(sizes_.num_out, sizes_.stacked_rank, case_.parameter_dtype, 4)),
        router(Input(sizes_.num_gates(), sizes_.num_in, case_.parameter_dtype, 5)),
        weight(case_.has_weight ? InPlace(sizes_.num_out, sizes_.num_in, 9) : InPlace(1, 1, 9)),
        bias(1, sizes_.num_out, case_.dtype, Layout::kDense, 10),
        y(InPlace(sizes_.num_tokens, sizes_.num_out, 6)),
        dx(InPlace(sizes_.num_tokens, sizes_.num_in, 7)),
        base(InPlace(sizes_.num_tokens, sizes_.num_out, 6)),
        dx_base(InPlace(sizes_.num_tokens, sizes_.num_in, 7)),
        h(Output(sizes_.num_tokens, sizes_.stacked_rank, case_.dtype)),
        probs(Output(sizes_.num_tokens, sizes_.num_gates(), DType::kFloat32)),
        dgate(sizes_.num_tokens, sizes_.num_gates(), DType::kFloat32, Layout::kDense, 8),
        da(Output(sizes_.stacked_rank, sizes_.num_in, case_.parameter_dtype)),
        db(Output(sizes_.num_out, sizes_.stacked_rank, case_.parameter_dtype)),
        drouter(Output(sizes_.num_gates(), sizes_.num_in, case_.parameter_dtype)),
        forward_workspace(Output(1,
                                 MoloraForwardWorkspace(sizes_, case_.dtype,
                                                        case_.dropout.has_value()),
                                 DType::kFloat32)),
        backward_workspace(Output(1, MoloraBackwardWorkspace(sizes_), DType::kFloat32)) {
    if (!case_.has_base) y.FillWithNan(), dx.FillWithNan();
  }

  MoloraForward Forward() {
    return {sizes_,
            kScaling,
            case_.top_k.num_kept,
            case_.top_k.renormalizes,
            case_.dropout,
            x.AsMatrix(),
            a.AsMatrix(),
            b.AsMatrix(),
            router.AsMatrix(),
            y.AsMatrix(),
            case_.has_base,
            case_.has_weight ? weight.AsMatrix() : Matrix{},
            case_.has_weight ? bias.AsVector() : Vector{},
            h.AsVector(),
            probs.AsVector(),
            forward_workspace.AsVector()};
  }
  MoloraBackward Backward() {
    return {sizes_,
            kScaling,
            case_.dropout,
            dy.AsMatrix(),
            x.AsMatrix(),
            a.AsMatrix(),
            b.AsMatrix(),
            router.AsMatrix(),
            h.AsVector(),
            probs.AsVector(),
            dgate.AsVector(),
            dx.AsMatrix(),
            case_.has_base,
            da.AsVector(),
            db.AsVector(),
            drouter.AsVector(),
            backward_workspace.AsVector()};
  }

  // Every token's largest logit of an expert becomes that of `expert`.
  void PreferExpert(int64_t expert) {
    for (int64_t g = 0; g < G(); ++g) {
      for (int64_t k = 0; k < sizes_.num_in; ++k) {
        const float preference = g == expert + 1 ? 1.0f : -1.0f;
        PutExact(router.dtype(), k == 0 && g > 0 ? preference : 0.0f, router.At(g, k));
      }
    }
    for (int64_t t = 0; t < T(); ++t) PutExact(x.dtype(), 1.0f, x.At(t, 0));
  }

  // The name of the first output that is not the truth, or "". h and the gates are held to x, a
  // and router, the others to the h and gates that were saved.
  std::string Inaccurate() {
    Truth truth_h(T(), R()), truth_y(T(), sizes_.num_out), truth_dx(T(), sizes_.num_in);
    Truth truth_da(R(), sizes_.num_in), truth_db(sizes_.num_out, R());
    Truth truth_drouter(G(), sizes_.num_in);
    for (int64_t t = 0; t < T(); ++t) {
      for (int64_t r = 0; r < R(); ++r) {
        for (int64_t k = 0; k < sizes_.num_in; ++k) {
          truth_h.Add(t, r, a.Get(r, k) * x.Get(t, k) * Kept(t, k));
        }
      }
      for (int64_t n = 0; n < sizes_.num_out; ++n) {
        if (case_.has_base) truth_y.Add(t, n, base.Get(t, n));
        if (case_.has_weight) {
          truth_y.Add(t, n, bias.Get(0, n));
          for (int64_t k = 0; k < sizes_.num_in; ++k) {
            truth_y.Add(t, n, weight.Get(n, k) * x.Get(t, k));
          }
        }
        for (int64_t r = 0; r < R(); ++r) {
          truth_y.Add(t, n, U(t, r) * b.Get(n, r));
          truth_db.Add(n, r, dy.Get(t, n) * U(t, r));
        }
      }
      const Truth dz = RankGradient(t);
      for (int64_t k = 0; k < sizes_.num_in; ++k) {
        if (case_.has_base) truth_dx.Add(t, k, dx_base.Get(t, k));
        for (int64_t j = 0; j < R() + G(); ++j) {
          const double row = j < R() ? a.Get(j, k) : router.Get(j - R(), k);
          const double kept = j < R() ? Kept(t, k) : 1.0;
          const double value = dz.value[0][j] * kept, scale = dz.scale[0][j] * kept;
          truth_dx.Add(t, k, value * row, scale * std::fabs(row));
          Truth& gradient = j < R() ? truth_da : truth_drouter;
          gradient.Add(j < R() ? j : j - R(), k, value * x.Get(t, k),
                       scale * std::fabs(x.Get(t, k)));
        }
      }
    }
    if (!GatesAreAccurate()) return "probs";
    if (!IsAccurate(h, truth_h)) return "h";
    if (!IsAccurate(y, truth_y)) return "y";
    if (!IsAccurate(dx, truth_dx)) return "dx";
    if (!IsAccurate(da, truth_da)) return "da";
    if (!IsAccurate(db, truth_db)) return "db";
    return IsAccurate(drouter, truth_drouter) ? "" : "drouter";
  }

  // All outputs one after the other.
  std::vector<double> Results() {
    std::vector<double> results;
    for (TestMatrix* each : {&y, &h, &probs, &dx, &da, &db, &drouter}) {
      for (int64_t i = 0; i < each->rows(); ++i) {
        for (int64_t j = 0; j < each->columns(); ++j) results.push_back(each->Get(i, j));
      }
    }
    return results;
  }

 private:
  static constexpr float kScaling = 0.75f;

  TestMatrix Input(int64_t rows, int64_t columns, DType dtype, unsigned seed) const {
    return TestMatrix(rows, columns, dtype, case_.layout, seed);
  }
  // Its rows are contiguous, and lie apart in every other layout.
  TestMatrix InPlace(int64_t rows, int64_t columns, unsigned seed) const {
    const Layout layout = case_.layout == Layout::kDense ? Layout::kDense : Layout::kRowsApart;
    return TestMatrix(rows, columns, case_.dtype, layout, seed);
  }
  static TestMatrix Output(int64_t rows, int64_t columns, DType dtype) {
    TestMatrix output(rows, columns, dtype, Layout::kDense, 0);
    output.FillWithNan();
    return output;
  }

  int64_t T() const { return sizes_.num_tokens; }
  int64_t R() const { return sizes_.stacked_rank; }
  int64_t G() const { return sizes_.num_gates(); }
  int64_t ExpertOf(int64_t r) const { return r / (R() / sizes_.num_experts); }
  // 1 / (1 - p), or 0 where an input of the ranks is dropped.
  double Kept(int64_t t, int64_t k) const {
    if (!case_.dropout) return 1.0;
    const uint32_t hash = HashOfToken(*case_.dropout, t);
    return Keeps(*case_.dropout, hash, k) ? double{case_.dropout->inverse_keep} : 0.0;
  }
  // A mark is the sign.
  bool IsKept(int64_t t, int64_t g) { return !std::signbit(probs.Get(t, g)); }
  double Gate(int64_t t, int64_t r) {
    const int64_t g = ExpertOf(r) + 1;
    return IsKept(t, g) ? probs.Get(t, g) : 0.0;
  }
  double U(int64_t t, int64_t r) { return double{kScaling} * Gate(t, r) * h.Get(t, r); }

  // Errors of fp32 sums, or four of bf16's: a parameter, u or dz, h or a gate, the result.
  double Epsilon() const {
    const bool is_exact = case_.dtype == case_.parameter_dtype && case_.dtype == DType::kFloat32;
    return is_exact ? 0x1p-19 : 0x1p-6;
  }

  Truth RankGradient(int64_t t) {
    Truth dgate_truth(1, G()), dz(1, R() + G());
    for (int64_t g = 0; g < G(); ++g) {
      if (IsKept(t, g)) dgate_truth.Add(0, g, dgate.Get(t, g));
    }
    for (int64_t r = 0; r < R(); ++r) {
      if (!IsKept(t, ExpertOf(r) + 1)) continue;
      double du = 0.0, scale = 0.0;
      for (int64_t n = 0; n < sizes_.num_out; ++n) {
        du += dy.Get(t, n) * b.Get(n, r);
        scale += std::fabs(dy.Get(t, n) * b.Get(n, r));
      }
      dgate_truth.Add(0, ExpertOf(r) + 1, kScaling * h.Get(t, r) * du,
                      kScaling * std::fabs(h.Get(t, r)) * scale);
      dz.Add(0, r, kScaling * Gate(t, r) * du, kScaling * Gate(t, r) * scale);
    }
    double mean = 0.0, mean_scale = 0.0;
    for (int64_t g = 0; g < G(); ++g) {
      mean += std::fabs(probs.Get(t, g)) * dgate_truth.value[0][g];
      mean_scale += std::fabs(probs.Get(t, g)) * dgate_truth.scale[0][g];
    }
    for (int64_t g = 0; g < G(); ++g) {
      const double prob = std::fabs(probs.Get(t, g));
      dz.Add(0, R() + g, prob * (dgate_truth.value[0][g] - mean),
             prob * (dgate_truth.scale[0][g] + mean_scale));
    }
    return dz;
  }

  bool GatesAreAccurate() {
    for (int64_t t = 0; t < T(); ++t) {
      std::vector<double> logits(G());
      double largest = -1e300, scale = 1.0, sum = 0.0;
      for (int64_t g = 0; g < G(); ++g) {
        double absolute = 0.0;
        for (int64_t k = 0; k < sizes_.num_in; ++k) {
          logits[g] += router.Get(g, k) * x.Get(t, k);
          absolute += std::fabs(router.Get(g, k) * x.Get(t, k));
        }
        largest = std::max(largest, logits[g]);
        scale = std::max(scale, absolute);
      }
      // A router in fp32 is rounded to bf16 beside such x.
      const bool is_rounded =
          case_.dtype == DType::kBFloat16 && case_.parameter_dtype == DType::kFloat32;
      const double allowed = (is_rounded ? 0x1p-6 : 0x1p-19) * scale;
      if (!KeepsTheLargest(t, logits, allowed)) return false;
      const auto is_summed = [&](int64_t g) { return !case_.top_k.renormalizes || IsKept(t, g); };
      for (int64_t g = 0; g < G(); ++g) {
        if (is_summed(g)) sum += std::exp(logits[g] - largest);
      }
      for (int64_t g = 0; g < G(); ++g) {
        const double truth = is_summed(g) ? std::exp(logits[g] - largest) / sum : 0.0;
        if (!(std::fabs(std::fabs(probs.Get(t, g)) - truth) <= allowed)) return false;
      }
    }
    return true;
  }

  // The backbone, and so many experts as are wanted; none that was dropped is larger.
  bool KeepsTheLargest(int64_t t, const std::vector<double>& logits, double allowed) {
    int64_t num_kept = 0;
    double least_kept = 1e300, largest_dropped = -1e300;
    for (int64_t g = 1; g < G(); ++g) {
      num_kept += IsKept(t, g) ? 1 : 0;
      if (IsKept(t, g)) least_kept = std::min(least_kept, logits[g]);
      if (!IsKept(t, g)) largest_dropped = std::max(largest_dropped, logits[g]);
    }
    const int64_t wanted = case_.top_k.num_kept > 0 ? case_.top_k.num_kept : sizes_.num_experts;
    return IsKept(t, 0) && num_kept == wanted && largest_dropped <= least_kept + 2 * allowed;
  }

  bool IsAccurate(TestMatrix& ours, const Truth& truth) const {
    for (int64_t i = 0; i < ours.rows(); ++i) {
      for (int64_t j = 0; j < ours.columns(); ++j) {
        // Beside subnormal numbers, which some instructions take for 0.
        const double allowed = Epsilon() * truth.scale[i][j] + 1e-30;
        if (!(std::fabs(ours.Get(i, j) - truth.value[i][j]) <= allowed)) return false;
      }
    }
    return ours.NumNan() == ours.NumBetween();
  }

  MoloraCase case_;
  MoloraSizes sizes_;

 public:
  TestMatrix x, dy, a, b, router, weight, bias, y, dx, base, dx_base, h, probs, dgate;
  TestMatrix da, db, drouter, forward_workspace, backward_workspace;
};

}  // namespace citi
