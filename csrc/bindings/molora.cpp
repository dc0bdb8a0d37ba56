#include "cpu/molora.h"

#include "bindings/numbers.h"

namespace py = pybind11;

namespace citi {
namespace {

// num_tokens, num_in, num_out, num_experts, stacked_rank
using ShapeNumbers = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
using OptionalMatrix = std::optional<MatrixNumbers>;
using OptionalVector = std::optional<VectorNumbers>;

MoloraSizes AsSizes(const ShapeNumbers& shape) {
  const auto& [num_tokens, num_in, num_out, num_experts, stacked_rank] = shape;
  const MoloraSizes sizes{num_tokens, num_in, num_out, num_experts, stacked_rank};
  const std::string problem = Invalid(sizes);
  if (!problem.empty()) Refuse(problem);
  return sizes;
}

template <class Problem>
void CheckAndRun(const Problem& molora, int64_t workspace_size, int64_t num_threads) {
  const std::string problem = Invalid(molora, workspace_size);
  if (!problem.empty()) Refuse(problem);
  CheckThreads(num_threads);
  const py::gil_scoped_release released;
  RunMolora(molora, VariantInUse(), num_threads);
}

void Forward(const ShapeNumbers& shape, float scaling, int64_t top_k, bool renormalizes,
             const std::optional<DropoutNumbers>& dropout, const MatrixNumbers& x,
             const MatrixNumbers& a, const MatrixNumbers& b, const MatrixNumbers& router,
             const MatrixNumbers& y, bool has_base, const OptionalMatrix& weight,
             const OptionalVector& bias, const OptionalVector& h, const OptionalVector& probs,
             const OptionalVector& workspace, int64_t num_threads) {
  const MoloraSizes sizes = AsSizes(shape);
  const MoloraForward forward{sizes,
                              scaling,
                              top_k,
                              renormalizes,
                              AsDropout(dropout),
                              AsMatrix("x", x),
                              AsMatrix("a", a),
                              AsMatrix("b", b),
                              AsMatrix("router", router),
                              AsMatrix("y", y),
                              has_base,
                              AsMatrix("weight", weight),
                              AsVector("bias", bias),
                              AsVector("h", h),
                              AsVector("probs", probs),
                              AsVector("workspace", workspace)};
  const int64_t size = MoloraForwardWorkspace(sizes, forward.x.dtype, dropout.has_value());
  CheckAndRun(forward, size, num_threads);
}

void Backward(const ShapeNumbers& shape, float scaling,
              const std::optional<DropoutNumbers>& dropout, const OptionalMatrix& dy,
              const OptionalMatrix& x, const MatrixNumbers& a, const MatrixNumbers& b,
              const MatrixNumbers& router, const VectorNumbers& h, const VectorNumbers& probs,
              const OptionalVector& dgate, const OptionalMatrix& dx, bool has_base,
              const OptionalVector& da, const OptionalVector& db, const OptionalVector& drouter,
              const VectorNumbers& workspace, int64_t num_threads) {
  const MoloraSizes sizes = AsSizes(shape);
  const MoloraBackward backward{sizes,
                                scaling,
                                AsDropout(dropout),
                                AsMatrix("dy", dy),
                                AsMatrix("x", x),
                                AsMatrix("a", a),
                                AsMatrix("b", b),
                                AsMatrix("router", router),
                                AsVector("h", h),
                                AsVector("probs", probs),
                                AsVector("dgate", dgate),
                                AsMatrix("dx", dx),
                                has_base,
                                AsVector("da", da),
                                AsVector("db", db),
                                AsVector("drouter", drouter),
                                AsVector("workspace", workspace)};
  CheckAndRun(backward, MoloraBackwardWorkspace(sizes), num_threads);
}

void CheckFactors(const MoloraSizes& sizes, const Matrix* a, const Matrix* b) {
  const std::string problem = InvalidFactors(sizes, a, b);
  if (!problem.empty()) Refuse(problem);
}

// b is (N, R); a layer whose b is 0 is its linear layer.
bool HasUpdate(const ShapeNumbers& shape, const MatrixNumbers& b) {
  const MoloraSizes sizes = AsSizes(shape);
  const Matrix up = AsMatrix("b", b);
  CheckFactors(sizes, nullptr, &up);
  return !IsZero(up, sizes.num_out, sizes.stacked_rank);
}

// Whether experts that a token drops cannot reach it.
bool AreFinite(const ShapeNumbers& shape, const OptionalMatrix& a, const OptionalMatrix& b) {
  const MoloraSizes sizes = AsSizes(shape);
  const Matrix down = AsMatrix("a", a), up = AsMatrix("b", b);
  CheckFactors(sizes, a ? &down : nullptr, b ? &up : nullptr);
  return (!a || IsFinite(down, sizes.stacked_rank, sizes.num_in)) &&
         (!b || IsFinite(up, sizes.num_out, sizes.stacked_rank));
}

}  // namespace

void BindMolora(py::module_& module) {
  module.attr("molora_max_stacked_rank") = kMaxStackedRank;
  module.attr("molora_few_tokens") =
      py::dict(py::arg("float32") = kLaneTokens, py::arg("bfloat16") = kFewTokens);
  module.def(
      "molora_forward_workspace",
      [](const ShapeNumbers& shape, int32_t dtype, bool has_dropout) {
        return MoloraForwardWorkspace(AsSizes(shape), AsDType("shape", dtype), has_dropout);
      },
      Strictly("shape"), Strictly("dtype"), Strictly("has_dropout"));
  module.def(
      "molora_backward_workspace",
      [](const ShapeNumbers& shape) { return MoloraBackwardWorkspace(AsSizes(shape)); },
      Strictly("shape"));
  module.def("molora_has_update", HasUpdate, py::kw_only(), Strictly("shape"), Strictly("b"));
  module.def("molora_are_finite", AreFinite, py::kw_only(), Strictly("shape"), Strictly("a"),
             Strictly("b"));
  module.def("molora_forward", Forward, py::kw_only(), Strictly("shape"), Strictly("scaling"),
             Strictly("top_k"), Strictly("renormalizes"), Strictly("dropout"), Strictly("x"), Strictly("a"), Strictly("b"), Strictly("router"),
             Strictly("y"), Strictly("has_base"), Strictly("weight"), Strictly("bias"),
             Strictly("h"), Strictly("probs"), Strictly("workspace"), Strictly("num_threads"));
  module.def("molora_backward", Backward, py::kw_only(), Strictly("shape"), Strictly("scaling"),
             Strictly("dropout"), Strictly("dy"), Strictly("x"), Strictly("a"), Strictly("b"),
             Strictly("router"), Strictly("h"), Strictly("probs"), Strictly("dgate"),
             Strictly("dx"), Strictly("has_base"), Strictly("da"), Strictly("db"),
             Strictly("drouter"), Strictly("workspace"), Strictly("num_threads"));
}

}  // namespace citi
