// What is refused of a grouped product or gradient, by name.

#include <array>
#include <cstdint>
#include <string>

#include "checks.h"
#include "grouped_arguments.h"

namespace citi {
namespace {

constexpr int64_t kTokens = 5, kExperts = 3, kTopK = 2, kRank = 4, kFeatures = 6, kTiles = 2;
constexpr int64_t kSlots = kTokens * kTopK;

// Memory of two valid problems; nothing reads it.
struct Memory {
  std::array<uint16_t, kSlots * kRank> slots, factors;
  std::array<uint16_t, kTokens * kFeatures> tokens;
  std::array<uint16_t, kExperts * kRank * kFeatures> weight, gradient;
  std::array<float, kTokens*(kExperts + 1)> gates;
  std::array<float, kSlots * kTiles> dots;
  std::array<int32_t, kSlots> order;
  std::array<int32_t, kExperts * kTopK + 1> offsets;
};
Memory memory;

template <class Array>
Matrix Of(Array& array, DType dtype, int64_t num_columns) {
  return {array.data(), static_cast<int64_t>(sizeof array), dtype, num_columns, 1};
}

template <class Array>
Indices Of(const Array& array) {
  return {array.data(), static_cast<int64_t>(sizeof array), static_cast<int64_t>(array.size())};
}

Routing ValidRouting() { return {kTokens, kExperts, kTopK, Of(memory.order), Of(memory.offsets)}; }

// The gradient in rank space: every argument takes part.
GroupedProduct ValidProduct() {
  const DType bf16 = DType::kBFloat16;
  return {ValidRouting(),
          0,
          kTopK,
          kFeatures,
          kRank,
          {Of(memory.tokens, bf16, kFeatures), false},
          Of(memory.weight, bf16, kExperts * kRank),
          false,
          false,
          {Of(memory.slots, bf16, kRank), true},
          false,
          Of(memory.gates, DType::kFloat32, kExperts + 1),
          0.5f,
          Of(memory.factors, bf16, kRank),
          {memory.dots.data(), sizeof memory.dots, DType::kFloat32, kSlots * kTiles}};
}

GroupedGradient ValidGradient() {
  const DType f16 = DType::kFloat16;
  return {ValidRouting(),
          kRank,
          kFeatures,
          {Of(memory.slots, f16, kRank), true},
          {Of(memory.tokens, f16, kFeatures), false},
          Of(memory.gradient, f16, kFeatures),
          true};
}

void CheckMessage(const std::string& message, const std::string& wanted) {
  CHECK(message.compare(0, wanted.size(), wanted) == 0, "wanted " + wanted + ", got: " + message);
}

template <class Change>
void Product(const char* wanted, const Change& change) {
  GroupedProduct product = ValidProduct();
  change(product);
  CheckMessage(Invalid(product, kTiles), wanted);
}

template <class Change>
void Gradient(const char* wanted, const Change& change) {
  GroupedGradient gradient = ValidGradient();
  change(gradient);
  CheckMessage(Invalid(gradient), wanted);
}

void CheckSizes() {
  Product("num_tokens: must be in", [](auto& p) { p.routing.num_tokens = 0; });
  Product("num_tokens: must be in", [](auto& p) { p.routing.num_tokens = INT64_MAX; });
  Product("num_experts", [](auto& p) { p.routing.num_experts = -1; });
  Product("top_k: must not exceed", [](auto& p) { p.routing.top_k = 4; });
  Product("top_k: too many slots", [](auto& p) { p.routing.num_tokens = INT32_MAX; });
  Product("num_in", [](auto& p) { p.num_in = int64_t{1} << 31; });
  Product("num_out", [](auto& p) { p.num_out = 0; });
  Product("order: must have 10 entries, got 9", [](auto& p) { p.routing.order.size = 9; });
  Product("order: must stay within", [](auto& p) { p.routing.order.num_bytes -= 1; });
  Product("order: data must not be null", [](auto& p) { p.routing.order.data = nullptr; });
  Product("offsets: must have 7 entries", [](auto& p) { p.routing.offsets.size = 6; });
  Product("offsets: data must be aligned", [](auto& p) {
    p.routing.offsets.data =
        reinterpret_cast<const int32_t*>(reinterpret_cast<uintptr_t>(p.routing.offsets.data) + 2);
  });
  Product("choices: must be a range within the 2, got 1 to 1",
          [](auto& p) { p.first_choice = p.end_choice = 1; });
  Product("choices: must be a range", [](auto& p) { p.end_choice = 3; });
  Product("choices: must be a range", [](auto& p) { p.first_choice = -1; });
  Product("choices: must be one", [](auto& p) { p.out.are_slots = false; });
  Gradient("num_rows", [](auto& g) { g.num_rows = 0; });
  Gradient("num_columns", [](auto& g) { g.num_columns = -5; });
  Gradient("offsets", [](auto& g) { g.routing.offsets.size = 8; });
}

void CheckMatrices() {
  Product("rows: dtype must be bf16 or fp16",
          [](auto& p) { p.rows.matrix.dtype = DType::kFloat32; });
  Product("rows: shape and strides", [](auto& p) { p.rows.are_slots = true; });
  Product("rows: column stride must be 1, got 2", [](auto& p) {
    p.rows.matrix.row_stride = 1;
    p.rows.matrix.column_stride = 2;
  });
  Product("weight: dtype must be that", [](auto& p) { p.weight.dtype = DType::kFloat16; });
  Product("weight: shape and strides", [](auto& p) { p.weight.num_bytes -= 1; });
  Product("weight: shape and strides", [](auto& p) { p.experts_in_rows = true; });
  Product("out: dtype must be that of the inputs or fp32",
          [](auto& p) { p.out.matrix.dtype = DType::kFloat64; });
  Product("out: shape and strides", [](auto& p) { p.out.matrix.dtype = DType::kFloat32; });
  Product("out: rows must not overlap", [](auto& p) { p.out.matrix.row_stride = 3; });
  Product("out: data must not be null", [](auto& p) { p.out.matrix.data = nullptr; });
  Gradient("left: shape and strides", [](auto& g) { g.left.matrix.row_stride = 5; });
  Gradient("right: dtype must be that", [](auto& g) { g.right.matrix.dtype = DType::kBFloat16; });
  Gradient("right: strides must not be negative", [](auto& g) { g.right.matrix.row_stride = -6; });
  Gradient("out: shape and strides", [](auto& g) { g.out.num_bytes -= 2; });
  Gradient("out: rows must not overlap", [](auto& g) { g.out.row_stride = 0; });
}

void CheckOptionals() {
  Product("gates: dtype must be fp32", [](auto& p) { p.gates.dtype = DType::kBFloat16; });
  Product("gates: shape and strides", [](auto& p) { p.gates.num_bytes -= 4; });
  Product("dots: come with factors", [](auto& p) { p.factors.data = nullptr; });
  Product("dots: come with factors", [](auto& p) { p.dots.data = nullptr; });
  Product("factors: dtype must be that", [](auto& p) { p.factors.dtype = DType::kFloat32; });
  Product("factors: shape and strides", [](auto& p) { p.factors.row_stride = 5; });
  Product("dots: dtype must be fp32", [](auto& p) { p.dots.dtype = DType::kFloat64; });
  Product("dots: must have 20 entries, got 10", [](auto& p) { p.dots.size = kSlots; });
}

void CheckOverlap() {
  Product("out: must not overlap factors", [](auto& p) { p.out.matrix.data = p.factors.data; });
  Product("out: must not overlap rows", [](auto& p) {
    p.out.matrix = p.rows.matrix, p.out.matrix.row_stride = kRank, p.out.matrix.num_bytes = 80;
  });
  Product("dots: must not overlap gates",
          [](auto& p) { p.dots.data = const_cast<void*>(p.gates.data); });
  Product("dots: must not overlap order",
          [](auto& p) { p.dots.data = const_cast<int32_t*>(p.routing.order.data); });
  Gradient("out: must not overlap right", [](auto& g) { g.out.data = g.right.matrix.data; });
  Gradient("out: must not overlap offsets", [](auto& g) { g.out.data = g.routing.offsets.data; });
}

}  // namespace
}  // namespace citi

int main() {
  using namespace citi;
  CHECK(Invalid(ValidProduct(), kTiles) == "", Invalid(ValidProduct(), kTiles));
  CHECK(Invalid(ValidGradient()) == "", Invalid(ValidGradient()));
  CheckSizes();
  CheckMatrices();
  CheckOptionals();
  CheckOverlap();
  return Report();
}
