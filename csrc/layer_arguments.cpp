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

}  // namespace citi
