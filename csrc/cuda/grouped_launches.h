// How grouped products are laid out on a GPU: pure arithmetic, also used where there is none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/grouped_gradient_kernel.h"
#include "cuda/grouped_product_kernel.h"
#include "grouped_arguments.h"
#include "whole_numbers.h"

namespace citi {

// Blocks that fill any GPU of today several times. Assumed, not measured.
constexpr int64_t kWantedGroupBlocks = 2112;
constexpr int64_t kMaxRun = 8;

// What a block may have on every GPU since sm_80; sm_89 has the least.
constexpr int64_t kMaxSharedBytes = 99 * 1024;
static_assert(ProductTile<32, true>::kSharedBytes <= kMaxSharedBytes);
static_assert(ProductTile<64, true>::kSharedBytes <= kMaxSharedBytes);
static_assert(ProductTile<128, true>::kSharedBytes <= kMaxSharedBytes);
static_assert(GradientTile<128>::kSharedBytes <= kMaxSharedBytes);

// Columns of a tile: rank-sized results fit one narrow tile.
inline int ColumnsOfTile(int64_t num_columns) {
  return num_columns <= 32 ? 32 : num_columns <= 64 ? 64 : 128;
}

inline int64_t NumColumnTiles(int64_t num_columns) {
  return CeilDiv(num_columns, ColumnsOfTile(num_columns));
}

// Whether rows of num_columns elements are whole vectors of 16 bytes, those of each expert too.
inline bool HasVectors(const Matrix& matrix, int64_t num_columns) {
  const int64_t per_vector = 16 / SizeOf(matrix.dtype);
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
         matrix.row_stride % per_vector == 0 && num_columns % kVector == 0;
}

inline TileOperand OperandOf(const Matrix& matrix, int64_t num_columns, bool is_by_slot) {
  return {matrix.data, matrix.row_stride, num_columns, HasVectors(matrix, num_columns), is_by_slot};
}

inline TileOutput OutputOf(const Matrix& matrix, int64_t num_columns, bool is_by_slot, bool adds) {
  return {const_cast<void*>(matrix.data),
          matrix.row_stride,
          num_columns,
          HasVectors(matrix, num_columns),
          is_by_slot,
          matrix.dtype == DType::kFloat32,
          adds};
}

inline SlotGroups GroupsOf(const Routing& routing, int64_t first_choice, int64_t end_choice) {
  return {routing.offsets.data, routing.num_experts, routing.top_k,
          first_choice,         end_choice,          routing.num_slots()};
}

struct ProductPlan {
  ProductLaunch launch;
  int columns;  // of a tile
  int64_t num_blocks;
};

inline ProductPlan PlanProduct(const GroupedProduct& p) {
  ProductPlan plan{};
  ProductLaunch& launch = plan.launch;
  const Routing& routing = p.routing;
  const int64_t columns_of_weight = p.weight_is_out_in ? p.num_in : p.num_out;
  const int64_t rows_of_weight = p.weight_is_out_in ? p.num_out : p.num_in;
  launch.groups = GroupsOf(routing, p.first_choice, p.end_choice);
  launch.order = routing.order.data;
  launch.num_tokens = static_cast<int32_t>(routing.num_tokens);
  launch.rows = OperandOf(p.rows.matrix, p.num_in, p.rows.are_slots);
  launch.weight = OperandOf(p.weight, columns_of_weight, false);
  launch.expert_stride =
      p.experts_in_rows ? rows_of_weight * p.weight.row_stride : columns_of_weight;
  launch.out = OutputOf(p.out.matrix, p.num_out, p.out.are_slots, p.adds);
  launch.num_in = p.num_in;
  launch.gates = static_cast<const float*>(p.gates.data);
  launch.gates_stride = p.gates.row_stride;
  launch.scaling = p.scaling;
  launch.factors = OperandOf(p.factors, p.num_out, true);
  launch.dots = static_cast<float*>(p.dots.data);

  plan.columns = ColumnsOfTile(p.num_out);
  const int64_t num_column_tiles = NumColumnTiles(p.num_out);
  const int64_t num_row_tiles =
      MaxTiles((p.end_choice - p.first_choice) * routing.num_tokens, routing.num_experts);
  const int64_t run = std::clamp(num_row_tiles * num_column_tiles / kWantedGroupBlocks, int64_t{1},
                                 std::min(kMaxRun, num_column_tiles));
  launch.num_column_tiles = static_cast<int32_t>(num_column_tiles);
  launch.run = static_cast<int32_t>(run);
  launch.num_runs = static_cast<int32_t>(CeilDiv(num_column_tiles, run));
  plan.num_blocks = num_row_tiles * launch.num_runs;
  return plan;
}

struct GradientPlan {
  GradientLaunch launch;
  int columns;  // of a tile
  int64_t num_blocks;
};

inline GradientPlan PlanGradient(const GroupedGradient& g) {
  GradientPlan plan{};
  GradientLaunch& launch = plan.launch;
  const Routing& routing = g.routing;
  launch.groups = GroupsOf(routing, 0, routing.top_k);
  launch.order = routing.order.data;
  launch.num_tokens = static_cast<int32_t>(routing.num_tokens);
  launch.left = OperandOf(g.left.matrix, g.num_rows, g.left.are_slots);
  launch.right = OperandOf(g.right.matrix, g.num_columns, g.right.are_slots);
  launch.out = OutputOf(g.out, g.num_columns, false, false);
  launch.num_rows = g.num_rows;
  launch.expert_stride = g.experts_in_rows ? g.num_rows * g.out.row_stride : g.num_columns;

  plan.columns = ColumnsOfTile(g.num_columns);
  launch.num_row_tiles = static_cast<int32_t>(CeilDiv(g.num_rows, kTileRows));
  launch.num_column_tiles = static_cast<int32_t>(NumColumnTiles(g.num_columns));
  plan.num_blocks = routing.num_experts * launch.num_row_tiles * launch.num_column_tiles;
  return plan;
}

// Calls use(Element{}, a number whose value is the columns of a tile) for what a plan wants.
template <class Use>
auto WithTile(DType dtype, int columns, const Use& use) {
  const auto with_columns = [&](auto element) {
    if (columns == 32) return use(element, std::integral_constant<int, 32>{});
    if (columns == 64) return use(element, std::integral_constant<int, 64>{});
    return use(element, std::integral_constant<int, 128>{});
  };
  return dtype == DType::kBFloat16 ? with_columns(BFloat16{}) : with_columns(Float16{});
}

}  // namespace citi
