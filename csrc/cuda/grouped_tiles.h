// What the grouped kernels share: a block's slots, tiles of operands by asynchronous copies,
// products of tiles on tensor cores, and rows of eight results.
//
// A block has four warps; each owns 16 of the kTileRows rows of a tile of results, and all of its
// columns. Rows in shared memory are padded by 16 bytes, so that the rows of a matrix that ldmatrix
// reads lie in different banks.
#pragma once

#include <cstdint>

#include "cuda/grouped_plan.h"
#include "cuda/tensor_core.h"
#include "dtype.h"

namespace citi {

constexpr int kWarpSize = 32;
constexpr int kGroupWarps = kGroupThreads / kWarpSize;
constexpr int kWarpRows = kTileRows / kGroupWarps;
// On a multiprocessor, as shared memory allows.
constexpr int kMinGroupBlocks = 3;
// Elements of 16 bytes.
constexpr int kVector = 8;
constexpr uint32_t kWholeWarp = 0xffffffffu;
static_assert(kWarpRows == 16, "the rows of one mma");

// A matrix whose rows are contiguous. is_vector: rows begin at 16 bytes and have whole vectors.
struct TileOperand {
  const void* data;
  int64_t stride;
  int64_t num_columns;
  bool is_vector;
  bool is_by_slot;
};

struct TileOutput {
  void* data;
  int64_t stride;
  int64_t num_columns;
  bool is_vector;
  bool is_by_slot;
  bool is_float;  // else in the element of the operands
  bool adds;
};

struct TileSearch {
  int64_t counts[kGroupWarps];
  SlotTile found;
};

__device__ inline int LaneOfThread() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int WarpOfThread() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// The tile of this number, or an empty one; called by all threads of a block.
__device__ inline SlotTile FindTile(const SlotGroups& groups, int64_t tile, TileSearch* search) {
  const int thread = static_cast<int>(threadIdx.x), lane = LaneOfThread();
  const int64_t mine = CountTiles(groups, thread);
  int64_t end = mine;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int64_t before = __shfl_up_sync(kWholeWarp, end, static_cast<unsigned>(distance));
    if (lane >= distance) end += before;
  }
  if (lane == kWarpSize - 1) search->counts[WarpOfThread()] = end;
  if (thread == 0) search->found = {0, 0, 0};
  __syncthreads();
  for (int warp = 0; warp < WarpOfThread(); ++warp) end += search->counts[warp];
  if (tile < end && tile >= end - mine) {
    search->found = TileOfThread(groups, thread, tile - (end - mine));
  }
  __syncthreads();
  return search->found;
}

// order[slot], or -1 where that is no slot of a token.
__device__ inline int32_t FlatOfSlot(const int32_t* order, int64_t slot, int64_t num_slots) {
  const int32_t flat = order[slot];
  return flat >= 0 && flat < num_slots ? flat : -1;
}

// kRows x kColumns elements from first_column on, of the rows that row_of(0), row_of(1), ... name;
// zeros for a row of -1 and beyond the columns. Arrives with the copies that this thread commits.
template <class Element, int kRows, int kColumns, int kPitch, class RowOf>
__device__ __forceinline__ void CopyTile(Element* shared, const Element* data, int64_t stride,
                                         int64_t num_columns, bool is_vector, int64_t first_column,
                                         const RowOf& row_of) {
  constexpr int kVectors = kColumns / kVector;
  constexpr int kCopies = kRows * kVectors / kGroupThreads;
  static_assert(kRows * kVectors % kGroupThreads == 0, "every thread copies as much");
  const auto with_place = [&](int copy, const auto& use) {
    const int at = static_cast<int>(threadIdx.x) + copy * kGroupThreads;
    const int row = at / kVectors, in_row = at % kVectors * kVector;
    const int64_t from_row = row_of(row), left = num_columns - first_column - in_row;
    const bool is_valid = from_row >= 0 && left > 0;
    use(shared + row * kPitch + in_row,
        is_valid ? data + from_row * stride + first_column + in_row : data, is_valid ? left : 0);
  };
  if (is_vector) {
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      with_place(copy, [](Element* to, const Element* from, int64_t left) {
        CopyAsync(to, from, left > 0);
      });
    }
    return;
  }
  // Not unrolled: the registers are for the products.
#pragma unroll 1
  for (int copy = 0; copy < kCopies; ++copy) {
    with_place(copy, [](Element* to, const Element* from, int64_t left) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) to[j] = j < left ? from[j] : Element{0};
    });
  }
}

// 16 x kColumns sums += the product over kDepth of two tiles in shared memory:
//   rows     [rows][depth], this warp's; kRowsAreDeep: [depth][rows]
//   columns  [depth][columns]; kColumnsAreOuter: [columns][depth]
template <class Element, int kColumns, int kDepth, int kRowPitch, int kColumnPitch,
          bool kRowsAreDeep, bool kColumnsAreOuter>
__device__ __forceinline__ void MultiplyTiles(float (&sums)[kColumns / 8][4], const Element* rows,
                                              const Element* columns) {
  const int lane = LaneOfThread();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t of_rows[4], of_columns[4];
    if constexpr (kRowsAreDeep) {
      LoadMatricesTransposed(of_rows,
                             rows + (k + lane / 16 * 8 + lane % 8) * kRowPitch + lane / 8 % 2 * 8);
    } else {
      LoadMatrices(of_rows, rows + lane % 16 * kRowPitch + k + lane / 16 * 8);
    }
#pragma unroll
    for (int n = 0; n < kColumns; n += 16) {
      if constexpr (kColumnsAreOuter) {
        LoadMatrices(of_columns, columns + (n + lane / 16 * 8 + lane % 8) * kColumnPitch + k +
                                     lane / 8 % 2 * 8);
      } else {
        LoadMatricesTransposed(of_columns,
                               columns + (k + lane % 16) * kColumnPitch + n + lane / 16 * 8);
      }
      MultiplyAdd<Element>(sums[n / 8], of_rows, of_columns[0], of_columns[1]);
      MultiplyAdd<Element>(sums[n / 8 + 1], of_rows, of_columns[2], of_columns[3]);
    }
  }
}

// How results leave their fragments: a warp writes up to 64 columns of its rows to shared memory,
// and reads them back eight at a time.
template <int kColumns>
struct Staging {
  static constexpr int kPiece = kColumns < 64 ? kColumns : 64;
  static constexpr int kPitch = kPiece + kVector;
  static constexpr int kLanesOfRow = kPiece / kVector;
  static constexpr int kRowsAtOnce = kWarpSize / kLanesOfRow;
  static constexpr int kPasses = kWarpRows / kRowsAtOnce;
  static constexpr int64_t kBytes = int64_t{4} * kTileRows * kPitch;
};

// Calls use(pass, row of the warp, column, eight sums) until this warp's sums are used up.
template <int kColumns, class Use>
__device__ __forceinline__ void UseSums(const float (&sums)[kColumns / 8][4], float* staging,
                                        const Use& use) {
  using Layout = Staging<kColumns>;
  const int lane = LaneOfThread(), g = lane / 4, c = lane % 4;
  float* mine = staging + WarpOfThread() * kWarpRows * Layout::kPitch;
#pragma unroll
  for (int piece = 0; piece < kColumns; piece += Layout::kPiece) {
#pragma unroll
    for (int n = 0; n < Layout::kPiece; n += 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mine[(g + i / 2 * 8) * Layout::kPitch + n + 2 * c + i % 2] = sums[(piece + n) / 8][i];
      }
    }
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < Layout::kPasses; ++pass) {
      const int row = pass * Layout::kRowsAtOnce + lane / Layout::kLanesOfRow;
      const int column = lane % Layout::kLanesOfRow * kVector;
      float eight[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) eight[j] = mine[row * Layout::kPitch + column + j];
      use(pass, row, piece + column, eight);
    }
    __syncwarp();
  }
}

// Eight elements from an address of 16 bytes, or the first `count` of them and zeros.
template <class Element>
__device__ __forceinline__ void LoadEight(const Element* from, bool is_vector, int64_t count,
                                          float (&to)[kVector]) {
  if (!is_vector) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[j] = j < count ? ToFloat(from[j]) : 0.0f;
    return;
  }
  constexpr int kPerLoad = 16 / static_cast<int>(sizeof(Element));
#pragma unroll
  for (int j = 0; j < kVector; j += kPerLoad) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from + j);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Element) == 4) {
        to[j + i] = FloatOfBits(words[i]);
      } else {
        to[2 * i] = ToFloat(Element{static_cast<uint16_t>(words[i] & 0xffffu)});
        to[2 * i + 1] = ToFloat(Element{static_cast<uint16_t>(words[i] >> 16)});
      }
    }
  }
}

template <class Element>
__device__ __forceinline__ void StoreEight(Element* to, bool is_vector, int64_t count,
                                           const float (&values)[kVector]) {
  if (!is_vector) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j < count) to[j] = Rounded<Element>(values[j]);
    }
    return;
  }
  constexpr int kPerStore = 16 / static_cast<int>(sizeof(Element));
#pragma unroll
  for (int j = 0; j < kVector; j += kPerStore) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Element) == 4) {
        words[i] = BitsOfFloat(values[j + i]);
      } else {
        words[i] = Pack<Element>(values[2 * i], values[2 * i + 1]);
      }
    }
    *reinterpret_cast<uint4*>(to + j) = {words[0], words[1], words[2], words[3]};
  }
}

template <class Stored>
__device__ __forceinline__ void PutEight(const TileOutput& out, int64_t row, int64_t column,
                                         float (&values)[kVector]) {
  Stored* to = static_cast<Stored*>(out.data) + row * out.stride + column;
  const int64_t count = out.num_columns - column;
  if (out.adds) {
    float before[kVector];
    LoadEight(to, out.is_vector, count, before);
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] += before[j];
  }
  StoreEight(to, out.is_vector, count, values);
}

// Writes or adds eight values of a row; beyond the columns nothing.
template <class Element>
__device__ __forceinline__ void PutEight(const TileOutput& out, int64_t row, int64_t column,
                                         float (&values)[kVector], bool is_valid) {
  if (!is_valid || column >= out.num_columns) return;
  if (out.is_float) {
    PutEight<float>(out, row, column, values);
  } else {
    PutEight<Element>(out, row, column, values);
  }
}

}  // namespace citi
