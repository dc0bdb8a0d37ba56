// Device code of GroupedProduct. Also compiled as plain C++ by a test, which runs the threads of a
// block as threads of the host.
//
// A block owns the slots of one tile and a run of column tiles. Its steps, each a depth of one
// column tile after another, form one pipeline: copies run kStages - 1 steps ahead of the products,
// also across column tiles.
#pragma once

#include <cstdint>

#include "cuda/grouped_tiles.h"
#include "whole_numbers.h"

namespace citi {

struct ProductLaunch {
  SlotGroups groups;
  const int32_t* order;
  int32_t num_tokens;
  TileOperand rows;
  TileOperand weight;  // num_columns: of one expert
  int64_t expert_stride;
  TileOutput out;
  int64_t num_in;
  const float* gates;  // or null
  int64_t gates_stride;
  float scaling;
  TileOperand factors;  // data may be null
  float* dots;
  int32_t num_column_tiles;
  int32_t run;  // column tiles of a block
  int32_t num_runs;
};

struct ProductRows {
  int32_t flats[kTileRows];  // choice * T + token; -1: no row
  int32_t tokens[kTileRows];
  float scales[kTileRows];
  TileSearch search;
};

template <int kColumns, bool kIsOutIn>
struct ProductTile {
  static constexpr int kDepth = kColumns > 64 ? 32 : 64;
  static constexpr int kStages = kColumns > 32 ? 3 : 4;
  static constexpr int kRowPitch = kDepth + kVector;
  static constexpr int kWeightRows = kIsOutIn ? kColumns : kDepth;
  static constexpr int kWeightColumns = kIsOutIn ? kDepth : kColumns;
  static constexpr int kWeightPitch = kWeightColumns + kVector;
  static constexpr int kRowElements = kTileRows * kRowPitch;
  static constexpr int kStageElements = kRowElements + kWeightRows * kWeightPitch;
  static constexpr int64_t kHeadBytes = (int64_t{sizeof(ProductRows)} + 127) / 128 * 128;
  static constexpr int64_t kStageBytes = int64_t{2} * kStageElements;
  static constexpr int64_t kSharedBytes =
      kHeadBytes + kStages * kStageBytes + Staging<kColumns>::kBytes;
};

// Fills what the rows of a tile are; a barrier must follow.
__device__ inline void DescribeRows(const ProductLaunch& p, const SlotTile& tile,
                                    ProductRows* rows) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kTileRows) return;
  const int64_t slot = tile.first + i;
  const int32_t flat = slot < tile.end ? FlatOfSlot(p.order, slot, p.groups.num_slots) : -1;
  const int32_t token = flat < 0 ? -1 : flat % p.num_tokens;
  rows->flats[i] = flat;
  rows->tokens[i] = token;
  float scale = p.scaling;
  if (p.gates != nullptr && token >= 0) {
    scale *= p.gates[token * p.gates_stride + 1 + tile.group];
  }
  rows->scales[i] = scale;
}

// The row of a tile in a matrix of slots or of tokens, or -1.
__device__ __forceinline__ int64_t RowInMatrix(const ProductRows& rows, const SlotTile& tile, int i,
                                               bool is_by_slot) {
  const int64_t token = rows.tokens[i];
  return is_by_slot && token >= 0 ? tile.first + i : token;
}

template <class Element, int kColumns, bool kIsOutIn>
__device__ __forceinline__ void CopyProductStep(const ProductLaunch& p, const SlotTile& tile,
                                                const ProductRows& rows, int64_t first_in,
                                                int64_t first_out, Element* stage) {
  using Tile = ProductTile<kColumns, kIsOutIn>;
  CopyTile<Element, kTileRows, Tile::kDepth, Tile::kRowPitch>(
      stage, static_cast<const Element*>(p.rows.data), p.rows.stride, p.num_in, p.rows.is_vector,
      first_in, [&](int i) { return RowInMatrix(rows, tile, i, p.rows.is_by_slot); });
  const int64_t first_row = kIsOutIn ? first_out : first_in;
  const int64_t num_rows = kIsOutIn ? p.out.num_columns : p.num_in;
  CopyTile<Element, Tile::kWeightRows, Tile::kWeightColumns, Tile::kWeightPitch>(
      stage + Tile::kRowElements,
      static_cast<const Element*>(p.weight.data) + tile.group * p.expert_stride, p.weight.stride,
      p.weight.num_columns, p.weight.is_vector, kIsOutIn ? first_in : first_out,
      [&](int i) { return first_row + i < num_rows ? first_row + i : int64_t{-1}; });
}

// Scales and puts the sums of this warp's rows and one column tile, and forms their dots.
template <class Element, int kColumns>
__device__ __forceinline__ void FinishColumns(const ProductLaunch& p, const SlotTile& tile,
                                              const ProductRows& rows, int column_tile,
                                              const float (&sums)[kColumns / 8][4],
                                              float* staging) {
  using Layout = Staging<kColumns>;
  const int first_row = WarpOfThread() * kWarpRows;
  const int64_t first_column = int64_t{column_tile} * kColumns;
  float dots[Layout::kPasses] = {};
  UseSums<kColumns>(sums, staging,
                    [&](int pass, int row_of_warp, int in_tile, float (&eight)[kVector]) {
                      const int i = first_row + row_of_warp;
                      const int64_t column = first_column + in_tile;
                      const bool is_valid = rows.tokens[i] >= 0;
                      if (p.dots != nullptr && is_valid && column < p.out.num_columns) {
                        float factors[kVector];
                        LoadEight(static_cast<const Element*>(p.factors.data) +
                                      (tile.first + i) * p.factors.stride + column,
                                  p.factors.is_vector, p.out.num_columns - column, factors);
#pragma unroll
                        for (int j = 0; j < kVector; ++j) dots[pass] += factors[j] * eight[j];
                      }
#pragma unroll
                      for (int j = 0; j < kVector; ++j) eight[j] *= rows.scales[i];
                      PutEight<Element>(p.out, RowInMatrix(rows, tile, i, p.out.is_by_slot), column,
                                        eight, is_valid);
                    });
  if (p.dots == nullptr) return;
#pragma unroll
  for (int pass = 0; pass < Layout::kPasses; ++pass) {
#pragma unroll
    for (int width = Layout::kLanesOfRow / 2; width > 0; width /= 2) {
      dots[pass] += __shfl_xor_sync(kWholeWarp, dots[pass], width);
    }
    const int lane = LaneOfThread();
    const int flat =
        rows.flats[first_row + pass * Layout::kRowsAtOnce + lane / Layout::kLanesOfRow];
    if (lane % Layout::kLanesOfRow == 0 && flat >= 0) {
      p.dots[column_tile * p.groups.num_slots + flat] = p.scaling * dots[pass];
    }
  }
}

// Grid: MaxTiles * num_runs.
template <class Element, int kColumns, bool kIsOutIn>
__global__ void __launch_bounds__(kGroupThreads, kMinGroupBlocks)
    MultiplyGroups(const ProductLaunch p) {
  using Tile = ProductTile<kColumns, kIsOutIn>;
  unsigned char* memory = SharedMemory();
  auto* rows = reinterpret_cast<ProductRows*>(memory);
  auto* stages = reinterpret_cast<Element*>(memory + Tile::kHeadBytes);
  auto* staging =
      reinterpret_cast<float*>(memory + Tile::kHeadBytes + Tile::kStages * Tile::kStageBytes);
  const auto num_runs = static_cast<unsigned>(p.num_runs);
  const SlotTile tile = FindTile(p.groups, blockIdx.x / num_runs, &rows->search);
  if (tile.first == tile.end) return;
  DescribeRows(p, tile, rows);
  __syncthreads();

  const int first_tile = static_cast<int>(blockIdx.x % num_runs) * p.run;
  const int left = p.num_column_tiles - first_tile;
  const int num_depths = static_cast<int>(CeilDiv(p.num_in, Tile::kDepth));
  const int num_steps = num_depths * (left < p.run ? left : p.run);
  int copied_step = 0, copied_tile = first_tile, copied_depth = 0;
  const auto copy_next = [&] {
    if (copied_step < num_steps) {
      CopyProductStep<Element, kColumns, kIsOutIn>(
          p, tile, *rows, int64_t{copied_depth} * Tile::kDepth, int64_t{copied_tile} * kColumns,
          stages + copied_step % Tile::kStages * Tile::kStageElements);
    }
    CommitCopies();
    ++copied_step;
    if (++copied_depth == num_depths) copied_depth = 0, ++copied_tile;
  };
#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; ++i) copy_next();

  const bool has_rows = tile.first + WarpOfThread() * kWarpRows < tile.end;
  float sums[kColumns / 8][4] = {};
  int column_tile = first_tile, depth = 0;
  for (int step = 0; step < num_steps; ++step) {
    WaitForCopies<Tile::kStages - 2>();
    // All have this step's copies, and none still reads the stage that is filled next.
    __syncthreads();
    copy_next();
    const Element* stage = stages + step % Tile::kStages * Tile::kStageElements;
    if (has_rows) {
      MultiplyTiles<Element, kColumns, Tile::kDepth, Tile::kRowPitch, Tile::kWeightPitch, false,
                    kIsOutIn>(sums, stage + WarpOfThread() * kWarpRows * Tile::kRowPitch,
                              stage + Tile::kRowElements);
    }
    if (++depth < num_depths) continue;
    if (has_rows) {
      FinishColumns<Element, kColumns>(p, tile, *rows, column_tile, sums, staging);
    }
#pragma unroll
    for (auto& fragment : sums) {
#pragma unroll
      for (float& sum : fragment) sum = 0.0f;
    }
    depth = 0, ++column_tile;
  }
  WaitForCopies<0>();
}

}  // namespace citi
