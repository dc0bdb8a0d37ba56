// Device code of GroupedGradient. Also compiled as plain C++ by a test, which runs the threads of a
// block as threads of the host.
//
// A block owns a tile of one expert's gradient and all of the expert's slots, in order: no sum is
// shared between blocks, and an expert without slots gets zeros.
#pragma once

#include <cstdint>

#include "cuda/grouped_tiles.h"
#include "whole_numbers.h"

namespace citi {

struct GradientLaunch {
  SlotGroups groups;
  const int32_t* order;
  int32_t num_tokens;
  TileOperand left, right;
  TileOutput out;  // num_columns: of one expert
  int64_t num_rows;
  int64_t expert_stride;
  int32_t num_row_tiles;
  int32_t num_column_tiles;
};

template <int kColumns>
struct GradientTile {
  static constexpr int kDepth = 32;  // slots of a step
  static constexpr int kStages = 4;
  static constexpr int kLeftPitch = kTileRows + kVector;
  static constexpr int kRightPitch = kColumns + kVector;
  static constexpr int kLeftElements = kDepth * kLeftPitch;
  static constexpr int kStageElements = kLeftElements + kDepth * kRightPitch;
  // Tokens of the step that is copied, and of the one after.
  static constexpr int64_t kHeadBytes = int64_t{4} * 2 * kDepth;
  static constexpr int64_t kStageBytes = int64_t{2} * kStageElements;
  static constexpr int64_t kSharedBytes =
      kHeadBytes + kStages * kStageBytes + Staging<kColumns>::kBytes;
};

// The token of a slot, or -1.
__device__ inline int32_t TokenOfSlot(const GradientLaunch& g, const SlotTile& slots,
                                      int64_t slot) {
  if (slot >= slots.end) return -1;
  const int32_t flat = FlatOfSlot(g.order, slot, g.groups.num_slots);
  return flat < 0 ? -1 : flat % g.num_tokens;
}

// Columns of the slots from first_slot on, whose tokens are given.
template <class Element, int kColumns, int kPitch>
__device__ __forceinline__ void CopySlots(const TileOperand& from, int64_t first_column,
                                          int64_t first_slot, const int32_t* tokens, Element* to) {
  CopyTile<Element, GradientTile<kColumns>::kDepth, kColumns, kPitch>(
      to, static_cast<const Element*>(from.data), from.stride, from.num_columns, from.is_vector,
      first_column, [&](int i) {
        const int64_t token = tokens[i];
        return from.is_by_slot && token >= 0 ? first_slot + i : token;
      });
}

// Grid: experts * num_row_tiles * num_column_tiles.
template <class Element, int kColumns>
__global__ void __launch_bounds__(kGroupThreads, kMinGroupBlocks)
    SumGroups(const GradientLaunch g) {
  using Tile = GradientTile<kColumns>;
  unsigned char* memory = SharedMemory();
  auto* tokens = reinterpret_cast<int32_t*>(memory);
  auto* stages = reinterpret_cast<Element*>(memory + Tile::kHeadBytes);
  auto* staging =
      reinterpret_cast<float*>(memory + Tile::kHeadBytes + Tile::kStages * Tile::kStageBytes);
  const auto row_tiles = static_cast<unsigned>(g.num_row_tiles);
  const auto column_tiles = static_cast<unsigned>(g.num_column_tiles);
  const SlotTile slots = SlotsOf(g.groups, blockIdx.x / column_tiles / row_tiles);
  const int64_t first_row = int64_t{blockIdx.x / column_tiles % row_tiles} * kTileRows;
  const int64_t first_column = int64_t{blockIdx.x % column_tiles} * kColumns;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_steps = static_cast<int>(CeilDiv(slots.end - slots.first, Tile::kDepth));

  // A thread fetches the token of one slot two steps before it is used: nothing waits for it.
  int32_t next_token = -1;
  const auto fetch_token = [&](int step) {
    if (thread < Tile::kDepth) {
      next_token = TokenOfSlot(g, slots, slots.first + int64_t{step} * Tile::kDepth + thread);
    }
  };
  const auto show_token = [&](int step) {
    if (thread < Tile::kDepth) tokens[step % 2 * Tile::kDepth + thread] = next_token;
    fetch_token(step + 1);
  };
  const auto copy = [&](int step) {
    if (step < num_steps) {
      Element* stage = stages + step % Tile::kStages * Tile::kStageElements;
      const int64_t first_slot = slots.first + int64_t{step} * Tile::kDepth;
      const int32_t* of_step = tokens + step % 2 * Tile::kDepth;
      CopySlots<Element, kTileRows, Tile::kLeftPitch>(g.left, first_row, first_slot, of_step,
                                                      stage);
      CopySlots<Element, kColumns, Tile::kRightPitch>(g.right, first_column, first_slot, of_step,
                                                      stage + Tile::kLeftElements);
    }
    CommitCopies();
  };
  fetch_token(0);
  show_token(0);
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    __syncthreads();
    copy(step);
    show_token(step + 1);
  }

  float sums[kColumns / 8][4] = {};
  for (int step = 0; step < num_steps; ++step) {
    WaitForCopies<Tile::kStages - 2>();
    // All have this step's copies and the next tokens, and none still reads the stage filled next.
    __syncthreads();
    copy(step + Tile::kStages - 1);
    show_token(step + Tile::kStages);
    const Element* stage = stages + step % Tile::kStages * Tile::kStageElements;
    MultiplyTiles<Element, kColumns, Tile::kDepth, Tile::kLeftPitch, Tile::kRightPitch, true,
                  false>(sums, stage + WarpOfThread() * kWarpRows, stage + Tile::kLeftElements);
  }
  WaitForCopies<0>();

  TileOutput out = g.out;
  const int64_t at = slots.group * g.expert_stride;
  out.data = static_cast<unsigned char*>(out.data) + at * (out.is_float ? 4 : 2);
  UseSums<kColumns>(sums, staging, [&](int, int row_of_warp, int column, float (&eight)[kVector]) {
    const int64_t row = first_row + WarpOfThread() * kWarpRows + row_of_warp;
    PutEight<Element>(out, row, first_column + column, eight, row < g.num_rows);
  });
}

}  // namespace citi
