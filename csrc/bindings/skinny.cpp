#if defined(CITI_CUDA)
#include "cuda/skinny.h"

#include <vector>

#include "bindings/cuda_error.h"
#include "bindings/numbers.h"

namespace py = pybind11;

namespace citi {
namespace {

// num_tokens, num_experts, expert_rank
using RankShapeNumbers = std::tuple<int64_t, int64_t, int64_t>;
using OptionalVector = std::optional<VectorNumbers>;
// matrix, first_row, num_rows, num_columns
using PackedNumbers = std::tuple<MatrixNumbers, int64_t, int64_t, int64_t>;
using NumbersOfGpu = std::optional<IndexNumbers>;
// out, first, count, is_transposed
using SumOutputNumbers = std::tuple<VectorNumbers, int64_t, int64_t, bool>;

constexpr int64_t kMaxSize = int64_t{1} << 40;

RankShape AsRankShape(const RankShapeNumbers& numbers) {
  const auto& [num_tokens, num_experts, expert_rank] = numbers;
  const RankShape shape{num_tokens, num_experts, expert_rank};
  const std::string problem = Invalid(shape);
  if (!problem.empty()) Refuse(problem);
  return shape;
}

void CheckSize(const char* name, int64_t size, int64_t most = kMaxSize) {
  const std::string problem = InvalidSize(name, size, most);
  if (!problem.empty()) Refuse(problem);
}

int64_t CheckedSplits(int64_t num_tokens, int64_t num_inputs) {
  CheckSize("num_tokens", num_tokens);
  CheckSize("num_inputs", num_inputs);
  return ShrinkCudaSplits(num_tokens, num_inputs);
}

std::tuple<int64_t, int64_t> CheckedParts(int64_t num_tokens, int64_t num_columns,
                                          int64_t num_narrow, bool gives_ranks) {
  CheckSize("num_tokens", num_tokens);
  CheckSize("num_columns", num_columns);
  // Only the narrowest kernel gives the gradient of the ranks as well.
  CheckSize("num_narrow", num_narrow, gives_ranks ? 32 : kMaxSkinnyRanks + kMaxSkinnyGates);
  const FactorParts parts = FactorCudaParts(num_tokens, num_columns, num_narrow, gives_ranks);
  return {parts.num_tiles, parts.num_shares};
}

// Refuses, or runs the pass without holding Python up.
template <class Arguments>
void Run(const Arguments& arguments, std::string problem, int32_t device, uintptr_t stream,
         cudaError_t (*pass)(const Arguments&, int, cudaStream_t, std::string*)) {
  if (!problem.empty()) Refuse(problem);
  cudaError_t error;
  {
    const py::gil_scoped_release released;
    error = pass(arguments, device, reinterpret_cast<cudaStream_t>(stream), &problem);
  }
  Check(error);
  if (!problem.empty()) Refuse(problem);
}

void RunShrink(const RankShapeNumbers& shape, int64_t num_inputs, const MatrixNumbers& x,
               const VectorNumbers& stack, const VectorNumbers& h, const VectorNumbers& u,
               const VectorNumbers& probs, const OptionalVector& parts, int64_t top_k,
               bool renormalizes, float scaling, const std::optional<DropoutNumbers>& dropout,
               int32_t device, uintptr_t stream) {
  const ShrinkArguments arguments{AsRankShape(shape),
                                  num_inputs,
                                  AsMatrix("x", x),
                                  AsVector("stack", stack),
                                  AsVector("h", h),
                                  AsVector("u", u),
                                  AsVector("probs", probs),
                                  AsVector("parts", parts),
                                  top_k,
                                  renormalizes,
                                  scaling,
                                  AsDropout(dropout)};
  const int64_t num_splits = CheckedSplits(arguments.shape.num_tokens, num_inputs);
  Run(arguments, Invalid(arguments, num_splits), device, stream, ShrinkCuda);
}

void RunRowProduct(const std::tuple<int64_t, int64_t, int64_t>& shape, const MatrixNumbers& wide,
                   const VectorNumbers& rows, const VectorNumbers& parts, int32_t device,
                   uintptr_t stream) {
  const auto& [num_tokens, num_columns, num_rows] = shape;
  const RowProductArguments arguments{num_tokens,
                                      num_columns,
                                      num_rows,
                                      AsMatrix("wide", wide),
                                      AsVector("rows", rows),
                                      AsVector("parts", parts)};
  const int64_t num_splits = CheckedSplits(num_tokens, num_columns);
  Run(arguments, Invalid(arguments, num_splits), device, stream, RowProductCuda);
}

void RunFactorGradients(const std::tuple<int64_t, int64_t, int64_t>& shape,
                        const MatrixNumbers& wide, const MatrixNumbers& narrow, int64_t num_ranks,
                        const OptionalVector& b, const OptionalVector& du,
                        const VectorNumbers& parts, int64_t rank_columns,
                        const std::optional<DropoutNumbers>& dropout, const NumbersOfGpu& counts,
                        const NumbersOfGpu& done, bool fits_narrow, int32_t device,
                        uintptr_t stream) {
  const auto& [num_tokens, num_columns, num_narrow] = shape;
  const FactorArguments arguments{num_tokens,
                                  num_columns,
                                  num_narrow,
                                  num_ranks,
                                  rank_columns,
                                  AsMatrix("wide", wide),
                                  AsMatrix("narrow", narrow),
                                  AsVector("b", b),
                                  AsVector("du", du),
                                  AsVector("parts", parts),
                                  AsDropout(dropout),
                                  AsIndices(counts),
                                  AsIndices(done),
                                  fits_narrow};
  const auto [num_tiles, num_shares] =
      CheckedParts(num_tokens, num_columns, num_narrow, num_ranks != 0);
  Run(arguments, Invalid(arguments, num_tiles, num_shares), device, stream, FactorGradientsCuda);
}

void RunScaleRanks(const RankShapeNumbers& shape, const VectorNumbers& h,
                   const VectorNumbers& probs, const VectorNumbers& u, float scaling,
                   int32_t device, uintptr_t stream) {
  const ScaleArguments arguments{AsRankShape(shape), AsVector("h", h), AsVector("probs", probs),
                                 AsVector("u", u), scaling};
  Run(arguments, Invalid(arguments), device, stream, ScaleRanksCuda);
}

void RunRankGradients(const RankShapeNumbers& shape, int64_t num_parts, const OptionalVector& du,
                      const VectorNumbers& h, const VectorNumbers& probs,
                      const OptionalVector& dgate, const VectorNumbers& dz, float scaling,
                      int32_t device, uintptr_t stream) {
  const RankArguments arguments{AsRankShape(shape),       num_parts,
                                AsVector("du", du),       AsVector("h", h),
                                AsVector("probs", probs), AsVector("dgate", dgate),
                                AsVector("dz", dz),       scaling};
  Run(arguments, Invalid(arguments), device, stream, RankGradientsCuda);
}

void RunSumShares(const std::tuple<int64_t, int64_t, int64_t>& shape, const VectorNumbers& parts,
                  const std::vector<SumOutputNumbers>& outputs, int32_t device, uintptr_t stream) {
  const auto& [num_parts, num_rows, num_columns] = shape;
  SumArguments arguments{num_parts, num_rows, num_columns, AsVector("parts", parts), {}};
  for (const auto& [out, first, count, is_transposed] : outputs) {
    arguments.outputs.push_back({AsVector("outputs", out), first, count, is_transposed});
  }
  Run(arguments, Invalid(arguments), device, stream, SumSharesCuda);
}

void RunInputUpdate(const RankShapeNumbers& shape, int64_t num_inputs, const MatrixNumbers& dx,
                    const VectorNumbers& dz, const VectorNumbers& stack, bool has_base,
                    const DropoutNumbers& dropout, int32_t device, uintptr_t stream) {
  const InputUpdateArguments arguments{
      AsRankShape(shape),       num_inputs, AsMatrix("dx", dx), AsVector("dz", dz),
      AsVector("stack", stack), has_base,   AsDropout(dropout)};
  Run(arguments, Invalid(arguments), device, stream, InputUpdateCuda);
}

void RunAddNonFinite(const RankShapeNumbers& shape, int64_t num_columns, const VectorNumbers& out,
                     const MatrixNumbers& left, const MatrixNumbers& right,
                     const VectorNumbers& probs, const std::optional<DropoutNumbers>& dropout,
                     int32_t device, uintptr_t stream) {
  const NonFiniteArguments arguments{AsRankShape(shape),       num_columns,
                                     AsVector("out", out),     AsMatrix("left", left),
                                     AsMatrix("right", right), AsVector("probs", probs),
                                     AsDropout(dropout)};
  Run(arguments, Invalid(arguments), device, stream, AddNonFiniteCuda);
}

void RunPackRows(const std::tuple<int64_t, int64_t>& shape,
                 const std::vector<PackedNumbers>& sources, const VectorNumbers& out,
                 const NumbersOfGpu& zeros, int32_t device, uintptr_t stream) {
  const auto& [num_rows, num_columns] = shape;
  PackArguments arguments{num_rows, num_columns, {}, AsVector("out", out), AsIndices(zeros)};
  for (const auto& [matrix, first_row, rows, columns] : sources) {
    arguments.sources.push_back({AsMatrix("sources", matrix), first_row, rows, columns});
  }
  Run(arguments, Invalid(arguments), device, stream, PackRowsCuda);
}

template <class Function, class... Names>
void Define(py::module_& module, const char* name, Function function, Names... names) {
  module.def(name, function, py::kw_only(), Strictly(names)..., Strictly("device"),
             Strictly("stream"));
}

}  // namespace

void BindSkinny(py::module_& module) {
  module.def("shrink_cuda_splits", CheckedSplits, Strictly("num_tokens"), Strictly("num_inputs"));
  module.def("factor_gradients_cuda_parts", CheckedParts, Strictly("num_tokens"),
             Strictly("num_columns"), Strictly("num_narrow"), Strictly("gives_ranks"));
  Define(module, "pack_rows_cuda", RunPackRows, "shape", "sources", "out", "zeros");
  Define(module, "shrink_cuda", RunShrink, "shape", "num_inputs", "x", "stack", "h", "u", "probs",
         "parts", "top_k", "renormalizes", "scaling", "dropout");
  Define(module, "row_product_cuda", RunRowProduct, "shape", "wide", "rows", "parts");
  Define(module, "factor_gradients_cuda", RunFactorGradients, "shape", "wide", "narrow",
         "num_ranks", "b", "du", "parts", "rank_columns", "dropout", "counts", "done",
         "fits_narrow");
  Define(module, "scale_ranks_cuda", RunScaleRanks, "shape", "h", "probs", "u", "scaling");
  Define(module, "rank_gradients_cuda", RunRankGradients, "shape", "num_parts", "du", "h", "probs",
         "dgate", "dz", "scaling");
  Define(module, "sum_shares_cuda", RunSumShares, "shape", "parts", "outputs");
  Define(module, "update_input_gradient_cuda", RunInputUpdate, "shape", "num_inputs", "dx", "dz",
         "stack", "has_base", "dropout");
  Define(module, "add_non_finite_cuda", RunAddNonFinite, "shape", "num_columns", "out", "left",
         "right", "probs", "dropout");
}

}  // namespace citi
#endif
