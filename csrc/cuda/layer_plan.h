// A MOLoRA layer on Hopper as a row of launches: which kernels, on which memory, beside which.
//
//   forward    [a; router] packed, b rounded; then
//              routed: y, h and probs from one GEMM
//              else:   h, u and probs in a pass over x; y from the extended GEMM
//   backward   [a; router] packed, b rounded; then
//              routed: dx and dz from one GEMM, db beside it, and da and drouter as far as dz is
//                      there; what was left of these after both
//              else:   du in a pass over dy, dz in rank space; dx from the extended GEMM, all other
//                      gradients beside it
//
// As citi_kernels/ops/molora_linear_cuda_gradients.py has it, with the same kernels on the same
// numbers; in one call, since from Python a layer takes longer than a small one's kernels.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "cuda/factor_gradients_plan.h"
#include "cuda/shrink_plan.h"
#include "layer_arguments.h"
#include "routed_gemm_arguments.h"

namespace citi {

using Pass = std::variant<PackArguments, ShrinkArguments, RowProductArguments, ScaleArguments,
                          FactorArguments, RankArguments, SumArguments, ExtendedGemm, RoutedGemm>;

// first, product and last run one after the other; beside runs behind first and beside product,
// and ends before last.
struct LayerPlan {
  std::vector<Pass> first;
  Pass product;
  std::vector<Pass> beside;
  std::vector<Pass> last;
  int64_t workspace_bytes = 0;
};

constexpr int64_t kWorkspaceAlignment = 256;

// Hands out a workspace piece by piece. Without one the pieces have addresses all the same, from
// one multiple of the alignment on, and are never touched.
class Workspace {
 public:
  explicit Workspace(void* data)
      : data_(data != nullptr ? static_cast<char*>(data)
                              : reinterpret_cast<char*>(kWorkspaceAlignment)) {}

  Vector Take(DType dtype, int64_t size) {
    const int64_t num_bytes = size * SizeOf(dtype);
    const Vector piece{data_ + used_, num_bytes, dtype, size};
    used_ += (num_bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return piece;
  }
  Indices TakeIndices(int64_t size) {
    const Vector piece = Take(DType::kFloat32, size);  // of 4 bytes too
    return {static_cast<const int32_t*>(piece.data), piece.num_bytes, size};
  }
  int64_t used() const { return used_; }

 private:
  char* data_;
  int64_t used_ = 0;
};

// A contiguous matrix.
inline Matrix AsRows(const Vector& vector, int64_t num_columns) {
  return {vector.data, vector.num_bytes, vector.dtype, num_columns, 1};
}

inline Matrix Transposed(const Matrix& matrix) {
  return {matrix.data, matrix.num_bytes, matrix.dtype, matrix.column_stride, matrix.row_stride};
}

// Columns of a contiguous matrix, from one on.
inline Matrix ColumnsFrom(const Vector& vector, int64_t num_columns, int64_t first) {
  const int64_t offset = first * SizeOf(vector.dtype);
  return {static_cast<const char*>(vector.data) + offset, vector.num_bytes - offset, vector.dtype,
          num_columns, 1};
}

// What the plans of both directions share.
class Planner {
 public:
  Planner(const LayerShape& shape, DType dtype, float scaling, void* workspace)
      : ranks_(shape.ranks),
        num_in_(shape.num_in),
        num_out_(shape.num_out),
        dtype_(dtype),
        scaling_(scaling),
        memory_(workspace) {}

 protected:
  int64_t num_tokens() const { return ranks_.num_tokens; }

  // [a; router] (Z, K); `zeros` are cleared by the same launch.
  Vector Stack(const Matrix& a, const Matrix& router, const Indices& zeros) {
    const Vector stack = memory_.Take(dtype_, ranks_.num_rows() * num_in_);
    plan_.first.push_back(
        PackArguments{ranks_.num_rows(),
                      num_in_,
                      {{a, 0, ranks_.num_ranks(), num_in_},
                       {router, ranks_.padded_ranks(), ranks_.num_gates(), num_in_}},
                      stack,
                      zeros});
    return stack;
  }

  // b (N, R) in rows of P.
  Matrix RoundedB(const Matrix& b) {
    const Vector rows = memory_.Take(dtype_, num_out_ * ranks_.padded_ranks());
    plan_.first.push_back(PackArguments{
        num_out_, ranks_.padded_ranks(), {{b, 0, num_out_, ranks_.num_ranks()}}, rows});
    return AsRows(rows, ranks_.padded_ranks());
  }

  LayerPlan Done(const Pass& product) {
    plan_.product = product;
    plan_.workspace_bytes = memory_.used();
    return plan_;
  }

  const RankShape ranks_;
  const int64_t num_in_, num_out_;
  const DType dtype_;
  const float scaling_;
  Workspace memory_;
  LayerPlan plan_;
};

class ForwardPlanner : Planner {
 public:
  ForwardPlanner(const LayerForward& layer, void* workspace)
      : Planner(layer.shape, layer.x.dtype, layer.scaling, workspace), layer_(layer) {}

  LayerPlan Routed() {
    RoutedGemm routed = RoutedLinearProblem(ranks_, num_in_, num_out_);
    routed.counts = memory_.TakeIndices(NumCounts(routed));
    routed.narrow = AsRows(Stack(layer_.a, layer_.router, routed.counts), num_in_);
    Fill(&routed.gemm);
    routed.h = layer_.h;
    routed.probs = layer_.probs;
    routed.scaling = scaling_;
    return Done(routed);
  }

  LayerPlan Extended() {
    const int64_t num_splits = ShrinkSplits(num_tokens(), num_in_);
    ExtendedGemm gemm = LinearProblem(num_tokens(), num_in_, num_out_, ranks_.num_ranks());
    const Vector stack = Stack(layer_.a, layer_.router, {});
    const Vector u = Fill(&gemm);
    Vector parts{nullptr, 0, DType::kFloat32, 0};
    if (num_splits > 1) {
      parts = memory_.Take(DType::kFloat32, num_splits * num_tokens() * ranks_.num_rows());
    }
    plan_.first.push_back(ShrinkArguments{ranks_, num_in_, layer_.x, stack, layer_.h, u,
                                          layer_.probs, parts, 0, false, scaling_, std::nullopt});
    return Done(gemm);
  }

 private:
  // All operands of the GEMM; returns u.
  Vector Fill(ExtendedGemm* gemm) {
    const Vector u = memory_.Take(dtype_, num_tokens() * ranks_.padded_ranks());
    gemm->left = layer_.x;
    gemm->right = layer_.weight;
    gemm->bias = layer_.bias;
    gemm->more_left = AsRows(u, ranks_.padded_ranks());
    gemm->more_right = RoundedB(layer_.b);
    gemm->out = AsRows(layer_.y, num_out_);
    return u;
  }

  const LayerForward& layer_;
};

class BackwardPlanner : Planner {
 public:
  BackwardPlanner(const LayerBackward& layer, void* workspace)
      : Planner(layer.shape, layer.dy.dtype, layer.scaling, workspace),
        layer_(layer),
        first_down_(layer.da.data != nullptr ? 0 : ranks_.padded_ranks()),
        last_down_(layer.drouter.data != nullptr ? ranks_.num_rows() : ranks_.padded_ranks()),
        dz_(memory_.Take(dtype_, num_tokens() * ranks_.num_rows())) {}

  LayerPlan Routed() {
    RoutedGemm routed = RoutedInputGradientProblem(ranks_, num_in_, num_out_);
    // What the GEMM counts, then which parts of da and drouter are there: zeros before.
    const int64_t num_counts = NumCounts(routed);
    const FactorCut cut = Cut(num_in_, last_down_ - first_down_);
    const int64_t num_done = has_down() ? cut.num_tiles * cut.num_shares : 0;
    const Indices numbers = memory_.TakeIndices(num_counts + num_done);
    constexpr int64_t kBytes = sizeof(int32_t);
    routed.counts = {numbers.data, num_counts * kBytes, num_counts};
    const Vector stack = Stack(layer_.a, layer_.router, numbers);
    routed.narrow = RoundedB(layer_.b);
    PlanUp();
    if (has_down()) {
      FactorArguments down = Down(cut);
      down.done = {numbers.data + num_counts, num_done * kBytes, num_done};
      plan_.last.push_back(down);
      plan_.last.push_back(DownSums(down.parts, cut.num_shares));
      down.counts = routed.counts;
      plan_.beside.push_back(down);
    }
    Fill(&routed.gemm, stack);
    routed.h = layer_.h;
    routed.probs = layer_.probs;
    routed.dgate = layer_.dgate;
    routed.scaling = scaling_;
    routed.fits_narrow = true;
    return Done(routed);
  }

  LayerPlan Extended() {
    PlanRanks();
    const Vector stack = Stack(layer_.a, layer_.router, {});
    PlanUp();
    if (has_down()) {
      const FactorCut cut = Cut(num_in_, last_down_ - first_down_);
      const FactorArguments down = Down(cut);
      plan_.beside.push_back(down);
      plan_.beside.push_back(DownSums(down.parts, cut.num_shares));
    }
    ExtendedGemm gemm = InputGradientProblem(num_tokens(), num_in_, num_out_, ranks_.num_rows());
    Fill(&gemm, stack);
    return Done(gemm);
  }

 private:
  bool has_down() const { return layer_.da.data != nullptr || layer_.drouter.data != nullptr; }

  // dz from parts of du.
  void PlanRanks() {
    const int64_t padded = ranks_.padded_ranks();
    const Vector rows = memory_.Take(dtype_, padded * num_out_);
    plan_.first.push_back(PackArguments{
        padded, num_out_, {{Transposed(layer_.b), 0, ranks_.num_ranks(), num_out_}}, rows});
    const int64_t num_parts = ShrinkSplits(num_tokens(), num_out_);
    const Vector parts = memory_.Take(DType::kFloat32, num_parts * num_tokens() * padded);
    plan_.first.push_back(
        RowProductArguments{num_tokens(), num_out_, padded, layer_.dy, rows, parts});
    plan_.first.push_back(RankArguments{ranks_, num_parts, parts, layer_.h, layer_.probs,
                                        layer_.dgate, dz_, scaling_});
  }

  // db, beside the product.
  void PlanUp() {
    if (layer_.db.data == nullptr) return;
    const int64_t padded = ranks_.padded_ranks();
    const Vector u = memory_.Take(dtype_, num_tokens() * padded);
    plan_.beside.push_back(ScaleArguments{ranks_, layer_.h, layer_.probs, u, scaling_});
    const FactorCut cut = Cut(num_out_, padded);
    const Vector parts = memory_.Take(DType::kFloat32, cut.num_shares * num_out_ * padded);
    plan_.beside.push_back(Factor(layer_.dy, num_out_, AsRows(u, padded), padded, parts));
    plan_.beside.push_back(SumArguments{cut.num_shares,
                                        num_out_,
                                        padded,
                                        parts,
                                        {{layer_.db, 0, ranks_.num_ranks(), false}}});
  }

  FactorArguments Down(const FactorCut& cut) {
    const int64_t width = last_down_ - first_down_;
    const Vector parts = memory_.Take(DType::kFloat32, cut.num_shares * num_in_ * width);
    const Matrix narrow = ColumnsFrom(dz_, ranks_.num_rows(), first_down_);
    return Factor(layer_.x, num_in_, narrow, width, parts);
  }

  SumArguments DownSums(const Vector& parts, int64_t num_shares) const {
    SumArguments sums{num_shares, num_in_, last_down_ - first_down_, parts, {}};
    if (layer_.da.data != nullptr) {
      sums.outputs.push_back({layer_.da, 0, ranks_.num_ranks(), true});
    }
    if (layer_.drouter.data != nullptr) {
      sums.outputs.push_back(
          {layer_.drouter, ranks_.padded_ranks() - first_down_, ranks_.num_gates(), true});
    }
    return sums;
  }

  void Fill(ExtendedGemm* gemm, const Vector& stack) const {
    gemm->left = layer_.dy;
    gemm->right = layer_.weight;
    gemm->more_left = AsRows(dz_, ranks_.num_rows());
    gemm->more_right = AsRows(stack, num_in_);
    gemm->out = AsRows(layer_.dx, num_in_);
  }

  FactorCut Cut(int64_t num_columns, int64_t num_narrow) const {
    return PlanFactor(num_tokens(), num_columns, num_narrow, false, kLeastSharedLimit).cut;
  }

  FactorArguments Factor(const Matrix& wide, int64_t num_columns, const Matrix& narrow,
                         int64_t num_narrow, const Vector& parts) const {
    FactorArguments factor{};
    factor.num_tokens = num_tokens();
    factor.num_columns = num_columns;
    factor.num_narrow = num_narrow;
    factor.wide = wide;
    factor.narrow = narrow;
    factor.parts = parts;
    factor.fits_narrow = true;
    return factor;
  }

  const LayerBackward& layer_;
  // Columns of dz that da and drouter are made of.
  const int64_t first_down_, last_down_;
  const Vector dz_;
};

struct InvalidPass {
  std::string operator()(const ShrinkArguments& pass) const {
    return Invalid(pass, ShrinkSplits(pass.shape.num_tokens, pass.num_inputs));
  }
  std::string operator()(const RowProductArguments& pass) const {
    return Invalid(pass, ShrinkSplits(pass.num_tokens, pass.num_columns));
  }
  std::string operator()(const FactorArguments& pass) const {
    const FactorCut cut =
        PlanFactor(pass.num_tokens, pass.num_columns, pass.num_narrow, false, kLeastSharedLimit)
            .cut;
    return Invalid(pass, cut.num_tiles, cut.num_shares);
  }
  template <class Arguments>
  std::string operator()(const Arguments& pass) const {
    return Invalid(pass);
  }
};

// workspace: aligned to 256 bytes, of workspace_bytes; null where only that is asked for. Valid
// layers (`Invalid`).
inline LayerPlan PlanLayer(const LayerForward& layer, void* workspace) {
  ForwardPlanner planner(layer, workspace);
  return layer.is_routed ? planner.Routed() : planner.Extended();
}

inline LayerPlan PlanLayer(const LayerBackward& layer, void* workspace) {
  BackwardPlanner planner(layer, workspace);
  return layer.is_routed ? planner.Routed() : planner.Extended();
}

// What is wrong with memory that is to be a workspace, or "".
inline std::string InvalidWorkspace(const Vector& workspace, int64_t num_bytes) {
  if (reinterpret_cast<uintptr_t>(workspace.data) % kWorkspaceAlignment != 0) {
    return "workspace: data must be aligned to 256 bytes";
  }
  if (workspace.data == nullptr || workspace.num_bytes < num_bytes) {
    return "workspace: must have " + std::to_string(num_bytes) + " bytes, got " +
           std::to_string(workspace.num_bytes);
  }
  return "";
}

// What is wrong with the first pass that has something wrong, or "".
inline std::string Invalid(const LayerPlan& plan) {
  for (const auto* passes : {&plan.first, &plan.beside, &plan.last}) {
    for (const Pass& pass : *passes) {
      std::string problem = std::visit(InvalidPass{}, pass);
      if (!problem.empty()) return problem;
    }
  }
  return std::visit(InvalidPass{}, plan.product);
}

}  // namespace citi
