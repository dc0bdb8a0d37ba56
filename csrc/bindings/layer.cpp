#if defined(CITI_CUDA)
#include "cuda/layer.h"

#include "bindings/cuda_error.h"
#include "bindings/numbers.h"

namespace py = pybind11;

namespace citi {
namespace {

// num_tokens, num_experts, expert_rank, num_in, num_out
using LayerNumbers = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
using OptionalVector = std::optional<VectorNumbers>;
// data, num_bytes
using Memory = std::tuple<uintptr_t, int64_t>;

LayerShape AsShape(const LayerNumbers& numbers) {
  const auto& [num_tokens, num_experts, expert_rank, num_in, num_out] = numbers;
  const LayerShape shape{{num_tokens, num_experts, expert_rank}, num_in, num_out};
  const std::string problem = Invalid(shape);
  if (!problem.empty()) Refuse(problem);
  return shape;
}

Vector AsWorkspace(const Memory& memory) {
  const auto& [data, num_bytes] = memory;
  return {reinterpret_cast<void*>(data), num_bytes, DType::kBool, num_bytes};
}

// Refuses, or runs the layer without holding Python up.
template <class Function>
void Run(Function function) {
  std::string problem;
  cudaError_t error;
  {
    const py::gil_scoped_release released;
    error = function(&problem);
  }
  Check(error);
  if (!problem.empty()) Refuse(problem);
}

// Any address: only the sizes of workspaces follow from it.
Vector SomeVector(bool is_there) {
  return {is_there ? reinterpret_cast<void*>(uintptr_t{16}) : nullptr, 0, DType::kFloat32, 0};
}

int64_t ForwardBytes(const LayerNumbers& shape, bool is_routed) {
  LayerForward layer{};
  layer.shape = AsShape(shape);
  layer.is_routed = is_routed;
  layer.x.dtype = DType::kBFloat16;  // fp16 is as long
  return LayerWorkspaceBytes(layer);
}

int64_t BackwardBytes(const LayerNumbers& shape, bool is_routed,
                      const std::tuple<bool, bool, bool>& needs) {
  const auto& [needs_a, needs_b, needs_router] = needs;
  LayerBackward layer{};
  layer.shape = AsShape(shape);
  layer.is_routed = is_routed;
  layer.dy.dtype = DType::kBFloat16;
  layer.da = SomeVector(needs_a);
  layer.db = SomeVector(needs_b);
  layer.drouter = SomeVector(needs_router);
  return LayerWorkspaceBytes(layer);
}

void RunForward(const LayerNumbers& shape, bool is_routed, float scaling, const MatrixNumbers& x,
                const MatrixNumbers& weight, const OptionalVector& bias, const MatrixNumbers& a,
                const MatrixNumbers& b, const MatrixNumbers& router, const VectorNumbers& y,
                const VectorNumbers& h, const VectorNumbers& probs, const Memory& workspace,
                int32_t device, uintptr_t stream) {
  const LayerForward layer{AsShape(shape),         is_routed,
                           scaling,                AsMatrix("x", x),
                           AsMatrix("weight", weight), AsVector("bias", bias),
                           AsMatrix("a", a),       AsMatrix("b", b),
                           AsMatrix("router", router), AsVector("y", y),
                           AsVector("h", h),       AsVector("probs", probs)};
  Run([&](std::string* problem) {
    return LayerCuda(layer, AsWorkspace(workspace), device, reinterpret_cast<cudaStream_t>(stream),
                     problem);
  });
}

void RunBackward(const LayerNumbers& shape, bool is_routed, float scaling, const MatrixNumbers& dy,
                 const std::optional<MatrixNumbers>& x, const MatrixNumbers& weight,
                 const MatrixNumbers& a, const MatrixNumbers& b, const MatrixNumbers& router,
                 const VectorNumbers& h, const VectorNumbers& probs, const OptionalVector& dgate,
                 const VectorNumbers& dx, const OptionalVector& da, const OptionalVector& db,
                 const OptionalVector& drouter, const Memory& workspace, int32_t device,
                 uintptr_t stream, uintptr_t side) {
  const LayerBackward layer{AsShape(shape),           is_routed,
                            scaling,                  AsMatrix("dy", dy),
                            AsMatrix("x", x),         AsMatrix("weight", weight),
                            AsMatrix("a", a),         AsMatrix("b", b),
                            AsMatrix("router", router), AsVector("h", h),
                            AsVector("probs", probs), AsVector("dgate", dgate),
                            AsVector("dx", dx),       AsVector("da", da),
                            AsVector("db", db),       AsVector("drouter", drouter)};
  Run([&](std::string* problem) {
    return LayerCuda(layer, AsWorkspace(workspace), device, reinterpret_cast<cudaStream_t>(stream),
                     reinterpret_cast<cudaStream_t>(side), problem);
  });
}

}  // namespace

void BindLayer(py::module_& module) {
  module.def("layer_forward_bytes", ForwardBytes, py::kw_only(), Strictly("shape"),
             Strictly("is_routed"));
  module.def("layer_backward_bytes", BackwardBytes, py::kw_only(), Strictly("shape"),
             Strictly("is_routed"), Strictly("needs"));
  module.def("layer_forward_cuda", RunForward, py::kw_only(), Strictly("shape"),
             Strictly("is_routed"), Strictly("scaling"), Strictly("x"), Strictly("weight"),
             Strictly("bias"), Strictly("a"), Strictly("b"), Strictly("router"), Strictly("y"),
             Strictly("h"), Strictly("probs"), Strictly("workspace"), Strictly("device"),
             Strictly("stream"));
  module.def("layer_backward_cuda", RunBackward, py::kw_only(), Strictly("shape"),
             Strictly("is_routed"), Strictly("scaling"), Strictly("dy"), Strictly("x"),
             Strictly("weight"), Strictly("a"), Strictly("b"), Strictly("router"), Strictly("h"),
             Strictly("probs"), Strictly("dgate"), Strictly("dx"), Strictly("da"), Strictly("db"),
             Strictly("drouter"), Strictly("workspace"), Strictly("device"), Strictly("stream"),
             Strictly("side"));
}

}  // namespace citi
#endif
