#include "layer_arguments.h"

namespace citi {
namespace {

constexpr int64_t kMaxWidth = int64_t{1} << 31;

std::string InvalidLayer(const LayerShape& shape, const char* name, DType dtype) {
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    return std::string(name) + ": dtype must be bf16 or fp16";
  }
  return Invalid(shape);
}

Vector FirstOf(const Vector& vector, int64_t size) {
  return {vector.data, vector.num_bytes, vector.dtype, size};
}

}  // namespace

std::string Invalid(const LayerShape& shape) {
  std::string problem = Invalid(shape.ranks);
  if (problem.empty()) problem = InvalidSize("num_in", shape.num_in, kMaxWidth);
  if (problem.empty()) problem = InvalidSize("num_out", shape.num_out, kMaxWidth);
  if (problem.empty() && (shape.num_in % 8 != 0 || shape.num_out % 8 != 0)) {
    problem = "shape: num_in and num_out must be multiples of 8";
  }
  return problem;
}

std::string Invalid(const LayerForward& layer) {
  return InvalidLayer(layer.shape, "x", layer.x.dtype);
}

std::string Invalid(const LayerBackward& layer) {
  return InvalidLayer(layer.shape, "dy", layer.dy.dtype);
}

std::string InvalidOverlap(const LayerForward& layer, const Vector& workspace) {
  const auto& [ranks, num_in, num_out] = layer.shape;
  return InvalidOverlap({{"workspace", workspace},
                         {"y", FirstOf(layer.y, ranks.num_tokens * num_out)},
                         {"h", layer.h},
                         {"probs", layer.probs},
                         {"x", ExtentOf(layer.x, ranks.num_tokens, num_in)},
                         {"weight", ExtentOf(layer.weight, num_out, num_in)},
                         {"bias", layer.bias},
                         {"a", ExtentOf(layer.a, ranks.num_ranks(), num_in)},
                         {"b", ExtentOf(layer.b, num_out, ranks.num_ranks())},
                         {"router", ExtentOf(layer.router, ranks.num_gates(), num_in)}},
                        4);
}

std::string InvalidOverlap(const LayerBackward& layer, const Vector& workspace) {
  const auto& [ranks, num_in, num_out] = layer.shape;
  std::vector<Named> tensors = {{"workspace", workspace},
                                {"dx", FirstOf(layer.dx, ranks.num_tokens * num_in)},
                                {"da", layer.da},
                                {"db", layer.db},
                                {"drouter", layer.drouter},
                                {"dy", ExtentOf(layer.dy, ranks.num_tokens, num_out)},
                                {"weight", ExtentOf(layer.weight, num_out, num_in)},
                                {"a", ExtentOf(layer.a, ranks.num_ranks(), num_in)},
                                {"b", ExtentOf(layer.b, num_out, ranks.num_ranks())},
                                {"router", ExtentOf(layer.router, ranks.num_gates(), num_in)},
                                {"h", layer.h},
                                {"probs", layer.probs},
                                {"dgate", layer.dgate}};
  if (layer.da.data != nullptr || layer.drouter.data != nullptr) {
    tensors.push_back({"x", ExtentOf(layer.x, ranks.num_tokens, num_in)});
  }
  return InvalidOverlap(tensors, 5);
}

}  // namespace citi
